"""Fine-tuning: layer-wise learning rates by hand, the draws of the probes, exact resume, what is kept, bad input."""

import shutil
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from sslctl.cli import main
from sslctl.data.sources import digits
from sslctl.data.text import text
from sslctl.errors import InputError
from sslctl.evaluation import subjects
from sslctl.evaluation.features import extract
from sslctl.evaluation.finetune import Finetune, build_network, network_of, settings_for
from sslctl.evaluation.knn import accuracy
from sslctl.evaluation.labelled_rows import draw_labels
from sslctl.evaluation.task import Task
from sslctl.factory.from_run import load_method
from sslctl.methods.supervised import Supervised
from sslctl.models.backbones import MLP, ResNet, SmallResNet, Timm
from sslctl.models.batchnorm import GroupedBatchNorm2d
from sslctl.models.layer_decay import decayed, layer_depths
from sslctl.models.preprocess import TextPreprocess
from sslctl.models.text_transformer import SmallTransformer
from sslctl.runs import checkpoint
from sslctl.runs.reading import read_lines
from sslctl.training.optim import parameter_groups
from tests.by_hand import AS_IT_IS, facts, make_batch, moco, tiny_backbone
from tests.methods import SIDE, built
from tests.runs import SIMCLR, contents, differences, finish, newest, results, signal_at

SMALL_VIT = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4}


# --- Layers ---


def small_vit():
    return Timm("vit_tiny_patch16_224", 1, 16, SMALL_VIT)


def small_resnet():
    return SmallResNet([4, 8, 8], 1, 0, "batch", 1, 16)


NETWORKS = {
    "resnet18": lambda: ResNet(18, "auto", False, "batch", 3, 32),
    "small_vit": small_vit,
    "small_resnet": small_resnet,
    "mlp": lambda: MLP([8, 6], 1, 4),
    "deep_mlp": lambda: MLP([8] * 5, 1, 4),
    "small_transformer": lambda: SmallTransformer(8, 2, 2, 0.0, 300, 6),
    "timm_resnet": lambda: Timm("resnet10t", 3, 32, {}),
    "convnext": lambda: Timm("convnext_atto", 3, 32, {"depths": [1, 1, 2, 1], "dims": [8, 8, 16, 16]}),
    "registers": lambda: Timm("vit_tiny_patch16_224", 3, 32, SMALL_VIT | {"reg_tokens": 2, "global_pool": "avg"}),
}


def decayed_groups(network, decay):
    """The groups of a whole network."""
    return decayed([{"params": list(network.parameters())}], network, decay)


# What makes each layer, the first first; the last entry is as deep as the classifier.
BY_HAND = {
    "resnet18": [("conv1.", "bn1."), *((f"layer{s}.{b}.",) for s in (1, 2, 3, 4) for b in (0, 1)), ()],
    "small_vit": [
        ("model.cls_token", "model.pos_embed", "model.patch_embed."),
        *((f"model.blocks.{b}.",) for b in range(4)),
        ("model.norm.",),
    ],
    "small_resnet": [("conv1.", "bn1."), ("layers.0.",), ("layers.1.",), ("layers.2.",), ()],
    "mlp": [("layers.0.", "layers.1."), ("layers.3.", "layers.4."), ()],
    "deep_mlp": [*((f"layers.{i}.", f"layers.{i + 1}.") for i in (0, 3, 6, 9, 12)), ()],  # layers.1 is not layers.10
    "small_transformer": [
        ("embedding.", "positions"),
        ("encoder.layers.0.",),
        ("encoder.layers.1.",),
        ("encoder.norm.",),
    ],
}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_scale_of_each_layer_is_the_one_calculated_by_hand(name):
    """lr_scale = decay^(L + 1 - depth): 0.5 to the tenth... for a ResNet-18's stem, 1 for a transformer's final norm."""
    network = NETWORKS[name]()
    names = {id(p): n for n, p in network.named_parameters()}
    actual = {names[id(p)]: g["lr_scale"] for g in decayed_groups(network, 0.5) for p in g["params"]}
    layers = BY_HAND[name]
    expected = {n: 0.5 ** (len(layers) - 1 - i) for i, p in enumerate(layers) for n in actual if n.startswith(p)}
    assert actual == expected
    first = {"resnet18": 0.5**9, "small_vit": 0.5**5, "small_resnet": 0.5**4, "mlp": 0.25, "small_transformer": 0.125}
    first |= {"deep_mlp": 0.5**5}
    assert min(actual.values()) == first[name]


def test_a_vision_transformers_depths_are_those_of_maes_code():
    """facebookresearch/mae, util/lr_decay.py, get_layer_id_for_vit."""

    def official(name, num_layers):
        if name in ["cls_token", "pos_embed"] or name.startswith("patch_embed"):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks") else num_layers

    depths, classifier = layer_depths(small_vit())
    assert classifier == 5
    assert depths == {name: official(name.removeprefix("model."), 5) for name in depths}


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_is_in_exactly_one_group(name, decay):
    network = NETWORKS[name]()
    grouped = [id(p) for group in decayed_groups(network, decay) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters())
    depths, classifier = layer_depths(network)
    assert set(depths.values()) - {classifier} == set(range(classifier))


def test_every_parameter_moves_by_its_layers_share():
    """One step of SGD with a decay against one without, from the same weights on the same batch."""
    moved = {}
    for decay in (1.0, 0.5):
        backbone = tiny_backbone()
        torch.manual_seed(1)
        settings = AS_IT_IS | {"layer_decay": decay, "classifier_lr_scale": 3.0 if decay < 1 else 1.0}
        method = Supervised(backbone, facts(), frozen=False, **settings).train()
        nn.init.normal_(method.classifier.weight)
        before = {name: p.detach().clone() for name, p in method.named_parameters()}
        groups = parameter_groups(method.parameter_groups(), 0.0, exclude_bias_and_norm=True)
        optimizer = torch.optim.SGD(groups, lr=1e-2)
        for group in optimizer.param_groups:
            group["lr"] *= group["lr_scale"]
        method(make_batch(views=1), {})["loss"].backward()
        optimizer.step()
        moved[decay] = {name: p.detach() - before[name] for name, p in method.named_parameters()}
    scales = {"backbone.network.conv1": 0.125, "backbone.network.bn1": 0.125, "classifier": 3.0}
    scales |= {"backbone.network.layers.0": 0.25, "backbone.network.layers.1": 0.5}
    for name, step in moved[0.5].items():
        scale = next(s for part, s in scales.items() if name.startswith(part))
        torch.testing.assert_close(step, scale * moved[1.0][name], rtol=1e-3, atol=1e-6)


def test_a_network_that_does_not_say_what_its_layers_are_is_trained_at_one_rate_only():
    network = nn.Linear(3, 2)
    assert decayed_groups(network, 1.0) == [{"params": [network.weight, network.bias]}]
    with pytest.raises(InputError, match=r"Linear does not say .*: optimizer\.layer_decay=1"):
        decayed_groups(network, 0.9)
    with torch.device("meta"):
        unknown = Timm("poolformer_s12", 3, 32, {})  # nor does timm
    with pytest.raises(InputError, match=r"^poolformer_s12 does not say"):
        decayed_groups(unknown, 0.9)


# --- Subsets ---


def test_a_subset_has_the_chosen_samples_and_a_hash_of_its_own():
    source, rows = digits("train", 8), torch.tensor([5, 700, 3])
    part = source.subset(rows)
    assert torch.equal(part.images, source.images[[5, 700, 3]])
    assert torch.equal(part.labels, source.labels[[5, 700, 3]])
    assert (len(part), part.classes, part.paths, part.labelled) == (3, source.classes, (), True)
    assert part.describe(1) == "digits train image 700"
    assert part.subset(torch.tensor([1])).describe(0) == "digits train image 700"
    hashes = {s.content_hash for s in (source, part, source.subset(rows.flip(0)), digits("test", 8).subset(rows[2:]))}
    assert len(hashes) == 4
    assert part.content_hash == source.subset(rows).content_hash


def test_a_subset_of_texts_has_their_tokens_and_files(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "words.txt").write_text(f"{name} quick brown fox jumps over the lazy dog. " * 20)
    source = text("train", str(tmp_path), 8, 300, None)
    part = source.subset(torch.tensor([len(source) - 1, 0]))
    assert torch.equal(part.tokens, source.tokens[[-1, 0]])
    assert part.paths == (source.paths[-1], source.paths[0])
    assert part.vocabulary == source.vocabulary


# --- Which network ---


def subject_of(method):
    preprocess = subjects.Preprocess(3, 8, 8, [0.5] * 3, [0.3] * 3)
    return subjects.method_subject("trained", method, preprocess, None, 1)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        *(("moco", ("backbone", "own")), ("byol", ("backbone", "own")), ("mae", ("backbone", "mean"))),
        *(("cpc", ("backbone", "own")), ("ibot", ("teacher", "own")), ("ijepa", ("teacher", "mean"))),
    ],
)
def test_network_and_pooling_are_those_of_the_methods_evaluations(name, chosen):
    method = built(name).method
    preprocess = subjects.Preprocess(1, SIDE, SIDE, [0.5], [0.3])
    subject = subjects.method_subject("trained", method, preprocess, None, 1)
    assert network_of(subject, None, None) == chosen
    assert network_of(subject, "backbone", "own") == ("backbone", "own")


def test_the_network_that_is_fine_tuned_is_the_one_chosen_and_takes_its_batch_as_one():
    method = moco(batchnorm_groups=3)
    assert any(isinstance(m, GroupedBatchNorm2d) for m in method.backbone.modules())
    subject = subject_of(method)
    settings = type("Settings", (), AS_IT_IS | {"network": "backbone"})
    source = digits("train", 8)
    tuned = build_network(subject, settings, source, facts(num_classes=10)).train()
    assert differences(tuned.backbone.state_dict(), method.backbone.state_dict()) == []
    assert tuned.pooled(torch.rand(5, 3, 8, 8)).shape == (5, 8)  # 5 do not divide by 3
    tuned.backbone.network.conv1.weight.data.zero_()
    assert method.backbone.network.conv1.weight.abs().min() > 0


def test_the_mean_over_patches_is_that_of_maes_features():
    from sslctl.models.backbones import Backbone

    backbone = Backbone(small_vit(), [0.3], [0.3])
    method = Supervised(backbone, facts(), frozen=False, **AS_IT_IS | {"pool": "mean"}).eval()
    images = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(method.pooled(images), backbone.tokens(images)[:, 1:].mean(1))
    assert list(method.features(images)) == ["mean"]


def test_the_teacher_is_fine_tuned_where_it_is_asked_for_with_its_own_learning_rates():
    method = built("ibot").method
    nn.init.normal_(method.teacher_backbone.network.model.cls_token)
    subject = subjects.method_subject("trained", method, subjects.Preprocess(1, SIDE, SIDE, [0.5], [0.3]), None, 1)
    options = {"pool": "own", "layer_decay": 0.5, "classifier_lr_scale": 3.0}
    for network, own in (("teacher", method.teacher_backbone), ("backbone", method.backbone)):
        settings = type("Settings", (), options | {"network": network})
        tuned = build_network(subject, settings, digits("train", SIDE), facts(num_classes=10)).train()
        assert differences(tuned.backbone.state_dict(), own.state_dict()) == []
        assert all(p.requires_grad for p in tuned.backbone.network.parameters())
        assert tuned.backbone.training
        scales = [group["lr_scale"] for group in tuned.parameter_groups()]
        assert (min(scales), max(scales)) == (0.5 ** layer_depths(tuned.backbone.network)[1], 3.0)


def task_of(source, **trainer):
    config = {"trainer": trainer, "network": None, "pool": None, "layer_decay": 0.65, "classifier_lr_scale": 10.0}
    config |= {"optimizer": {"base_lr": 1.0, "layer_decay": "${oc.select:layer_decay,1.0}"}}
    return Task(source, None, config=OmegaConf.create(config | {"least_steps": 7, "dataset": None}), dataset={}, seed=3)


@pytest.mark.parametrize(
    ("epochs", "batch_size", "expected"), [(1, 20, (4, 20)), (9, 20, (9, 20)), (1, 64, (7, 50)), (1, 7, (1, 7))]
)
def test_few_labels_get_batches_no_larger_than_they_are_and_enough_steps(epochs, batch_size, expected):
    source = digits("train", 8).subset(torch.arange(50))
    task = task_of(source, epochs=epochs, batch_size=batch_size)
    settings = settings_for(subject_of(moco()), task, source)
    assert (settings.trainer.epochs, settings.trainer.batch_size) == expected
    assert (settings.layer_decay, settings.classifier_lr_scale, settings.pool) == (0.65, 10.0, "own")
    assert task.config.trainer.epochs == epochs


def test_the_optimizers_layer_decay_is_fine_tunings_and_its_runs_keep_their_names():
    source = digits("train", 8).subset(torch.arange(50))
    task = task_of(source, epochs=1, batch_size=9)
    for decay in (0.65, 0.4):
        settings = settings_for(subject_of(moco()), task, source)
        assert settings.layer_decay == decay
        assert "layer_decay" not in settings.optimizer  # as in version 0.1, whose runs are continued
        task.config.optimizer.layer_decay = 0.4


def test_all_layers_learn_alike_from_scratch():
    source = digits("train", 8).subset(torch.arange(50))
    settings = settings_for(
        replace(subject_of(moco()), name="scratch"), task_of(source, epochs=1, batch_size=9), source
    )
    assert (settings.layer_decay, settings.classifier_lr_scale) == (1.0, 1.0)


def test_a_draw_of_labels_is_the_probes_draw_of_the_same_seed():
    source = digits("train", 8)
    task, rows = task_of(source), draw_labels(source.labels, 5, 3002)
    assert torch.equal(Finetune(5).draw_source(task, 2).images, source.images[rows])
    assert Finetune(None).draw_source(task, 0) is source


# --- The verb ---

TINY = (
    *("labels=5", "draws=2", "least_steps=6", "trainer.epochs=1", "trainer.batch_size=20", "trainer.threads=1"),
    *("trainer.device=cpu", "trainer.log_every_steps=1"),
)


@pytest.fixture(scope="module")
def _run(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("finished") / "run", *SIMCLR)


@pytest.fixture
def run(_run, tmp_path, capsys):
    """A finished run; a copy."""
    shutil.copytree(_run, tmp_path / "run", symlinks=True)
    capsys.readouterr()
    return tmp_path / "run"


def added(run, *words):
    """What the verb appends to a run's results, by subject."""
    before = len(read_lines(run / "results.jsonl"))
    assert main(["finetune", str(run), *words]) == 0
    return {r["subject"]: r for r in read_lines(run / "results.jsonl")[before:] if r["metric"] == "top1"}


def test_results_name_their_protocol_and_the_network_is_kept(run, capsys):
    actual = added(run, *TINY)
    printed = capsys.readouterr().out
    assert list(actual) == ["trained", "scratch"]
    assert actual["trained"]["params"] == actual["scratch"]["params"]
    assert len(list((run / "probes").iterdir())) == 4
    for name, record in actual.items():
        assert (record["protocol"], record["labels"], record["draws"]) == ("finetune", "5/class", 2)
        assert (record["dataset"], record["split"], record["epoch_rule"]) == ("digits", "test", "last of 3")
        details = record["details"]
        params = record["params"]
        assert (params["epochs"], details["steps"], params["batch_size"], params["layer_decay"]) == (3, 6, 20, 0.75)
        assert details["images_with_labels"] == 50
        assert details["layer_decay"] == (1.0 if name == "scratch" else pytest.approx(0.75, abs=0.25))
        values = []
        for draw, kept in enumerate(details["kept"]):
            assert kept in printed
            assert f"draw{draw}" in kept
            values.append(judged_anew(run, run.parent / kept))
        assert sum(values) / 2 == pytest.approx(record["value"])


def judged_anew(run, kept):
    """top1 on the test split of what a directory keeps."""
    assert not (kept / "checkpoints").exists()
    method = load_method(run)
    method.backbone.load_state_dict(checkpoint.load_tensors(kept / "backbone.safetensors"))
    classifier = checkpoint.load_tensors(kept / "classifier.safetensors")
    test = digits("test", 8)
    features = extract(method.backbone.eval(), test, torch.arange(len(test)), resize=8)
    return accuracy(features @ classifier["weight"].T + classifier["bias"], test.labels)["top1"]


def test_draws_are_those_of_the_linear_probe(run, monkeypatch):
    seen = []
    real = sslctl_finetune().train_classifier

    def spy(build, source, *rest):
        seen.append(source.original_rows)
        return real(build, source, *rest)

    monkeypatch.setattr(sslctl_finetune(), "train_classifier", spy)
    added(run, *TINY, "subjects=[scratch]")
    labels = digits("train", 8).labels
    assert seen == [tuple(draw_labels(labels, 5, draw).tolist()) for draw in (0, 1)]


def sslctl_finetune():
    import sslctl.evaluation.finetune

    return sslctl.evaluation.finetune


def test_training_changes_the_backbone_from_its_own_weights(run):
    added(run, *TINY, "subjects=[trained]", "draws=1", "optimizer.base_lr=1.0e-9", "optimizer.weight_decay=0")
    (kept,) = (run / "probes").iterdir()
    still, before = (checkpoint.load_tensors(d / "backbone.safetensors") for d in (kept, run))
    weights = [name for name in before if name.endswith("weight")]
    assert all(torch.allclose(still[name], before[name], atol=1e-5) for name in weights)
    added(run, *TINY, "subjects=[trained]", "draws=1")
    (other,) = (d for d in (run / "probes").iterdir() if d != kept)
    moved = checkpoint.load_tensors(other / "backbone.safetensors")
    assert not any(torch.equal(moved[name], before[name]) for name in weights)


def test_a_stopped_fine_tuning_goes_on_exactly(run, tmp_path):
    words = (*TINY, "subjects=[trained]", "draws=1", "classifier_lr_scale=2")
    straight = added(run, *words)["trained"]
    (work,) = (run / "probes").iterdir()
    work.rename(tmp_path / "straight")
    for stop in (1, 4):
        with signal_at(stop):
            assert main(["finetune", str(run), *words]) == 143
        assert newest(work).name == f"step-{stop}"
        assert not (work / "backbone.safetensors").exists()
    again = added(run, *words)["trained"]
    assert again["value"] == straight["value"]
    for name in ("backbone.safetensors", "classifier.safetensors"):
        assert differences(*(checkpoint.load_tensors(d / name) for d in (work, tmp_path / "straight"))) == []


def test_a_finished_fine_tuning_is_read_and_another_seed_is_another(run, capsys):
    words = (*TINY, "subjects=[trained]", "draws=1")
    first = added(run, *words)["trained"]
    before = contents(run / "probes")
    again = added(run, *words)["trained"]
    assert "already trained" in capsys.readouterr().out
    assert contents(run / "probes").keys() == before.keys()
    assert again["value"] == first["value"]
    added(run, *words, "seed=1")
    assert len(list((run / "probes").iterdir())) == 2


def test_all_labels_are_one_draw_and_shares_follow_the_classes(run, capsys):
    (record,) = added(run, *TINY, "labels=all", "subjects=[scratch]", "trainer.batch_size=500").values()
    assert record["labels"] == "all"
    assert record["details"]["images_with_labels"] == 1438
    assert "draws" not in record
    assert main(["finetune", str(run), *TINY, "labels=0.1", "plan_only=true"]) == 0
    assert "142 images" in capsys.readouterr().out


def test_the_plan_alone_trains_and_writes_nothing(run, capsys):
    before = contents(run)
    assert main(["finetune", str(run), *TINY, "plan_only=true"]) == 0
    printed = capsys.readouterr().out
    assert "6 = 3 epochs × 2 steps of 20 images" in printed
    assert "from scratch" in printed
    assert contents(run) == before


def test_given_weights_are_fine_tuned(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("backbone=small_resnet", "backbone.widths=[4,8]", "dataset=digits", "dataset.image_size=8", "draws=1")
    weights = f"backbone.weights={run / 'backbone.safetensors'}"
    assert main(["finetune", *TINY, *words, weights, "out=results.jsonl"]) == 0
    actual = [r for r in results(tmp_path / "results.jsonl") if r["metric"] == "top1"]
    assert [(r["subject"], r["params"]["network"]) for r in actual] == [("given", "backbone"), ("scratch", "backbone")]
    own = added(run, *TINY, "draws=1", "subjects=[trained]")["trained"]
    assert own["value"] == actual[0]["value"]


def test_texts_are_fine_tuned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, word in (("a", "quick brown fox "), ("b", "lazy sleeping dog ")):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "words.txt").write_text(word * 400)
    source = text("train", str(tmp_path / "texts"), 8, 300, None)
    network = TextPreprocess(source.vocabulary, 8, "").to_backbone(
        SmallTransformer(16, 1, 2, 0.0, source.vocabulary, 8)
    )
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    words = ("backbone=small_transformer", "backbone.embed_dim=16", "backbone.depth=1", "backbone.heads=2")
    words += ("backbone.weights=weights.safetensors", "dataset=text", f"dataset.root={tmp_path / 'texts'}")
    words += ("dataset.length=8", "dataset.vocabulary=300", "out=results.jsonl", "backbone.dropout=0.0")
    assert main(["finetune", *words, *TINY, "draws=1", "least_steps=30", "optimizer.base_lr=0.03"]) == 0
    actual = {r["subject"]: r["value"] for r in results(tmp_path / "results.jsonl")}
    assert actual["given"] > 0.9


# --- Bad input ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("labels=0",), "labels=0"),
        (("labels=5000",), "has only"),
        (("subjects=[pixels]",), "trained, given, scratch"),
        (("subjects=[]",), "trained, given, scratch"),
        (("pool=mean",), "vision transformer"),
        (("pool=max",), "pool=max"),
        (("network=teacher",), "SimCLR has no teacher"),
        (("layer_decay=0",), "layer_decay=0"),
        (("layer_decay=1.5",), "layer_decay=1.5"),
        (("classifier_lr_scale=0",), "classifier_lr_scale=0"),
        (("trainer.processes=2",), "one process"),
        (("dataset=digits", "dataset.image_size=12"), "dataset.image_size=8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_what_cannot_be_fine_tuned_is_refused(words, message, run, capsys):
    before = contents(run)
    assert main(["finetune", str(run), *TINY, *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert contents(run) == before


def test_a_run_on_unlabelled_images_says_what_is_missing(run, labelled_images, capsys):
    words = ("dataset=folder", f"dataset.root={labelled_images}", "dataset.image_size=8", "dataset.channels=1")
    assert main(["finetune", str(run), *TINY, *words]) == 2
    printed = capsys.readouterr().err
    assert "no labels" in printed
    assert "dataset=" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "ckpt=runs/latest"),
        (("backbone=small_resnet",), "dataset="),
        (("backbone=small_resnet", "dataset=digits"), "backbone.weights=FILE is missing"),
        (("backbone=small_resnet", "dataset=digits", "backbone.weights=none.pt"), "no such file"),
        (("backbone=small_resnet", "dataset=digits", "dataset.image_size=8", "WEIGHTS"), "backbone.partial=true"),
        (("backbone=small_resnet", "dataset=digits", "subjects=[scratch]", "network=teacher"), "network=teacher"),
    ],
    ids=["nothing", "no dataset", "no weights", "no file", "other weights", "teacher of a file"],
)
def test_given_weights_that_cannot_be_fine_tuned_are_refused(words, message, run, capsys):
    words = [word.replace("WEIGHTS", f"backbone.weights={run / 'backbone.safetensors'}") for word in words]
    assert main(["finetune", *words, *TINY]) == 2
    assert message in capsys.readouterr().err


# --- Learning ---


@pytest.mark.slow
def test_a_pretrained_network_learns_more_from_five_labels_a_class_than_one_from_scratch(tmp_path, capsys):
    """The mean of four draws of five labels a class of the digits."""
    run = finish(tmp_path / "run", *SIMCLR, "trainer.epochs=100", "backbone.widths=[8,16,32]")
    accuracies = added(run, *TINY, "draws=4", "least_steps=80", "trainer.batch_size=25")
    assert accuracies["trained"]["value"] - accuracies["scratch"]["value"] > 0.1
