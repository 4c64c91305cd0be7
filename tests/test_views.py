import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torchvision.transforms import InterpolationMode, RandomResizedCrop

from sslctl.views import Key, ViewMaker, colour, dropped_operations
from sslctl.views.blur import gaussian_blur, kernel_size
from sslctl.views.maker import resize_and_crop
from sslctl.views.resample import crop_boxes, resample
from tests.by_hand import view_settings


def augmentation(name="simclr", **changes):
    """An augmentation of the configuration folder, with changes to its global group."""
    settings = view_settings(name)
    settings["global"].update(changes)
    return settings


def plain(**changes):
    """Crops of the whole image at its own size and nothing else, with changes."""
    off = {"probability": 0.0}
    whole = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0.0, "grayscale": 0.0, "jitter": off, "blur": off}
    settings = augmentation("linear", **{**whole, "count": 2, **changes})["global"]
    for name in ("jitter", "blur", "solarize"):
        settings[name] = augmentation("linear")["global"][name] | settings[name]
    return {"global": settings}


def floats(count, channels, height, width, seed=0):
    return torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


def pixels(count, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def integers(low, high, count, seed=0):
    return torch.randint(low, high, (count,), generator=torch.Generator().manual_seed(seed))


def hard_colours():
    """Random images, one of grey pixels only, and one of black, white, pure colours and ties between channels."""
    images = floats(4, 3, 8, 8, seed=5)
    images[1] = images[1, :1]
    images[2] = torch.tensor(list(permutations([0.0, 0.5, 1.0]))).T.repeat(1, 11)[:, :64].view(3, 8, 8)
    images[3] = (torch.arange(64) % 8)[None].bitwise_right_shift(torch.arange(3)[:, None]).bitwise_and(1).view(3, 8, 8)
    return images


# --- Crops ---


def random_boxes(count, height, width, seed):
    generator = torch.Generator().manual_seed(seed)
    boxes = []
    for _ in range(count):
        h = int(torch.randint(1, height + 1, (), generator=generator))
        w = int(torch.randint(1, width + 1, (), generator=generator))
        top = int(torch.randint(0, height - h + 1, (), generator=generator))
        left = int(torch.randint(0, width - w + 1, (), generator=generator))
        boxes.append([top, left, h, w])
    boxes[0], boxes[1] = [0, 0, height, width], [height - 1, width - 1, 1, 1]
    return torch.tensor(boxes)


def reference_crop(image, box, size, kernel):
    top, left, height, width = box.tolist()
    mode = InterpolationMode.BILINEAR if kernel == "bilinear" else InterpolationMode.BICUBIC
    return TF.resized_crop(image, top, left, height, width, [size, size], mode, antialias=True).clamp(0, 1)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [7, 24, 96], ids=["shrinking", "both", "enlarging"])
def test_resample_equals_torchvision_image_by_image(kernel, channels, size):
    images = floats(24, channels, 45, 61)
    boxes = random_boxes(24, 45, 61, seed=size)
    flip = torch.arange(24) % 3 == 0
    actual = resample(images, boxes, size, kernel, flip)
    for b in range(24):
        expected = reference_crop(images[b], boxes[b], size, kernel)
        expected = TF.hflip(expected) if flip[b] else expected
        torch.testing.assert_close(actual[b], expected, atol=1e-5, rtol=0)


def test_resample_of_a_square_to_another_shape_equals_torchvision():
    images, boxes = floats(4, 3, 20, 20), random_boxes(4, 20, 20, seed=1)
    for image, (top, left, height, width), actual in zip(
        images, boxes.tolist(), resample(images, boxes, (12, 30), "bilinear"), strict=True
    ):
        expected = TF.resized_crop(image, top, left, height, width, [12, 30], antialias=True)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
def test_resample_of_the_whole_image_at_its_size_changes_nothing(kernel):
    images = floats(3, 3, 20, 20)
    actual = resample(images, torch.tensor([[0, 0, 20, 20]] * 3), 20, kernel)
    torch.testing.assert_close(actual, images, atol=1e-6, rtol=0)


def test_resampling_without_antialiasing_differs_when_shrinking():
    """The negative control: sampling the same boxes at single points is another operation, and the tolerance sees it."""
    images, size = floats(4, 3, 64, 64), 16
    boxes = torch.tensor([[0, 0, 64, 64], [3, 7, 50, 40], [10, 0, 54, 33], [1, 1, 48, 62]])
    top, left, height, width = boxes.float()[:, :, None].unbind(1)  # (B, 1)
    steps = (torch.arange(size) + 0.5) / size
    y, x = (top + steps * height) / 32 - 1, (left + steps * width) / 32 - 1  # (B, size), in grid_sample's units
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)
    sampled = F.grid_sample(images, grid, align_corners=False, padding_mode="border")
    antialiased = torch.stack([reference_crop(i, b, size, "bilinear") for i, b in zip(images, boxes, strict=True)])
    assert ((sampled - antialiased).flatten(1).abs().mean(1) > 0.05).all()
    torch.testing.assert_close(resample(images, boxes, size, "bilinear"), antialiased, atol=1e-5, rtol=0)


def kolmogorov_smirnov(a, b):
    """The largest difference between two empirical distribution functions."""
    a, b = a.double().sort().values, b.double().sort().values
    places = torch.cat([a, b])
    below = [torch.searchsorted(values, places, right=True) / len(values) for values in (a, b)]
    return (below[0] - below[1]).abs().max().item()


def box_statistics(boxes, height, width):
    top, left, h, w = boxes.double().unbind(1)
    one = {"area": h * w / (height * width), "ratio": w / h, "top": top, "left": left, "height": h, "width": w}
    return one | {"both places": top * left}


def torchvision_boxes(height, width, scale, ratio, draws):
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    return torch.tensor([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(draws)])


def our_boxes(height, width, scale, ratio, draws):
    index = torch.arange(draws)
    return crop_boxes(
        Key(0, 0, index), "a", torch.full_like(index, height), torch.full_like(index, width), scale, ratio
    )


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (32, 32, (0.2, 1.0)),
        (375, 500, (0.08, 1.0)),
        (40, 120, (0.3, 1.0)),
        (120, 48, (0.3, 1.0)),
        (96, 96, (0.05, 0.4)),
    ],
    ids=["square", "photograph", "panorama", "tall", "small parts"],
)
def test_crop_boxes_are_distributed_as_torchvision(height, width, scale):
    """4,000 draws each: two samples of one distribution differ by more than 0.05 once in 50,000 times."""
    ratio, draws = (3 / 4, 4 / 3), 4000
    ours = our_boxes(height, width, scale, ratio, draws)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 2:] > 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    ours = box_statistics(ours, height, width)
    theirs = box_statistics(torchvision_boxes(height, width, scale, ratio, draws), height, width)
    for name, values in ours.items():
        assert kolmogorov_smirnov(values, theirs[name]) < 0.05, name
    assert ours["area"].mean().item() == pytest.approx(theirs["area"].mean().item(), abs=0.02)
    assert ours["ratio"].mean().item() == pytest.approx(theirs["ratio"].mean().item(), abs=0.02)


def test_crop_boxes_reach_the_ends_of_their_ranges_and_not_past_them():
    boxes = box_statistics(our_boxes(375, 500, (0.08, 1.0), (3 / 4, 4 / 3), 4000), 375, 500)
    for name, low, high in (("area", 0.08, 1.0), ("ratio", 3 / 4, 4 / 3)):
        lowest, highest = boxes[name].min().item(), boxes[name].max().item()
        assert low - 0.01 < lowest < low + 0.01, name
        assert high - 0.01 < highest < high + 0.01, name


def test_crop_boxes_of_a_linear_ratio_would_be_noticed():
    """The negative control of the test above: ratio drawn uniformly instead of log-uniformly."""
    generator = torch.Generator().manual_seed(0)
    log_uniform = torch.empty(4000).uniform_(math.log(3 / 4), math.log(4 / 3), generator=generator).exp()
    uniform = torch.empty(4000).uniform_(3 / 4, 4 / 3, generator=generator)
    assert kolmogorov_smirnov(log_uniform, uniform) > 0.05


@pytest.mark.parametrize(
    ("height", "width", "ratio"),
    [(10, 200, (3 / 4, 4 / 3)), (200, 10, (3 / 4, 4 / 3)), (1, 7, (3 / 4, 4 / 3)), (30, 37, (1.0, 1.0))],
)
def test_crop_boxes_fall_back_to_torchvisions_central_crop(height, width, ratio):
    """No crop of 99 % of the area or more has an allowed ratio where the image itself has none."""
    expected = torchvision_boxes(height, width, (0.99, 1.0), ratio, 1).expand(20, 4)
    assert torch.equal(our_boxes(height, width, (0.99, 1.0), ratio, 20), expected)


def test_the_first_of_ten_attempts_that_fits_is_taken():
    """torchvision's loop with the numbers that each image's key holds."""
    height, width, scale, ratio = 40, 60, (0.5, 1.0), (3 / 4, 4 / 3)
    later = 0
    for index in torch.arange(60).split(1):
        key, box = Key(0, 0, index), None
        shares, aspects = key.between("a/area", *scale, 10)[0], key.between("a/aspect", *map(math.log, ratio), 10)[0]
        for attempt, (share, aspect) in enumerate(zip(shares.tolist(), aspects.exp().tolist(), strict=True)):
            w, h = (round(math.sqrt(height * width * share * r)) for r in (aspect, 1 / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = key.uniform("a/place", 2)[0].tolist()
                box = [int(top * (height - h + 1)), int(left * (width - w + 1)), h, w]
                later += attempt > 0
                break
        sides = torch.tensor([height]), torch.tensor([width])
        assert box is None or crop_boxes(key, "a", *sides, scale, ratio)[0].tolist() == box
    assert 5 < later < 55


def test_crop_boxes_of_mixed_sizes_equal_those_of_each_size():
    height, width, index = torch.tensor([32, 375, 10]), torch.tensor([32, 500, 200]), torch.arange(3)
    together = crop_boxes(Key(0, 0, index), "a", height, width, (0.08, 1.0), (3 / 4, 4 / 3))
    for b in range(3):
        one = slice(b, b + 1)
        alone = crop_boxes(Key(0, 0, index[one]), "a", height[one], width[one], (0.08, 1.0), (3 / 4, 4 / 3))
        assert torch.equal(alone, together[one])


# --- Colour and blur ---

ADJUST = {
    "brightness": TF.adjust_brightness,
    "contrast": TF.adjust_contrast,
    "saturation": TF.adjust_saturation,
    "hue": TF.adjust_hue,
}


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factors", [[0.0, 0.3, 1.0, 1.8], [1.5, 0.7, 2.5, 0.0]])
def test_colour_operation_equals_torchvision(name, factors):
    images = hard_colours()
    actual = getattr(colour, name)(images, torch.tensor(factors))
    for b, factor in enumerate(factors):
        torch.testing.assert_close(actual[b], ADJUST[name](images[b], factor), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["brightness", "contrast"])
def test_colour_operation_of_one_channel_equals_torchvision(name):
    images = floats(3, 1, 9, 7)
    actual = getattr(colour, name)(images, torch.tensor([0.2, 1.0, 1.7]))
    for b, factor in enumerate([0.2, 1.0, 1.7]):
        torch.testing.assert_close(actual[b], ADJUST[name](images[b], factor), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shifts", [[-0.5, -0.21, 0.0, 0.1], [0.5, 0.33, 1 / 6, -1 / 3], [0.02, 0.25, -0.4, 0.17]])
def test_hue_equals_torchvision(shifts):
    images = hard_colours()
    actual = colour.hue(images, torch.tensor(shifts))
    for b, shift in enumerate(shifts):
        torch.testing.assert_close(actual[b], TF.adjust_hue(images[b], shift), atol=1e-4, rtol=0)


def test_grayscale_equals_torchvision():
    images = hard_colours()
    torch.testing.assert_close(colour.grayscale(images), TF.rgb_to_grayscale(images, 3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("operation", ["saturation", "hue", "grayscale"])
def test_colour_operation_on_one_channel_is_an_error(operation):
    """As the module promises: an operation that cannot do anything is not passed over in silence."""
    arguments = () if operation == "grayscale" else (torch.tensor([0.3, 0.4]),)
    with pytest.raises(ValueError):  # noqa: PT011, unbind's message is torch's
        getattr(colour, operation)(floats(2, 1, 4, 4), *arguments)


@pytest.mark.parametrize("threshold", [0.5, 128 / 255, 0.0, 1.0])
def test_solarize_equals_torchvision(threshold):
    images = pixels(3, 3, 16, 16).float() / 255
    images[0, 0, 0, 0], images[1, 1, 2, 2] = threshold, 1.0
    assert torch.equal(colour.solarize(images, threshold), TF.solarize(images, threshold))


@pytest.mark.parametrize("size", [3, 5, 23])
def test_gaussian_blur_equals_torchvision_with_a_sigma_an_image(size):
    images, sigma = floats(5, 3, 32, 40), [0.1, 0.4, 1.0, 1.37, 2.0]
    actual = gaussian_blur(images, torch.tensor(sigma), size)
    for b, width in enumerate(sigma):
        expected = TF.gaussian_blur(images[b], [size, size], [width, width])
        torch.testing.assert_close(actual[b], expected, atol=1e-5, rtol=0)


def test_kernel_size_is_an_odd_tenth_of_the_side():
    assert [kernel_size(side) for side in (8, 16, 32, 64, 96, 224)] == [3, 3, 3, 7, 9, 23]


def jittered(images, factors, order, chosen=None):
    chosen = torch.ones(len(images), dtype=torch.bool) if chosen is None else chosen
    result = images.clone()
    colour.Jitter(factors, order, chosen).apply_(result, slice(0, len(images)))
    return result


@pytest.mark.parametrize("names", [["brightness", "contrast", "saturation", "hue"], ["contrast", "brightness"]])
def test_jitter_equals_torchvision_in_each_images_own_order(names):
    orders = torch.tensor(list(permutations(range(len(names)))))
    count = len(orders)
    images, key = floats(count, 3, 8, 8), Key(0, 0, torch.arange(count))
    factors = {n: key.between(n, -0.4, 0.4) if n == "hue" else key.between(n, 0.3, 1.7) for n in names}
    before = images.clone()
    actual = jittered(images, factors, orders)
    assert torch.equal(images, before)
    for b in range(count):
        expected = images[b]
        for number in orders[b].tolist():
            expected = ADJUST[names[number]](expected, factors[names[number]][b].item())
        torch.testing.assert_close(actual[b], expected, atol=1e-4, rtol=0)


def test_jitter_in_another_order_differs():
    """The negative control: brightness and contrast cut to [0, 1], so they do not commute."""
    images = floats(1, 3, 8, 8)
    factors = {"brightness": torch.tensor([1.6]), "contrast": torch.tensor([1.7])}
    ways = [jittered(images, factors, torch.tensor([order])) for order in ([0, 1], [1, 0])]
    assert (ways[0] - ways[1]).abs().max() > 0.05


def test_jitter_leaves_the_images_that_are_not_chosen_bit_for_bit():
    images, key = floats(12, 3, 8, 8), Key(0, 0, torch.arange(12))
    factors = {n: key.between(n, -0.4, 0.4) if n == "hue" else key.between(n, 0.3, 1.7) for n in colour.JITTER}
    chosen = torch.arange(12) % 3 == 0
    actual = jittered(images, factors, key.permutation("order", 4), chosen)
    assert torch.equal(actual[~chosen], images[~chosen])
    assert torch.equal(actual[chosen], jittered(images, factors, key.permutation("order", 4))[chosen])


def test_jitter_of_part_of_a_batch_takes_that_parts_parameters():
    images, key = floats(9, 3, 15, 15), Key(0, 0, torch.arange(9))
    factors = {n: key.between(n, -0.4, 0.4) if n == "hue" else key.between(n, 0.3, 1.7) for n in colour.JITTER}
    order = key.permutation("order", 4)
    jitter, parts = colour.Jitter(factors, order, key.chance("chosen", 0.7)), images.clone()
    for rows in (slice(0, 1), slice(1, 6), slice(6, 9)):
        jitter.apply_(parts[rows], rows)
    assert torch.equal(parts, jittered(images, factors, order, key.chance("chosen", 0.7)))


# --- Views ---

MIXED = {
    "global": augmentation(
        "simclr",
        blur={"probability": [1.0, 0.1], "sigma": [0.1, 2.0]},
        solarize={"probability": [0.0, 0.5], "threshold": 0.5},
    )["global"],
    "local": augmentation("moco_v2", count=3, size=0.5, scale=[0.05, 0.2], ratio=[0.4, 2.5], interpolation="bicubic")[
        "global"
    ],
}
STRONG = augmentation("simclr", jitter={**augmentation("simclr")["global"]["jitter"], "strength": 2.0})
RECIPES = {name: augmentation(name) for name in ("simclr", "moco_v1", "moco_v2", "linear")}
RECIPES |= {"mixed": MIXED, "strong": STRONG}


def reference_view(image, settings, key, group, view, size):
    """One view of one image, by torchvision's functions and the numbers that the key holds for it."""
    name = f"{group}/{view}"
    height, width = (torch.tensor([side]) for side in image.shape[1:])
    box = crop_boxes(key, f"{name}/crop", height, width, settings["scale"], settings["ratio"])[0]
    x = reference_crop(image, box, size, settings["interpolation"])
    if key.chance(f"{name}/flip", settings["flip"]):
        x = TF.hflip(x)

    def happens(operation, probability):
        probability = probability[view] if isinstance(probability, list) else probability
        return key.uniform(f"{name}/{operation}").item() < probability

    def jitter(x):
        options = settings["jitter"]
        names = [n for n in ADJUST if options[n] > 0]
        if not names or not happens("jitter", options["probability"]):
            return x
        for number in key.permutation(f"{name}/order", len(names))[0].tolist():
            operation = names[number]
            strength = options[operation] * options["strength"]
            low, high = (-strength, strength) if operation == "hue" else (max(0, 1 - strength), 1 + strength)
            x = ADJUST[operation](x, key.between(f"{name}/{operation}", low, high).item())
        return x

    def grayscale(x):
        return TF.rgb_to_grayscale(x, 3) if happens("grayscale", settings["grayscale"]) else x

    x = jitter(grayscale(x)) if settings["grayscale_first"] else grayscale(jitter(x))
    if happens("blur", settings["blur"]["probability"]):
        sigma = key.between(f"{name}/sigma", *settings["blur"]["sigma"]).item()
        x = TF.gaussian_blur(x, [kernel_size(size)] * 2, [sigma, sigma])
    if happens("solarize", settings["solarize"]["probability"]):
        x = TF.solarize(x, settings["solarize"]["threshold"])
    return x


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("height", "width", "side"), [(40, 34, 32), (90, 74, 72)], ids=["small", "large"])
def test_view_maker_equals_torchvision_one_image_at_a_time(name, height, width, side):
    images, index = pixels(16, 3, height, width), torch.arange(100, 116)
    recipe = RECIPES[name]
    actual = ViewMaker(recipe, side)(images, Key(0, 3, index))
    for group, settings in recipe.items():
        size = {"global": side, "local": side // 2}[group]
        assert actual[group].shape == (settings["count"], 16, 3, size, size)
        for view in range(settings["count"]):
            for b in range(16):
                key = Key(0, 3, index[b : b + 1])
                expected = reference_view(images[b].float() / 255, settings, key, group, view, size)
                close = torch.isclose(actual[group][view, b], expected, atol=2e-4, rtol=0)
                # Rounding may carry a pixel over the threshold of solarize, which then inverts it.
                assert (~close).float().mean() <= (0.002 if settings["solarize"]["probability"] else 0), (group, view)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28), (3, 15), (3, 70)])
@pytest.mark.parametrize("sizes", [[12, 12], [5, 19], [1] * 24], ids=["halves", "uneven", "one by one"])
def test_views_are_bitwise_the_same_however_the_batch_is_split(name, channels, side, sizes):
    images, index = pixels(24, channels, side, side), integers(0, 10**6, 24)
    maker = ViewMaker(RECIPES[name], side, ("saturation", "hue", "grayscale") if channels == 1 else ())
    whole = maker(images, Key(1, 2, index))
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    parts = [
        maker(part, Key(1, 2, numbers))
        for part, numbers in zip(images[order].split(sizes), index[order].split(sizes), strict=True)
    ]
    for group, expected in whole.items():
        assert torch.equal(torch.cat([part[group] for part in parts], 1), expected[:, order])


def test_contrast_is_bitwise_the_same_on_several_threads_however_the_batch_is_split():
    """An image of 2**15 pixels or more alone: torch would split its one mean over the threads, the mean of a batch not."""
    images, factor = floats(8, 3, 200, 200), torch.linspace(0.4, 1.6, 8)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        whole = colour.contrast(images, factor)
        parts = torch.cat([colour.contrast(images[b : b + 1], factor[b : b + 1]) for b in range(8)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(parts, whole)


def test_views_differ_by_view_epoch_seed_and_image():
    images, index = pixels(1, 3, 32, 32).expand(4, -1, -1, -1), torch.arange(4)
    maker = ViewMaker(augmentation("simclr"), 32)
    views = [maker(images, Key(seed, epoch, index))["global"].flatten(0, 1) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    pictures = torch.cat(views).flatten(1)
    assert len(pictures.unique(dim=0)) == 3 * 2 * 4


@pytest.mark.parametrize("kernel", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (90, 120, 32), (20, 30, 64)])
def test_cut_equals_the_batched_path_to_uint8_rounding(kernel, height, width, size):
    """Rounded twice, after the rows and after the columns, which is about one level at most, and no level on average.

    The pixels stay away from black and white: the uint8 path cuts the cubic kernel's overshoot off after the rows too.
    """
    recipe = plain(scale=[0.2, 1.0], ratio=[0.75, 4 / 3], flip=0.5, interpolation=kernel)
    maker, index = ViewMaker(recipe, size), torch.arange(50, 62)
    images = pixels(12, 3, height, width) // 2 + 64
    batched = maker(images, Key(0, 0, index))["global"]
    crops = maker.cut(list(images), Key(0, 0, index))["global"]
    assert crops.dtype == torch.uint8
    assert crops.shape == (2, 12, 3, size, size)
    difference = crops.float() - batched * 255
    assert difference.abs().max() < 1.25
    assert difference.abs().mean() < 0.35
    assert difference.mean().abs() < 0.06


@pytest.mark.parametrize("name", RECIPES)
def test_finish_of_untouched_crops_equals_the_batched_path(name):
    """Where the crop is the whole image at its size both paths hold the same pixels, so the rest must agree bit for bit."""
    whole = {"size": 1.0, "scale": [1.0, 1.0], "ratio": [1.0, 1.0], "flip": 0.0, "interpolation": "bilinear"}
    recipe = {group: {**settings, **whole} for group, settings in RECIPES[name].items()}
    maker, images, index = ViewMaker(recipe, 32), pixels(16, 3, 32, 32), torch.arange(16)
    crops = maker.cut(list(images), Key(0, 0, index))
    finished = maker.finish(crops, Key(0, 0, index))
    batched = maker(images, Key(0, 0, index))
    for group in recipe:
        assert torch.equal(finished[group], batched[group])


def test_cut_of_an_image_is_the_same_in_any_batch_and_differs_by_epoch():
    maker, images = ViewMaker(augmentation("simclr"), 32), [pixels(1, 3, 50, 70)[0], pixels(1, 3, 40, 33)[0]]
    both = maker.cut(images, Key(0, 0, torch.tensor([4, 9])))["global"]
    alone, later = (maker.cut(images[1:], Key(0, epoch, torch.tensor([9])))["global"] for epoch in (0, 1))
    assert torch.equal(alone[:, 0], both[:, 1])
    assert not torch.equal(alone, later)


@pytest.mark.parametrize(
    ("operation", "off"),
    [
        ("flip", {"flip": 0.0}),
        ("grayscale", {"grayscale": 0.0}),
        ("blur", {"blur": {"probability": 0.0, "sigma": [0.1, 2.0]}}),
        ("solarize", {"solarize": {"probability": 0.0, "threshold": 0.5}}),
        ("hue", {"jitter": {**augmentation("simclr")["global"]["jitter"], "hue": 0.0}}),
        ("contrast", {"jitter": {**augmentation("simclr")["global"]["jitter"], "contrast": 0.0}}),
    ],
)
def test_dropping_an_operation_equals_switching_it_off(operation, off):
    recipe = augmentation("simclr", solarize={"probability": 0.5, "threshold": 0.5})
    images, key = pixels(16, 3, 32, 32), Key(0, 0, torch.arange(16))
    dropped = ViewMaker(recipe, 32, (operation,))(images, key)["global"]
    switched = ViewMaker({"global": {**recipe["global"], **off}}, 32)(images, key)["global"]
    assert torch.equal(dropped, switched)
    assert not torch.equal(dropped, ViewMaker(recipe, 32)(images, key)["global"])


def test_dropped_operations_are_those_wanted_and_unusable():
    simclr = augmentation("simclr")  # everything but solarize
    assert dropped_operations(simclr, [], 3) == []
    assert dropped_operations(simclr, ["flip", "blur", "solarize"], 3) == ["flip", "blur"]
    assert dropped_operations(simclr, ["flip"], 1) == ["flip", "saturation", "hue", "grayscale"]
    assert dropped_operations(augmentation("linear"), ["blur"], 1) == []
    no_hue = augmentation("simclr", jitter={**simclr["global"]["jitter"], "hue": 0.0})
    assert dropped_operations(no_hue, ["hue", "contrast"], 3) == ["contrast"]
    assert dropped_operations(MIXED, ["solarize"], 3) == ["solarize"]  # wanted by one view of one group


def test_per_view_probabilities_apply_to_their_view():
    recipe = plain(
        blur={"probability": [1.0, 0.0], "sigma": [1.0, 1.0]},
        solarize={"probability": [0.0, 1.0], "threshold": 0.4},
    )
    images = pixels(6, 3, 24, 24)
    first, second = ViewMaker(recipe, 24)(images, Key(0, 0, torch.arange(6)))["global"]
    clean = images.float() / 255
    torch.testing.assert_close(first, TF.gaussian_blur(clean, [3, 3], [1.0, 1.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(second, TF.solarize(clean, 0.4), atol=1e-5, rtol=0)


def test_per_view_probabilities_of_jitter_and_grayscale_apply_to_their_view():
    strengths = {"strength": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
    recipe = plain(grayscale=[0.0, 1.0], jitter={"probability": [1.0, 0.0], **strengths})
    images = pixels(6, 3, 24, 24)
    first, second = ViewMaker(recipe, 24)(images, Key(0, 0, torch.arange(6)))["global"]
    clean = images.float() / 255
    assert ((first - clean).flatten(1).abs().amax(1) > 0.02).all()
    assert ((first[:, 0] - first[:, 1]).flatten(1).abs().amax(1) > 0.02).all()
    torch.testing.assert_close(second, TF.rgb_to_grayscale(clean, 3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("by", ["whole batches", "a worker"])
def test_gram_views_show_the_places_of_the_global_ones(by):
    recipe = plain(scale=[0.1, 0.4], flip=0.5)
    settings = recipe["global"]
    recipe |= {"local": settings, "gram": settings | {"size": 2.0}}
    maker, images, key = ViewMaker(recipe, 16), pixels(6, 3, 40, 40), Key(0, 0, torch.arange(6))
    views = maker(images, key) if by == "whole batches" else maker.finish(maker.cut([*images], key), key)
    larger = ViewMaker({"global": settings}, 32)(images, key)["global"]
    torch.testing.assert_close(views["gram"], larger, atol=1.01 / 255, rtol=0)  # a worker rounds to uint8
    halved = F.interpolate(views["gram"].flatten(0, 1), (16, 16), mode="area").unflatten(0, (2, 6))
    assert (halved - views["global"]).abs().mean() < 0.06 < (halved - views["local"]).abs().mean()


def test_views_stay_in_the_unit_interval():
    for values in ViewMaker(MIXED, 32)(pixels(16, 3, 48, 40), Key(0, 0, torch.arange(16))).values():
        assert values.dtype == torch.float32
        assert values.min() >= -1e-6  # a blur's weights sum to 1 up to rounding
        assert values.max() <= 1 + 1e-6


def test_sizes_are_relative_to_the_image_size():
    assert ViewMaker(MIXED, 64).sizes() == {"global": (2, 64), "local": (3, 32)}


@pytest.mark.parametrize(
    ("side", "multiple", "sizes"),
    [(60, 16, (64, 32)), (50, 16, (48, 32)), (33, 4, (32, 16)), (3, 8, (8, 8)), (29, 1, (29, 14))],
)
def test_sizes_are_the_nearest_multiples(side, multiple, sizes):
    maker = ViewMaker(MIXED, side, multiple=multiple)
    assert maker.sizes() == {"global": (2, sizes[0]), "local": (3, sizes[1])}
    assert maker(pixels(1, 3, 40, 40), Key(0, 0, torch.arange(1)))["local"].shape[-1] == sizes[1]


@pytest.mark.parametrize(("height", "width"), [(60, 90), (90, 60), (37, 37), (32, 32), (20, 25)])
def test_resize_and_crop_equals_torchvision(height, width):
    image = pixels(1, 3, height, width)[0]
    expected = TF.center_crop(TF.resize(image, 36, antialias=True), [32, 32])
    actual = resize_and_crop(image, 32, 36)
    assert actual.dtype == torch.uint8
    assert (actual.int() - expected.int()).abs().max() <= 1


def test_the_verb_draws_originals_and_their_views(cli, tmp_path):
    from PIL import Image

    result = cli("views", "out=views.png", "images=3", "draws=2", "dataset.image_size=8")
    assert result.status == 0, result.err
    assert Image.open(tmp_path / "views.png").size == (5 * 104, 3 * 104)  # the original, two draws of two views
