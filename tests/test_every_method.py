"""What holds for every file of configs/method: figures, blind losses, teachers, schedules, views of several sizes, ViTs."""

import math
from dataclasses import replace
from operator import attrgetter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslctl.data.batch import Batch
from sslctl.methods.base import multi_crop
from sslctl.methods.relative_patch import RelativePatch
from sslctl.training.train import scalars
from sslctl.views import Key
from tests.methods import PREFIX, ROWS, VIT, built, entrance, inputs_of, silence, step_of, tell
from tests.one_view import a_batch, backbone, facts
from tests.test_config import choices

# --- Figures ---


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("method"))
def test_feature_std_is_logged_by_every_method(name):
    logged = scalars(built(name).step())
    assert math.isfinite(logged["loss"])
    assert 0.01 < logged["feature_std"] < 1.2  # of noise: neither collapsed nor more than evenly spread


@pytest.mark.parametrize(
    "words", ["method=frame_order method.task=order", "method=colorization method.form=regression"]
)
def test_feature_std_is_logged_in_a_methods_other_form(words):
    method, form = words.split()
    assert 0.01 < scalars(built(method.removeprefix("method="), form).step())["feature_std"] < 1.2


# --- Blind losses: each method's own number against its loss when its outputs say nothing about their image ---


def silent(name, *parts, words=()):
    """A method of which some networks say 0: uniform probabilities, and embeddings at right angles to all others."""

    def make():
        its = built(name, *words)
        for part in parts:
            silence(its.method.get_submodule(part))
        return its

    return make


def at_random(name, *words, rows, dim, calls):
    """A method whose projections of two views, made in so many calls, are noise: zeros would be its collapse."""

    def make():
        its = built(name, *words, f"method.out_dim={dim}", rows=rows)
        tell(its.method.projector, *torch.randn(calls, 2 * rows // calls, dim))
        return its

    return make


def sure_of_the_share_alone():
    """Triples of frames, exactly a quarter of them in order, and a classifier that knows no more than that."""
    its = built("frame_order", rows=200)
    _, label = its.method.question(its.batch)
    rows = torch.cat([(label == answer).nonzero()[:count, 0] for answer, count in ((0, 30), (1, 10))])
    batch = Batch({"frames": its.batch.views["frames"][:, rows]}, label[rows], rows, its.batch.key.select(rows))
    silence(its.method.classifier)
    its.method.classifier[-1].bias.data.copy_(torch.tensor([0.75, 0.25]).log())
    return replace(its, batch=batch)


def gaussian_tokens():
    its = built("ijepa", "backbone.kwargs.embed_dim=64", rows=64)
    its.method.teacher_backbone.tokens = lambda x: torch.randn(len(x), 17, 64)
    silence(its.method.head)
    return its


BLIND = {
    **{
        name: silent(name, "projector")
        for name in (
            "simclr",
            "moco",
            "moco_v1",
            "moco_v2plus",
            "dcl",
            "supcon",
            "swav",
            "deepcluster_v2",
            "msn",
            "seed",
        )
    },
    **{name: silent(name, "predictor") for name in ("moco_v3", "nnclr", "byol", "simsiam")},
    **{name: silent(name, "classifier") for name in ("rotation", "relative_patch", "jigsaw", "supervised")},
    "distill, by cosines": silent("distill", "projector", "patch_projector", words=("method.loss=cosine",)),
    "mae": silent("mae", "head"),
    "colorization": silent("colorization", "head", words=("method.rebalance=1.0",)),  # colours that all weigh the same
    "dino": silent("dino", "head.0"),
    "ibot": silent("ibot", "head.0", words=("method.mask_chance=1.0",)),
    "ibot, nothing hidden": silent("ibot", "head.0", words=("method.mask_chance=0.0",)),
    "dinov2": silent("dinov2", "heads.0", "heads.1", words=("method.koleo_weight=0.0", "method.mask_chance=1.0")),
    "cpc": silent("cpc", *(f"predictors.{direction}.{row}" for direction in range(4) for row in range(2))),
    "masked_language": silent("masked_language", "transform"),
    "frame_order": sure_of_the_share_alone,
    "frame_order, orders": silent("frame_order", "classifier", words=("method.task=order",)),
    "barlow_twins": at_random("barlow_twins", "method.lambda_=1", "method.scale=0.1", rows=400, dim=200, calls=2),
    "wmse": at_random("wmse", "method.whitening_size=4096", rows=4096, dim=4, calls=1),
    "ijepa": gaussian_tokens,
}
OF_RANDOM_OUTPUTS = {"barlow_twins": 0.02, "wmse": 0.01, "ijepa": 0.02}
DECIDED_BY_DATA = {
    **dict.fromkeys(
        ("autoencoder", "vae", "inpainting", "simmim", "lejepa", "vicreg", "compress", "distill", "diet"), ()
    ),
    **dict.fromkeys(("dinov2", "dinov3"), ()),
    "colorization": ("method.form=regression",),
    "mae": ("method.normalize_target=false",),
}


@pytest.mark.parametrize("name", BLIND)
def test_a_blind_loss_is_that_of_a_step_whose_outputs_say_nothing(name):
    its = BLIND[name]()
    expected = its.loss().item()
    # MAE's patches of noise have a variance that 1e-6 is added to.
    tolerance = OF_RANDOM_OUTPUTS.get(name, 1e-4 if name == "mae" else 1e-5)
    assert its.method.uninformative_loss() == pytest.approx(expected, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("name", DECIDED_BY_DATA)
def test_a_loss_that_data_decide_has_no_blind_value(name):
    assert built(name, *DECIDED_BY_DATA[name]).method.uninformative_loss() is None


def test_every_method_has_a_blind_loss_that_is_looked_at_or_none():
    assert {name.partition(",")[0] for name in BLIND} | DECIDED_BY_DATA.keys() == set(choices("method"))


# --- Teachers ---

BOTH = ("teacher_backbone", "teacher_projector")
TEACHERS = {
    **dict.fromkeys(("moco", "moco_v1", "moco_v2plus", "moco_v3", "byol", "msn"), BOTH),
    **dict.fromkeys(("dino", "ibot"), ("teacher_backbone", "teacher_head")),
    "dinov2": ("teacher_backbone", "teacher_heads"),
    "dinov3": ("teacher_backbone", "teacher_heads", "gram_teacher"),
    "ijepa": ("teacher_backbone",),
    "compress": ("key_backbone", "teacher.network"),
    **dict.fromkeys(("seed", "distill"), ("teacher.network",)),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_optimizer_has_the_whole_student_and_nothing_of_the_teacher(name):
    its = built(name)
    optimized = [parameter for group in its.optimizer().param_groups for parameter in group["params"]]
    teachers = [p for path in TEACHERS[name] for p in attrgetter(path)(its.method).parameters()]
    assert len(teachers) >= len(list(its.method.backbone.parameters()))
    assert not any(p.requires_grad for p in teachers)
    known = {id(p): key for key, p in its.method.named_parameters()} | {id(p): "of a teacher" for p in teachers}
    fixed = {"backbone.network.model.pos_embed"} if name == "ijepa" else set()  # sines
    student = set(known.values()) - {"of a teacher"} - fixed
    assert sorted(known[id(p)] for p in optimized) == sorted(student)


# --- Schedules: the facts are 10 steps an epoch, 100 in all ---

WARM = ("method.teacher_temperature_start=0.04", "method.teacher_temperature=0.07")
WARM += ("method.teacher_temperature_warmup_epochs=3",)
COLD = (*WARM[:2], "method.teacher_temperature_warmup_epochs=0")
LINE = "method.teacher_momentum=0.9"
GRAM = ("teacher_from=0.2", "start=0.5", "ramp=0.04", "refresh=0.1", "refreshes=2", "weight=3.0")
GRAM = (*(f"method.gram_{word}" for word in GRAM), "method.local_weight=0.4")
GRAM_AT_ONCE = ("method.gram_teacher_from=0.0", "method.gram_start=0.0", "method.gram_ramp=0.0")
SCHEDULES = {
    "msn, to 1 at 1.25 of the run": ("teacher_momentum", (LINE,), {0: 0.9, 50: 0.94, 99: 0.9792, 100: 0.98, 125: 1.0}),
    "dinov3, Gram": ("gram_weight", GRAM, {0: 0, 49: 0, 50: 0, 51: 0.43933982822, 52: 1.5, 54: 3, 55: 3, 99: 3}),
    "dinov3, local views": ("local_weight", GRAM, {0: 1, 50: 1, 52: 0.7, 54: 0.4, 99: 0.4}),
    "dinov3, Gram at once": ("gram_weight", (*GRAM, *GRAM_AT_ONCE), {0: 3, 1: 3, 99: 3}),
    "dinov3, Gram teachers": (
        "gram_refresh",
        GRAM,
        {0: 0, 9: 0, 18: 0, 19: 1, 20: 0, 29: 0, 49: 0, 58: 0, 59: 1, 60: 0, 69: 1, 79: 0, 89: 0, 99: 0},
    ),
    "msn, to 1 at its end": ("teacher_momentum", (LINE, "method.momentum_stretch=1.0"), {0: 0.9, 50: 0.95, 100: 1.0}),
    **{
        f"{name}, {words[2].partition('=')[2]} epochs": ("teacher_temperature", words, values)
        for name in ("dino", "ibot", "dinov2")
        for words, values in (
            (WARM, {0: 0.04, 10: 0.05, 29: 0.069, 30: 0.07, 31: 0.07, 99: 0.07}),
            (COLD, {0: 0.07, 99: 0.07}),
        )
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_is_a_function_of_the_step_alone(name):
    key, words, expected = SCHEDULES[name]
    its = built(name.partition(",")[0], *words)
    actual = {step: its.method.schedules(step)[key] for step in expected}
    assert actual == pytest.approx(expected)
    its.step()
    assert {step: its.method.schedules(step)[key] for step in reversed(expected)} == actual


# --- Views of several sizes ---


def numbered(count, rows, side, start):
    """(count, rows, 1, side, side), each image filled with a number of its own."""
    return torch.arange(start, start + count * rows).float().view(count, rows, 1, 1, 1).expand(-1, -1, 1, side, side)


def test_views_of_one_size_share_a_forward_and_the_global_ones_come_first():
    seen = []

    def network(x):
        seen.append(tuple(x.shape))
        return x.mean((2, 3))

    batch = built("dino").batch
    views = {"local": numbered(3, 5, 4, start=100), "global": numbered(2, 5, 8, start=0)}
    out = multi_crop(network, Batch(views, batch.label, batch.index, batch.key))
    assert seen == [(10, 1, 8, 8), (15, 1, 4, 4)]
    expected = torch.cat([torch.arange(0, 10), torch.arange(100, 115)]).float().view(5, 5, 1)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", ["dino", "lejepa", "swav", "deepcluster_v2"])
def test_the_student_takes_one_forward_for_each_size(name):
    its = built(name, "augmentation.local.count=3") if name in ("dino", "lejepa") else built(name)
    sizes = []
    its.method.backbone.register_forward_pre_hook(lambda module, args: sizes.append((len(args[0]), args[0].shape[-1])))
    its.loss()
    rows = len(its.batch.index)
    assert sizes == [(views.shape[0] * rows, views.shape[-1]) for views in its.batch.views.values()]
    assert next(iter(its.batch.views)) == "global"


@pytest.mark.parametrize(
    ("name", "head"),
    [("dino", "head"), *((name, "projector") for name in ("swav", "deepcluster_v2", "lejepa", "wmse"))],
)
def test_a_head_sees_all_crops_at_once(name, head):
    """BatchNorm in it takes its statistics over all of them, as in the official codes: a teacher's over its own crops."""
    its = built(name)
    rows, crops = [], sum(len(views) for views in its.batch.views.values())
    its.method.get_submodule(head).register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    its.loss()
    assert rows == [crops * len(its.batch.index)]


def test_wmses_backbone_sees_one_view_at_a_time():
    """As the official code's (w_mse.py, forward), whose head then takes them together."""
    its = built("wmse", "augmentation.global.count=3")
    rows = []
    its.method.backbone.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    its.loss()
    assert rows == [ROWS] * 3


def test_msns_head_sees_one_size_at_a_time():
    """As the official code's (deit.py, forward): a BatchNorm of masked anchors, and one of focal views."""
    its = built("msn")
    rows = []
    its.method.projector.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    its.loss()
    assert rows == [ROWS, len(its.batch.views["local"]) * ROWS]


def test_swavs_prototypes_have_the_gradient_of_plain_weights():
    """The official code's are an nn.Linear behind a normalisation of its input; of unit rows alone it would miss a part."""
    its = built("swav", "method.freeze_epochs=0")
    weight, codes, embeddings = its.method.prototypes.weight, [], []
    its.method.codes = lambda scores, view, schedules: codes.append(scores.softmax(1)) or codes[-1]
    its.method.projector.register_forward_hook(lambda module, args, out: embeddings.append(out.detach()))
    its.loss().backward()

    plain = weight.detach().clone().requires_grad_()
    z = F.normalize(embeddings[0], dim=1).view(-1, ROWS, plain.shape[1])  # (V, B, out_dim)
    pairs = [(t, v) for t in range(2) for v in range(len(z)) if t != v]
    sum(F.cross_entropy(z[v] @ plain.T / 0.1, codes[t]) / len(pairs) for t, v in pairs).backward()
    torch.testing.assert_close(weight.grad, plain.grad, atol=1e-6, rtol=1e-4)
    radial = (weight.grad * weight.detach()).sum(1)  # (K,)
    assert radial.norm() > 0.1 * weight.grad.norm()


def test_msns_prototypes_begin_short_and_without_weight_decay():
    """As the official code's (msn_train.py): uniform by 1/√D, in a group of their own."""
    its = built("msn")
    prototypes = its.method.prototypes.weight  # (K, D)
    assert prototypes.abs().max() <= prototypes.shape[1] ** -0.5
    assert prototypes.norm(dim=1).mean().item() == pytest.approx(3**-0.5, rel=0.02)
    groups = {id(p): group for group in its.optimizer().param_groups for p in group["params"]}
    assert groups[id(prototypes)]["decay_scale"] == groups[id(prototypes)]["weight_decay"] == 0
    assert groups[id(its.method.projector[0].weight)]["decay_scale"] == 1


# --- From weights ---


MOCO_V3_OF_A_VIT = ("method.projector_layers=3", "method.predictor_norm=true", "method.freeze_patches=true")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "network"),
    [*((name, (), None) for name in choices("method")), ("moco_v3", MOCO_V3_OF_A_VIT, VIT)],
    ids=[*choices("method"), "moco_v3, of a ViT"],
)
def test_a_method_starts_from_the_weights_that_it_is_given(name, words, network, tmp_path):
    """Some have initial weights of their own: those are for what no file gave."""
    start = built(name, *words, network=network).method.backbone.state_dict()
    given = {n: t + 0.5 if t.is_floating_point() else t for n, t in start.items()}
    torch.save(given, tmp_path / "weights.pth")
    backbone = built(name, *words, f"backbone.weights={tmp_path}/weights.pth", network=network).method.backbone
    assert [n for n, t in backbone.named_parameters() if not torch.equal(t, given[n])] == []


# --- On a vision transformer ---


@pytest.mark.parametrize("name", ["dino", "swav", "lejepa"])
def test_a_vision_transformer_takes_a_step_in_all_its_weights(name):
    words = () if name == "lejepa" else ("method.freeze_epochs=0",)
    its = built(name, *words, network=VIT)
    before = {key: tensor.clone() for key, tensor in its.method.backbone.named_parameters()}
    assert math.isfinite(its.step()["loss"].item())
    for key, parameter in its.method.backbone.named_parameters():
        assert parameter.grad.abs().max() > 0, key
        assert not torch.equal(parameter, before[key]), key
        assert torch.isfinite(parameter).all(), key


def moco_v3_of_a_vit():
    return built("moco_v3", *MOCO_V3_OF_A_VIT, "optimizer=adamw", network=VIT)


@pytest.mark.parametrize("name", ["mae", "simmim", "ijepa", "ibot", "msn", "dinov2", "dinov3"])
def test_weights_of_larger_images_serve_smaller_ones(name):
    """Their position embedding is resampled, and as many patches are hidden as without."""
    its = built(name, "+backbone.kwargs.img_size=32")
    assert its.method.backbone.vision_transformer().pos_embed.shape[1] > 64
    assert torch.isfinite(its.loss())
    assert its.method.notes() == built(name).method.notes()


def test_moco_v3_leaves_the_patches_and_positions_of_a_vit_alone():
    its = moco_v3_of_a_vit()
    start = {key: tensor.clone() for key, tensor in its.method.named_parameters()}
    its.step()
    its.method.before_step({"teacher_momentum": 0.5})
    fixed = ("model.patch_embed.", "model.pos_embed")
    for key, parameter in its.method.named_parameters():
        stays = any(part in key for part in fixed)
        assert torch.equal(parameter, start[key]) == stays, key
        assert (parameter.grad is None) == (stays or key.startswith("teacher_")), key
    still = [key for key in start if key.startswith("backbone.") and any(part in key for part in fixed)]
    assert len(still) == 3  # the projection's weight and bias, the positions


def test_moco_v3s_vit_begins_as_the_official_code_draws_it():
    """vits.py: uniform by the root of 6 over the widths that a layer joins, queries, keys and values apart; biases of 0."""
    model = moco_v3_of_a_vit().method.backbone.vision_transformer()
    dim, (attention, hidden) = model.embed_dim, (model.blocks[0].attn, model.blocks[0].mlp)
    patch = model.patch_embed.proj.weight[0].numel()
    joined = {model.patch_embed.proj: patch + dim, attention.qkv: 2 * dim, attention.proj: 2 * dim, hidden.fc1: 5 * dim}
    for layer, widths in (joined | {hidden.fc2: 5 * dim}).items():
        bound = math.sqrt(6 / widths)
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert not layer.bias.any()
    assert model.cls_token.abs().max() < 1e-5


def test_moco_v3s_adamw_decays_all_that_it_trains_and_lars_no_vectors():
    decayed = moco_v3_of_a_vit().optimizer().param_groups
    assert [group["weight_decay"] for group in decayed] == [0.1]
    apart = {group["weight_decay"]: group["params"] for group in built("moco_v3").optimizer().param_groups}
    assert sorted(apart) == [0, 1e-6]
    assert all(p.ndim == 1 for p in apart[0])


def test_moco_v3s_heads_on_a_vit_are_the_official_codes():
    method = moco_v3_of_a_vit().method
    for head, layers in ((method.projector, 3), (method.predictor, 2)):
        linears = [layer for layer in head if isinstance(layer, nn.Linear)]
        norms = [layer for layer in head if isinstance(layer, nn.BatchNorm1d)]
        assert len(linears) == len(norms) == layers
        assert all(linear.bias is None for linear in linears)
        assert [norm.affine for norm in norms] == [True] * (layers - 1) + [False]
        assert head[-1] is norms[-1]
    assert list(norms[-1].parameters()) == []


def test_moco_v3s_predictor_on_a_resnet_ends_without_a_norm():
    method = built("moco_v3").method
    assert isinstance(method.predictor[-1], nn.Linear)
    assert method.predictor[-1].bias is None
    assert sum(isinstance(layer, nn.Linear) for layer in method.projector) == 2


# --- What is asked depends on seed, epoch and index ---


def coloured_patches():
    arguments = {"hidden_dim": 4, "view_size": 1.75, "gap": 0.5, "jitter": 0.0, "colour_drop": 1.0}
    return RelativePatch(backbone(3), facts(3), **arguments), a_batch(3, 56)


def blocks_of_one_size():
    its = built("ijepa")
    its.method.block_size = lambda scale, aspect: (1, 2) if scale < 0.5 else (4, 4)
    return its.method, its.batch


def of(name, *words):
    def make():
        its = built(name, *words)
        return its.method, its.batch

    return make


ASKED = {
    **{name: of(name) for name in ("mae", "simmim", "ijepa", "masked_language", "frame_order", "jigsaw", "vae")},
    "ijepa, blocks of one size": blocks_of_one_size,
    "frame_order, orders": of("frame_order", "method.task=order"),
    "relative_patch": of("relative_patch", "method.gap=0.7", "method.jitter=0.3"),
    "relative_patch, colours": coloured_patches,
    "inpainting": of("inpainting", "method.hole=blobs"),
    "autoencoder, noise": of("autoencoder", "method.noise_std=0.3"),
    "autoencoder, black": of("autoencoder", "method.hidden=0.5"),
}
COUPLED = ("ijepa", "inpainting")  # the first image decides the blocks' size, or the hole
LABELLED = ("masked_language", "frame_order", "frame_order, orders", "jigsaw")


@pytest.mark.parametrize("name", ASKED)
def test_what_is_asked_depends_on_seed_epoch_and_index_only(name, monkeypatch):
    method, batch = ASKED[name]()
    if name == "vae":
        silence(method.mean_head)  # the code is the noise
        silence(method.log_variance_head)
    seen, labels = inputs_of(method.decoder if name == "vae" else entrance(method)), []
    places = inputs_of(method.predictor) if name.startswith("ijepa") else []
    plain = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda logits, label: labels.append(label) or plain(logits, label))

    def asked(rows, seed=0, epoch=0, torch_seed=0):
        """(B, …) each: what goes in and, where it has labels, the right answers."""
        torch.manual_seed(torch_seed)
        rows = torch.tensor(rows)
        views = {group: view[:, :1].expand_as(view)[:, rows] for group, view in batch.views.items()}  # all alike
        index = batch.index[rows]
        step_of(method, Batch(views, batch.label[rows], index, Key(seed, epoch, index)))
        actual = [seen[-1], labels[-1]] if name in LABELLED else [seen[-1]]
        actual += [x[:, seen[-1].shape[1] - PREFIX :] for x in places[-1:]]  # the targets'
        return [x.reshape(len(rows), -1) for x in actual]

    def same(one, two):
        return one.shape == two.shape and torch.allclose(one, two, atol=1e-4)

    everything = asked(range(ROWS))
    rows = [0, 6, 3, 5] if name in COUPLED else [6, 0, 3, 5]
    for whole, again, part in zip(everything, asked(range(ROWS), torch_seed=1), asked(rows), strict=True):
        assert same(again, whole)
        # I-JEPA's contexts are as long as the shortest of the batch: fewer images may leave all of them longer.
        assert same(part[:, : whole.shape[1]], whole[rows])
    for other in (asked(range(ROWS), epoch=1), asked(range(ROWS), seed=1)):
        assert not any(same(x, whole) for x, whole in zip(other, everything, strict=True))
    if name != "inpainting":  # one hole for all
        assert not any(same(whole, whole[:1].expand_as(whole)) for whole in everything)
