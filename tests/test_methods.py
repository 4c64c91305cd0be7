"""What methods share: SimCLR and the supervised one by hand, queues, frozen prototypes, clipping."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sslctl.errors import InputError
from sslctl.factory.from_run import load_method
from sslctl.methods.base import clip_each_, embedding_std, enqueue, feature_std
from sslctl.methods.supervised import Supervised
from sslctl.models.heads import mlp
from tests.by_hand import (
    AS_IT_IS,
    facts,
    make_batch,
    moco,
    simclr,
    tiny_backbone,
)
from tests.methods import words_of
from tests.runs import finish, metrics, pretrain, tensors

# --- SimCLR ---


@pytest.mark.parametrize("make", [simclr, moco], ids=["simclr", "moco"])
@pytest.mark.parametrize("views", [1, 3])
def test_method_refuses_another_number_of_views(make, views):
    with pytest.raises(ValueError, match=f"two global views, the augmentation makes {views}"):
        make()(make_batch(views=views), {})


# --- Supervised ---


def test_supervised_without_labels_is_refused():
    with pytest.raises(InputError, match="needs labels"):
        Supervised(tiny_backbone(), facts(num_classes=0), frozen=False, **AS_IT_IS)


# --- Shared parts ---


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("norm", "last_norm"), [(False, ""), (True, ""), (True, "scale"), (True, "plain")])
def test_mlp_has_its_layers_in_order(layers, norm, last_norm):
    head = mlp(7, 11, 5, layers, norm=norm, last_norm=last_norm)
    linears = [module for module in head if isinstance(module, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == list(pairwise([7] + [11] * (layers - 1) + [5]))
    middle = ["Linear", "BatchNorm1d", "ReLU"] if norm else ["Linear", "ReLU"]
    end = ["Linear", "BatchNorm1d"] if last_norm else ["Linear"]
    assert [type(module).__name__ for module in head] == middle * (layers - 1) + end
    for linear, following in zip(head, [*list(head)[1:], None], strict=True):
        if isinstance(linear, nn.Linear):
            assert (linear.bias is None) == isinstance(following, nn.BatchNorm1d)
    assert head(torch.randn(4, 7)).shape == (4, 5)


def test_mlp_last_norm_scales_without_a_shift():
    norm = mlp(7, 11, 5, 2, norm=True, last_norm="scale")[-1]
    assert norm.weight.requires_grad
    assert not norm.bias.requires_grad
    assert torch.equal(norm.bias, torch.zeros(5))


def test_feature_std_is_one_when_spread_and_zero_when_collapsed():
    z = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    scales = torch.linspace(0.1, 10, 4096)[:, None]
    assert feature_std(z * scales).item() == pytest.approx(1.0, abs=0.02)
    assert feature_std(z[:1] * scales).item() == pytest.approx(0.0, abs=1e-5)
    assert feature_std(torch.cat([z[:, :16], torch.zeros(4096, 48)], 1)).item() == pytest.approx(0.5, abs=0.02)


def test_embedding_std_is_that_of_rows_as_they_are():
    z = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 6)
    assert embedding_std(z).item() == pytest.approx(z.numpy().std(0, ddof=1).mean(), rel=1e-5)
    assert embedding_std(z / 100).item() == pytest.approx(embedding_std(z).item() / 100, rel=1e-5)


# --- What does not fit ---


@pytest.mark.slow
def test_prototypes_stay_as_they_are_while_frozen(tmp_path):
    for name, weight in (("dino", "head.1.weight"), ("swav", "prototypes.weight"), ("dinov2", "heads.1.1.weight")):
        run = tmp_path / name
        assert pretrain(run, *words_of(name), stop_after=1) == 143
        frozen = tensors(run)[f"method/{weight}"]
        finish(run, *words_of(name), stops=(2,))
        start = load_method(run).state_dict()[weight]
        torch.testing.assert_close(frozen, start, atol=1e-6, rtol=0)
        assert not torch.allclose(tensors(run)[f"method/{weight}"], start, atol=1e-4)


def test_sgd_trains_prototypes_that_were_frozen(tmp_path):
    run = finish(tmp_path / "run", *words_of("swav"), "optimizer=sgd")  # torch's fused SGD would fail at the thaw
    assert metrics(run)[-1]["prototypes_frozen"] == 0


def test_simsiams_predictor_keeps_its_learning_rate(tmp_path):
    run = finish(tmp_path / "run", *words_of("simsiam"))
    groups = {key: value for key, value in tensors(run).items() if key.endswith("/lr")}
    assert sorted(groups.values())[-1] == pytest.approx(0.05)
    assert sorted(groups.values())[0] < 0.01


def test_a_queue_wraps_and_keeps_the_newest():
    queue, pointer = torch.zeros(5, 1), torch.tensor(3)
    enqueue(queue, pointer, torch.arange(1.0, 4.0)[:, None])
    assert queue[:, 0].tolist() == [3, 0, 0, 1, 2]
    assert pointer == 1
    enqueue(queue, pointer, torch.arange(10.0, 17.0)[:, None])
    assert sorted(queue[:, 0].tolist()) == [12, 13, 14, 15, 16]


def test_each_gradient_is_clipped_by_itself():
    small, large = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    small.grad, large.grad = torch.tensor([0.1, 0.0, 0.0]), torch.tensor([30.0, 40.0])
    clip_each_([small, large], 3.0)
    assert small.grad.norm() == pytest.approx(0.1)
    assert large.grad.norm() == pytest.approx(3.0)
