"""Public weights come in complete: features of the loaded network are those of the network that the file was written from."""

import contextlib
import copy
import functools

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig

from sslctl.models.backbones import Backbone, ResNet, Timm
from sslctl.models.matching import flatten, match
from sslctl.models.weights import load_weights
from sslctl.runs.checkpoint import CheckpointError
from tests.public_layouts import CASES, SMALL, VIT, dinov2_registers, dinov3, under

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]


def scrambled(model, seed=1):
    """The model in evaluation, none of its tensors as it is initialised."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(0.1 + 0.3 * torch.rand(tensor.shape, generator=generator))
                if not name.endswith(("weight", "running_var")):
                    tensor.sub_(0.2)
    return model.eval()


def backbone_of(model, kwargs, size=32, channels=3):
    return Backbone(Timm(model, channels, size, dict(kwargs)), MEAN[:channels], STD[:channels]).eval()


def images(size=32, channels=3):
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def load(backbone, content, folder, **options):
    torch.save(content, folder / "file.pth")
    return load_weights(backbone, str(folder / "file.pth"), **({"partial": False} | options))


@torch.no_grad()
def assert_same_features(backbone, network, size=32):
    x = images(size).double()  # in single precision some first weights differ by more than their last digits
    backbone, network = copy.deepcopy(backbone).double(), copy.deepcopy(network).double()
    torch.testing.assert_close(backbone(x), network(backbone.normalize(x)), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "kwargs", "name", "write"), CASES, ids=[case[2] for case in CASES])
def test_a_projects_file_is_taken_whole(model, kwargs, name, write, tmp_path):
    source = scrambled(Timm(model, 3, 32, dict(kwargs)))
    backbone = backbone_of(model, kwargs)
    report = load(backbone, write(source.model.state_dict()), tmp_path)
    assert " 0 missing" in report
    assert_same_features(backbone, source)


def test_torchvisions_transformer_is_taken_whole(tmp_path):
    source = scrambled(torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 96))
    backbone = backbone_of("vit_tiny_patch16_224", SMALL)
    report = load(backbone, source.state_dict(), tmp_path)
    assert " 0 missing; left out: 2 of heads" in report
    source.heads = nn.Identity()
    assert_same_features(backbone, source)


def test_torchvisions_swin_and_convnext_are_taken_whole(tmp_path):
    swin = scrambled(torchvision.models.SwinTransformer([4, 4], 8, [1, 1], [1, 1], [4, 4]))
    kwargs = {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 1), "window_size": 4}
    backbone = backbone_of("swin_tiny_patch4_window7_224", kwargs)
    assert " 0 missing; left out: 2 of head" in load(backbone, swin.state_dict(), tmp_path)
    swin.head = nn.Identity()
    assert_same_features(backbone, swin)
    blocks = [CNBlockConfig(4, 6, 1), CNBlockConfig(6, 8, 1), CNBlockConfig(8, 10, 1), CNBlockConfig(10, None, 1)]
    convnext = scrambled(torchvision.models.ConvNeXt(blocks))
    backbone = backbone_of("convnext_tiny", {"dims": (4, 6, 8, 10), "depths": (1, 1, 1, 1)})
    assert " 0 missing; left out: 2 of classifier" in load(backbone, convnext.state_dict(), tmp_path)
    convnext.classifier[2] = nn.Identity()
    assert_same_features(backbone, convnext)


def settled(network, seed=1):
    """The network in evaluation, its BatchNorm with random weights and with statistics of its input, so that features differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.momentum = 1.0
                part.weight.uniform_(0.5, 2, generator=generator)
                part.bias.normal_(0, 0.5, generator=generator)
        network.train()(torch.rand(8, 3, 64, 64, generator=generator))
    return network.eval()


def small_efficientnet_v2():
    """torchvision's as timm's efficientnetv2_s is with a third of the channels and of the blocks."""
    fused = [(1, 1, 8, 8, 1), (4, 2, 8, 16, 2), (4, 2, 16, 24, 2)]  # expansion, stride, channels, blocks
    plain = [(4, 2, 24, 40, 2), (6, 1, 40, 56, 3), (6, 2, 56, 88, 5)]
    blocks = [FusedMBConvConfig(e, 3, s, c, d, n) for e, s, c, d, n in fused]
    blocks += [MBConvConfig(e, 3, s, c, d, n) for e, s, c, d, n in plain]
    return torchvision.models.EfficientNet(
        blocks, 0.0, 0.0, last_channel=424, norm_layer=functools.partial(nn.BatchNorm2d, eps=1e-3)
    )


SMALLER = {"channel_multiplier": 1 / 3, "depth_multiplier": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "model", "kwargs", "eps"),
    [
        (torchvision.models.efficientnet_b0, "efficientnet_b0", {}, 1e-5),
        (small_efficientnet_v2, "efficientnetv2_s", SMALLER, 1e-3),
        (torchvision.models.mobilenet_v2, "mobilenetv2_100", {}, 1e-5),
        (torchvision.models.mobilenet_v3_large, "mobilenetv3_large_100", {}, 1e-3),
        (torchvision.models.mobilenet_v3_small, "mobilenetv3_small_100", {}, 1e-3),
    ],
)
def test_torchvisions_networks_of_inverted_residuals_are_taken_whole(make, model, kwargs, eps, tmp_path):
    network = settled(make())
    backbone = backbone_of(model, kwargs | ({"bn_eps": eps} if eps != 1e-5 else {}), 64)
    report = load(backbone, network.state_dict(), tmp_path)
    assert " 0 missing; left out: 2 of classifier" in report
    assert "bn_eps" not in report
    hidden = list(network.classifier.children())[:-2] if "v3" in model else []
    network.classifier = nn.Sequential(*hidden)
    assert_same_features(backbone, network, 64)
    assert (network(images(64)).std(0) > 1e-3).float().mean() > 0.5  # they tell images apart
    if model in ("mobilenetv3_small_100", "mobilenetv2_100"):  # what no tensor tells is said
        another = {1e-3: 1e-5, 1e-5: 1e-3}[eps]  # 0.001 is that of timm's tf_ models
        other = backbone_of(model, kwargs | {"bn_eps": another}, 64)
        advice = f"has BatchNorm of eps {eps:g}, this one {another:g}: ++backbone.kwargs.bn_eps={eps:g}"
        assert advice in load(other, torch.load(tmp_path / "file.pth"), tmp_path)


@pytest.mark.parametrize(("model", "eps"), [("efficientnet_b4", 1e-5), ("efficientnet_b5", 1e-3)])
def test_the_larger_efficientnets_of_torchvision_are_known_by_their_depth(model, eps):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, model)()
        ours = Backbone(Timm(model, 3, 64, {}), MEAN, STD)
    found = match(theirs.state_dict(), ours)
    assert {part.eps for part in theirs.modules() if isinstance(part, nn.BatchNorm2d)} == {eps}
    assert found.eps == eps
    assert {"mean", "std"} | found.tensors.keys() == ours.state_dict().keys()


def test_lightlys_masked_transformers_are_taken_whole(tmp_path):
    from lightly.models.modules import MaskedVisionTransformerTIMM, MaskedVisionTransformerTorchvision

    source = scrambled(Timm("vit_tiny_patch16_224", 3, 32, SMALL))
    state = MaskedVisionTransformerTIMM(vit=source.model).state_dict()
    backbone = backbone_of("vit_tiny_patch16_224", SMALL)
    assert "left out: 1 of mask_token" in load(backbone, under("backbone.", state), tmp_path)
    assert_same_features(backbone, Backbone(source).network)
    own = torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 96)
    wrapped = scrambled(MaskedVisionTransformerTorchvision(vit=own))
    assert " 0 missing" in load(backbone, under("backbone.", wrapped.state_dict()), tmp_path)
    own.heads = nn.Identity()
    assert_same_features(backbone, own.eval())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sequential_resnet_of_lightlys_kind_loads_into_sslctls_own(seed, tmp_path):
    torch.manual_seed(seed)
    source = scrambled(torchvision.models.resnet18())
    backbone = Backbone(ResNet(18, "imagenet", False, "batch", 3, 224), MEAN, STD).eval()
    sequential = nn.Sequential(*list(source.children())[:-1])
    assert "120 of 120 tensors matched" in load(backbone, under("backbone.", sequential.state_dict()), tmp_path)
    source.fc = nn.Identity()
    assert_same_features(backbone, source)


# --- What is left out is said; what is missing or too much is refused ---


def test_the_report_counts_what_is_left_out_by_part(tmp_path):
    source = scrambled(Timm("vit_tiny_patch16_224", 3, 32, SMALL)).model.state_dict()
    report = load(backbone_of("vit_tiny_patch16_224", SMALL), VIT["DINO"](source), tmp_path)
    assert "taken from teacher.backbone, not student.module.backbone" in report
    assert f"left out: {len(source) + 2} of student, 2 of head" in report


@pytest.mark.parametrize(
    ("kwargs", "other", "advice"),
    [
        ({"depth": 3}, {}, "+backbone.kwargs.depth=3"),
        ({"init_values": 0.1}, {}, "+backbone.kwargs.init_values=1e-5"),
        ({}, {"init_values": 0.1}, "no layer scales"),
        ({"reg_tokens": 4}, {}, "+backbone.kwargs.reg_tokens=4"),
        ({}, {"reg_tokens": 2}, "no registers"),
        ({}, {"class_token": False, "global_pool": "avg", "fc_norm": False}, "+backbone.kwargs.class_token=true"),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {}, "+backbone.kwargs.class_token=false"),
        ({}, {"global_pool": "avg"}, "+backbone.kwargs.fc_norm=false"),
        ({"patch_size": 8}, {}, "backbone.resample_patches=true"),
    ],
)
def test_another_network_is_refused_with_what_makes_it_the_same(kwargs, other, advice, tmp_path):
    source = scrambled(Timm("vit_tiny_patch16_224", 3, 32, SMALL | kwargs)).model.state_dict()
    backbone = backbone_of("vit_tiny_patch16_224", SMALL | other)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load(backbone, source, tmp_path)
    assert advice in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    if "+" not in advice and "=true" not in advice:
        return
    words = dict(word.split("=") for word in advice.replace("+backbone.kwargs.", "").split())
    if words == {"backbone.resample_patches": "true"}:
        assert "patches of 8×8 pixels resampled to 16×16" in load(backbone, source, tmp_path, resample_patches=True)
        return
    # The advice works: all of the sentence, as a user types it.
    followed = {}
    for key, value in (word.split("=") for word in str(caught.value).split() if word.startswith("+backbone.kwargs.")):
        typed = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
        followed[key.removeprefix("+backbone.kwargs.")] = float(typed) if typed == "1e-5" else typed
    same = backbone_of("vit_tiny_patch16_224", SMALL | other | followed)
    assert " 0 missing" in load(same, source, tmp_path)


def test_biases_of_queries_and_values_are_not_lost(tmp_path):
    state = dinov3(scrambled(Timm("vit_small_patch16_dinov3_qkvb", 3, 32, SMALL)).model.state_dict())
    plain = backbone_of("vit_small_patch16_dinov3", SMALL)
    with pytest.raises(CheckpointError, match="_qkvb"):
        load(plain, state, tmp_path)
    without = {name: torch.zeros_like(t) if name.endswith("qkv.bias") else t for name, t in state.items()}
    assert " 0 missing" in load(plain, without, tmp_path)  # biases of zero, as of the distilled large models


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 2, 2, 2)])
@pytest.mark.parametrize("name", ["VIT", "dinov3", "registers"])
def test_tensors_of_odd_shapes_end_in_a_sentence_at_most(name, shape, tmp_path):
    kwargs, write, model = {
        "VIT": (SMALL, VIT["transformers, ViT"], "vit_tiny_patch16_224"),
        "dinov3": (SMALL, dinov3, "vit_small_patch16_dinov3_qkvb"),
        "registers": (SMALL | {"patch_size": 16}, dinov2_registers, "vit_small_patch14_reg4_dinov2"),
    }[name]
    backbone = backbone_of(model, kwargs)
    content = write(backbone.network.model.state_dict())
    for odd in [n for n in content if "1." not in n][:10]:
        with contextlib.suppress(CheckpointError):  # a mask token may have any
            load(backbone, content | {odd: torch.zeros(shape)}, tmp_path)


def test_a_file_that_contains_itself_is_read_once():
    content = {f"w{n}": torch.ones(1) for n in range(3)}
    content |= {f"again{n}": content for n in range(50)}
    assert flatten(content).keys() == {"w0", "w1", "w2"}


# --- Another number of channels, another size ---


@pytest.mark.parametrize(("channels", "words"), [(1, "summed for 1"), (2, "cut for 2"), (5, "repeated for 5")])
def test_the_first_layer_is_adapted_to_channels_as_timm_does(channels, words, tmp_path):
    for model, kwargs in (("vit_tiny_patch16_224", SMALL), ("resnet18", {"channels": (4, 6, 8, 10)})):
        source = scrambled(Timm(model, 3, 32, dict(kwargs)))
        backbone = Backbone(Timm(model, channels, 32, dict(kwargs)), [0.5] * channels, [0.3] * channels).eval()
        assert f"3 channels of the first layer {words}" in load(backbone, source.model.state_dict(), tmp_path)
        grey = images(channels=1).expand(-1, channels, -1, -1)
        same = backbone.normalize(grey)[:, :1].expand(-1, 3, -1, -1)
        if channels != 2:  # of 3 equal channels, 2 and 5 weigh differently
            expected = source(same) if channels == 1 else None
            if expected is not None:
                torch.testing.assert_close(backbone(grey), expected, atol=1e-4, rtol=1e-4)


def test_positions_and_patches_are_resampled(tmp_path):
    source = scrambled(Timm("vit_tiny_patch16_224", 3, 64, SMALL))
    backbone = backbone_of("vit_tiny_patch16_224", SMALL)
    assert "positions of 4×4 patches resampled to 2×2" in load(backbone, source.model.state_dict(), tmp_path)
    assert_same_features(backbone, source)  # timm resamples them at each image of another size

    halves = backbone_of("vit_tiny_patch16_224", SMALL | {"patch_size": 8}, 32)
    report = load(halves, source.model.state_dict(), tmp_path, resample_patches=True)
    assert "patches of 16×16 pixels resampled to 8×8" in report
    expected = timm.layers.resample_patch_embed(source.model.patch_embed.proj.weight.detach(), [8, 8])
    torch.testing.assert_close(halves.network.model.patch_embed.proj.weight.detach(), expected)
