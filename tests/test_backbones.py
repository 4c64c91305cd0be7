import pytest
import timm
import torch
import torchvision
from torch import nn

from sslctl.models.backbones import MLP, Backbone, ResNet, SmallResNet, Timm, describe

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
VIT = {"model": "vit_tiny_patch16_224", "kwargs": {"patch_size": 8, "depth": 2}}


def resnet(depth=18, stem="auto", zero_init_residual=False, channels=3, image_size=32):
    return ResNet(depth, stem, zero_init_residual, "batch", channels, image_size)


def timm_network(model="resnet18", channels=3, image_size=32, **kwargs):
    return Timm(model, channels, image_size, kwargs)


def images(count, side, channels=3, seed=0):
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


def spread(network, seed=0):
    """Gives every BatchNorm statistics and parameters of its own, so that no two places are alike by chance."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.eval()


def torchvision_resnet18(stem):
    model = torchvision.models.resnet18()
    if stem == "small":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    model.fc = nn.Identity()
    return model.eval()


# --- The contract ---


@pytest.mark.parametrize(
    ("depth", "embed_dim", "side", "last"),
    [(18, 512, 32, 4), (18, 512, 224, 7), (34, 512, 32, 4), (50, 2048, 32, 4), (18, 512, 64, 8), (18, 512, 65, 3)],
)
def test_resnet_has_its_papers_width_and_a_stem_by_image_size(depth, embed_dim, side, last):
    backbone = Backbone(resnet(depth, image_size=side), MEAN, STD).eval()
    with torch.no_grad():
        maps, features = backbone.feature_map(images(2, side)), backbone(images(2, side))
    assert backbone.embed_dim == embed_dim
    assert maps.shape == (2, embed_dim, last, last)
    torch.testing.assert_close(features, maps.mean((2, 3)))
    assert describe(backbone.network) == ("3×3, no max-pool" if side <= 64 else "7×7 stride 2, max-pool")


@pytest.mark.parametrize(("stem", "last"), [("imagenet", 1), ("small", 4)])
def test_resnet_stem_can_be_chosen(stem, last):
    network = resnet(stem=stem).eval()
    with torch.no_grad():
        assert network.feature_map(images(2, 32)).shape == (2, 512, last, last)


@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_resnet_takes_one_channel(stem):
    backbone = Backbone(resnet(stem=stem, channels=1), [0.3], [0.2]).eval()
    with torch.no_grad():
        assert backbone(images(2, 32, channels=1)).shape == (2, 512)


@pytest.mark.parametrize(
    ("widths", "blocks", "stem_stride", "side", "last"),
    [
        ([8, 16], 1, 0, 12, 6),  # auto: at full size
        ([8, 16, 24], 2, 0, 32, 4),  # auto: at half
        ([8, 16], 1, 0, 96, 12),  # auto: at a quarter
        ([8, 16, 24], 1, 1, 32, 8),
        ([8], 1, 2, 16, 8),
        ([8], 1, 4, 16, 4),
    ],
)
def test_small_resnet_halves_the_map_at_each_later_stage(widths, blocks, stem_stride, side, last):
    backbone = Backbone(SmallResNet(widths, blocks, stem_stride, "batch", 3, side), MEAN, STD).eval()
    with torch.no_grad():
        maps, features = backbone.feature_map(images(2, side)), backbone(images(2, side))
    assert backbone.embed_dim == widths[-1]
    assert maps.shape == (2, widths[-1], last, last)
    torch.testing.assert_close(features, maps.mean((2, 3)))
    convolutions = [m for m in backbone.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == 1 + 2 * blocks * len(widths)


def test_mlp_gives_its_last_width():
    backbone = Backbone(MLP([32, 24], 3, 16), MEAN, STD).eval()
    assert backbone.embed_dim == 24
    assert backbone(images(2, 16)).shape == (2, 24)


@pytest.mark.parametrize(
    ("model", "kwargs"),
    [
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2}),
        ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2, "global_pool": "avg"}),
        ("mobilenetv3_small_050", {}),  # widens once more between its feature map and its output
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_timm_embed_dim_is_the_width_of_its_output(model, kwargs, channels):
    network = timm_network(model, channels, 32, **kwargs).eval()
    with torch.no_grad():
        assert network(images(2, 32, channels)).shape == (2, network.embed_dim)


def test_timm_convolutional_model_has_a_feature_map_and_no_tokens():
    backbone = Backbone(timm_network("resnet18", image_size=64), MEAN, STD).eval()
    with torch.no_grad():
        maps = backbone.feature_map(images(2, 64))
        torch.testing.assert_close(backbone(images(2, 64)), maps.mean((2, 3)))
        assert maps.shape == (2, 512, 2, 2)
        with pytest.raises(ValueError, match="needs a vision transformer: backbone=small_vit"):
            backbone.tokens(images(2, 64))


def test_timm_transformer_has_tokens_and_no_feature_map():
    backbone = Backbone(Timm(channels=3, image_size=32, **VIT), MEAN, STD).eval()
    with torch.no_grad():
        tokens = backbone.tokens(images(2, 32))
        assert tokens.shape == (2, 1 + (32 // 8) ** 2, 192)
        torch.testing.assert_close(backbone(images(2, 32)), tokens[:, 0])  # its own pooling is the class token
        with pytest.raises(ValueError, match="tokens, not a feature map"):
            backbone.feature_map(images(2, 32))


@pytest.mark.parametrize(
    "network", [lambda: MLP([8], 3, 4), lambda: SmallResNet([8], 1, 1, "batch", 3, 4)], ids=["mlp", "cnn"]
)
def test_backbone_names_what_a_network_does_not_have(network):
    network = network()
    backbone = Backbone(network, MEAN, STD)
    with pytest.raises(ValueError, match="needs a vision transformer"):
        backbone.tokens(images(2, 4))
    if isinstance(network, MLP):
        with pytest.raises(ValueError, match="MLP has no feature map"):
            backbone.feature_map(images(2, 4))


# --- Normalisation ---


@pytest.mark.parametrize("make", [lambda: resnet(), lambda: timm_network(), lambda: MLP([8], 3, 32)])
def test_backbone_normalises_first(make):
    network = make().eval()
    backbone = Backbone(network, MEAN, STD)
    x = images(2, 32)
    normalised = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), network(normalised))
        assert not torch.allclose(backbone(x), network(x), atol=1e-3)


def test_backbone_normalises_maps_and_tokens_too():
    backbone = Backbone(Timm(channels=3, image_size=32, **VIT), MEAN, STD).eval()
    x = images(2, 32)
    normalised = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(backbone.tokens(x), backbone.network.model.forward_features(normalised))
    small = Backbone(SmallResNet([8], 1, 1, "batch", 3, 32), MEAN, STD).eval()
    torch.testing.assert_close(small.feature_map(x), small.network.feature_map(normalised))


def test_normalisation_is_saved_with_the_weights():
    state = Backbone(MLP([8], 3, 4), MEAN, STD).state_dict()
    torch.testing.assert_close(state["mean"].flatten(), torch.tensor(MEAN))
    torch.testing.assert_close(state["std"].flatten(), torch.tensor(STD))
    other = Backbone(MLP([8], 3, 4), [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    other.load_state_dict(state, strict=True)
    assert torch.equal(other.mean.flatten(), torch.tensor(MEAN))


def test_normalisation_given_in_whole_numbers_is_kept_as_floats():
    """dataset.mean=[0,0,0] gives integers; an integer buffer would cut real values that are loaded later down to 0."""
    backbone = Backbone(MLP([8], 3, 4), [0, 0, 0], [1, 1, 1])
    assert (backbone.mean.dtype, backbone.std.dtype) == (torch.float32, torch.float32)
    backbone.load_state_dict(Backbone(MLP([8], 3, 4), MEAN, STD).state_dict(), strict=True)
    assert torch.equal(backbone.mean.flatten(), torch.tensor(MEAN))


# --- The ResNets are torchvision's ---


@pytest.mark.parametrize(("stem", "side"), [("small", 32), ("imagenet", 96)])
def test_resnet_equals_a_hand_built_torchvision_model(stem, side):
    """Batch statistics and learned scales everywhere, so that a missing ReLU or max-pool would show."""
    network, model = spread(resnet(stem=stem)), torchvision_resnet18(stem)
    model.load_state_dict(network.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(network(images(2, side)), model(images(2, side)), atol=1e-5, rtol=1e-4)
        model.relu = nn.Identity()  # negative control: without the stem's ReLU it is another network
        model.conv1.weight.neg_()
        assert not torch.allclose(network(images(2, side)), model(images(2, side)), atol=1e-2)


@pytest.mark.parametrize("depth", [18, 50])
def test_resnet_state_has_torchvisions_names_without_the_classifier(depth):
    ours = Backbone(resnet(depth), MEAN, STD).state_dict()
    theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    assert {n.removeprefix("network.") for n in ours} - {"mean", "std"} == theirs.keys() - {"fc.weight", "fc.bias"}
    assert all(n.startswith("network.") for n in ours.keys() - {"mean", "std"})
    imagenet = resnet(depth, stem="imagenet").state_dict()
    assert {n: t.shape for n, t in imagenet.items()} == {n: theirs[n].shape for n in imagenet}


def test_resnet_zero_init_residual_starts_every_block_as_the_identity():
    zeroed, plain = resnet(zero_init_residual=True), resnet(zero_init_residual=False)
    for network, value in ((zeroed, 0.0), (plain, 1.0)):
        last = [block.bn2.weight for stage in (network.layer1, network.layer4) for block in stage]
        assert all((weight == value).all() for weight in last)


# --- Mistakes ---


def test_small_resnet_refuses_a_stride_it_does_not_have():
    with pytest.raises(ValueError, match=r"backbone.stem_stride=3: expected 0 \(auto\), 1, 2 or 4"):
        SmallResNet([8], 1, 3, "batch", 3, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 19}, r"backbone.depth=19: expected one of \[18, 34, 50, 101\]"),
        ({"stem": "big"}, "backbone.stem=big"),
    ],
)
def test_resnet_refuses_what_it_does_not_know(arguments, message):
    with pytest.raises(ValueError, match=message):
        resnet(**arguments)


def test_timm_names_the_nearest_model():
    with pytest.raises(ValueError, match=r"resnet_18 is not a timm model \(nearest: .*resnet"):
        timm_network("resnet_18")


def test_timm_reports_an_argument_that_the_model_does_not_take():
    with pytest.raises(TypeError, match="no_such_argument"):
        timm_network("vit_tiny_patch16_224", no_such_argument=1)


def test_timm_passes_arguments_on():
    network = timm_network("vit_tiny_patch16_224", **VIT["kwargs"])
    assert len(network.model.blocks) == 2
    assert network.model.patch_embed.proj.kernel_size == (8, 8)
    assert sum(p.numel() for p in network.parameters()) < sum(
        p.numel() for p in timm.create_model("vit_tiny_patch16_224").parameters()
    )
