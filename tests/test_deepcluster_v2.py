"""DeepCluster-v2: every image has a cluster, and clusters that a signal cuts short are the same afterwards."""

import os
import signal

import pytest
import torch

import sslctl.methods.deepcluster_v2
from sslctl.runs import checkpoint
from tests.methods import words_of
from tests.runs import differences, finish, metrics, pretrain, tensors

# --- What does not fit ---


def test_deepcluster_assigns_every_image_and_keeps_unit_centroids(tmp_path):
    run = finish(tmp_path / "run", *words_of("deepcluster_v2"))
    state = tensors(run)
    assert 0 <= state["method/assignments"].min() <= state["method/assignments"].max() < 20
    for name in ("memory", "centroids"):
        norms = state[f"method/{name}"].norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    memory, centroids = state["method/memory"], state["method/centroids"]
    fresh = pretrain(tmp_path / "first", *words_of("deepcluster_v2"), stop_after=1)
    assert fresh == 143
    first = tensors(tmp_path / "first")  # after one step all but that batch's rows are the clean images' embeddings
    same = (first["method/memory"][0] == first["method/memory"][1]).all(1).sum()
    assert same == len(memory[0]) - 256
    nearest = (first["method/centroids"][0] @ first["method/centroids"][0].T).argmax(1)
    assert torch.equal(nearest, torch.arange(20))  # a centroid is its own cluster's
    assert centroids.shape == (2, 20, 16)
    assert first["method/centroids"][0].mean(0).norm() < 0.9  # 0.997 where the first BatchNorms had seen no image


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_signal_while_the_clusters_are_made_is_heeded(epoch, run_of_method, tmp_path, monkeypatch):
    """Before the first step of an epoch; the clusters are made anew when the run goes on, and are the same."""
    real = sslctl.methods.deepcluster_v2.spherical_kmeans

    def kmeans(*args):
        if len(begun) == 2 * epoch:  # two heads
            os.kill(os.getpid(), signal.SIGTERM)
        begun.append(None)
        return real(*args)

    begun = []
    with monkeypatch.context() as patch:
        patch.setattr("sslctl.methods.deepcluster_v2.spherical_kmeans", kmeans)
        assert pretrain(tmp_path / "run", *words_of("deepcluster_v2")) == 143
    assert [path.name for path in checkpoint.steps_on_disk(tmp_path / "run")] == (["step-5"] if epoch else [])
    run = finish(tmp_path / "run", *words_of("deepcluster_v2"))
    assert differences(tensors(run), tensors(run_of_method("deepcluster_v2"))) == []
    assert metrics(run) == metrics(run_of_method("deepcluster_v2"))
