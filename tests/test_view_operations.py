"""Views as a GPU is asked for them: in few operations, none of which is waited for, and the same views as on a CPU."""

from itertools import permutations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslctl.views import Key, ViewMaker, colour, maker, waiting
from tests.by_hand import view_settings
from tests.test_views import floats, jittered, pixels

NO_KERNEL = {  # new tensors and other looks at the same values
    *("view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "transpose", "t", "permute", "unbind", "split"),
    *("split_with_sizes", "detach", "alias", "empty", "empty_like", "new_empty", "unflatten", "squeeze", "lift_fresh"),
}


class Operations(TorchDispatchMode):
    """Counts what is calculated on a device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, (tuple, list)) else result
        self.count += first.device.type == self.device and function._schema.name.split("::")[1] not in NO_KERNEL
        return result


@pytest.mark.parametrize(
    ("augmentation", "most"),
    [("simclr", 385), ("lejepa", 710), ("dinov3", 830), ("crop", 165)],
)
def test_views_are_few_operations_whatever_their_number(augmentation, most):
    """Tensors on `meta` have no values: they go a GPU's way, and a look at one of them is an error."""
    settings = view_settings(augmentation)
    images, key = pixels(4, 3, 32, 32).to("meta"), Key(0, 0, torch.arange(4, device="meta"))
    with Operations("meta") as asked:
        ViewMaker(settings, 32)(images, key)
    assert asked.count <= most
    for group in settings.values():
        group["count"] += 0 if isinstance(group["blur"]["probability"], list) else 4  # a list has one entry a view
    with Operations("meta") as more:
        ViewMaker(settings, 32)(images, key)
    assert more.count == asked.count


def test_numbers_of_many_names_are_one_hash():
    """And the negative control: asked for one by one they are several hundred operations."""
    key, counts = Key(0, 0, torch.arange(4, device="meta")), {f"name {number}": 3 for number in range(15)}
    with Operations("meta") as together:
        key.stacked({"global": ["0", "1"]}, counts)
    with Operations("meta") as apart:
        for name in counts:
            for prefix in ("0", "1"):
                key.uniform(f"{prefix}/{name}", 3)
    assert together.count < 40
    assert apart.count > 600


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What a GPU would do, on tensors with values."""
    monkeypatch.setattr(waiting, "may_look", lambda values: False)


@pytest.mark.parametrize("augmentation", ["moco_v1", "dinov3", "lejepa"])
def test_views_a_gpus_way_equal_those_of_a_cpu(augmentation, request, monkeypatch):
    images, key = pixels(12, 3, 40, 34), Key(0, 3, torch.arange(100, 112))
    views = ViewMaker(view_settings(augmentation), 32)
    whole, cut = views(images, key), views.cut(list(images), key)
    finished = views.finish({group: crops.clone() for group, crops in cut.items()}, key)
    request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr(maker, "_PART_OF_GPU", 7 * 3 * 32 * 32)  # seven crops of one view and the next at a time
    for group, actual in views(images, key).items():
        assert torch.equal(actual, whole[group]), group
    for group, actual in views.finish(cut, key).items():
        assert torch.equal(actual, finished[group]), group


@pytest.mark.parametrize(("height", "most"), [(16, 8), (32, 4), (64, 2)])
def test_a_gpus_parts_have_room_for_what_lies_between_the_passes(height, most, request, monkeypatch):
    """Memory: a small crop of a high image is as wide as the crop and as high as the image in between."""
    request.getfixturevalue("as_on_a_gpu")
    monkeypatch.setattr(maker, "_PART_OF_GPU", 8 * 3 * 16 * 16)
    images, resample_, lengths = pixels(4, 3, height, 16), maker.resample_, []

    def noted(out, *others):
        lengths.append(len(out))
        resample_(out, *others)

    monkeypatch.setattr(maker, "resample_", noted)
    settings = view_settings("simclr")
    settings["global"]["size"] = 1.0
    ViewMaker(settings, 16)(images, Key(0, 0, torch.arange(4)))
    assert lengths == [most] * (8 // most)


@pytest.mark.parametrize("names", [list(colour.JITTER), ["hue", "contrast"], ["hue"], ["saturation", "brightness"]])
def test_jitter_a_gpus_way_equals_that_of_a_cpu_in_every_order(names, request):
    orders = torch.tensor(list(permutations(range(len(names))))).repeat(2, 1)
    images, key = floats(len(orders), 3, 8, 8), Key(0, 0, torch.arange(len(orders)))
    factors = {n: key.between(n, -0.4, 0.4) if n == "hue" else key.between(n, 0.3, 1.7) for n in names}
    chosen = torch.arange(len(orders)) % 5 != 1
    expected = jittered(images, factors, orders, chosen)
    request.getfixturevalue("as_on_a_gpu")
    assert torch.equal(jittered(images, factors, orders, chosen), expected)
    if len(names) > 1:
        assert not torch.equal(jittered(images, factors, orders.flip(1), chosen), expected)
