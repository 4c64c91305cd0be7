"""Steps of MoCo v1, v2 and v2+, with the settings of configs/method, beside steps written from the papers."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from sslctl.config.schema import CONFIGS
from sslctl.methods.moco import MoCo
from tests.steps.compare import (
    ROWS,
    TOTAL_STEPS,
    backbone,
    batch_of,
    begun,
    compare,
    disturbed,
    facts,
    of_projector_and_teacher,
    spread,
    unit,
    units,
)

# --- MoCo, arXiv:1911.05722, algorithm 1; v2: arXiv:2003.04297; v2+: arXiv:2011.10566, table 4 ---


def projector(layers, hidden):
    """v1: a Linear; v2: two, without BatchNorm."""
    if layers == 1:
        return nn.Sequential(nn.Linear(7, 5))
    return nn.Sequential(nn.Linear(7, hidden), nn.ReLU(), nn.Linear(hidden, 5))


def on_devices(network, images, devices):
    """Each device normalises its part of the images by its own statistics; of the running ones the mean is left."""
    before = [b.clone() for b in network.buffers()]
    outputs, after = [], []
    for part in images.chunk(devices):
        for buffer, value in zip(network.buffers(), before, strict=True):
            buffer.data = value.clone()  # autograd keeps the one before
        outputs.append(network(part))
        after.append([b.clone() for b in network.buffers()])
    for buffer, values in zip(network.buffers(), zip(*after, strict=True), strict=True):
        buffer.data = torch.stack(values).double().mean(0).to(buffer.dtype)
    return torch.cat(outputs)


def reference_moco(momentum, temperature, symmetric, devices):
    def keys(its, images, batch):
        """Shuffled among the devices and back (section 3.3); each image's key stands at its place."""
        order = batch.key.bits("moco/shuffle").argsort().tolist() if devices > 1 else range(ROWS)
        shuffled = torch.stack([images[i] for i in order])
        k = unit(its.teacher_projector(on_devices(its.teacher_backbone, shuffled, devices)))
        return torch.stack([k[[*order].index(i)] for i in range(ROWS)])

    def contrast(its, h, k, index):
        losses = []
        for q_i, k_i, image in zip(unit(its.projector(h)), k, index, strict=True):
            others = its.queue[its.queue_index != image]  # an image is no negative of its own
            logits = torch.cat([(q_i @ k_i)[None], others @ q_i]) / temperature
            losses.append(-torch.log_softmax(logits, 0)[0])  # eq. 1
        return sum(losses) / len(losses)

    def step(its, batch, step, update):
        x1, x2 = batch.views["global"]
        start, end = momentum
        m = end - (end - start) * (math.cos(math.pi * step / TOTAL_STEPS) + 1) / 2
        with torch.no_grad():
            for slow, fast in ((its.teacher_backbone, its.backbone), (its.teacher_projector, its.projector)):
                for theta_k, theta_q in zip(slow.parameters(), fast.parameters(), strict=True):
                    theta_k.copy_(m * theta_k + (1 - m) * theta_q)  # eq. 2
            k2 = keys(its, x2, batch)
            k1 = keys(its, x1, batch) if symmetric else None
        h1 = on_devices(its.backbone, x1, devices)
        loss, enqueued = contrast(its, h1, k2, batch.index), [*k2]
        if symmetric:
            loss = (loss + contrast(its, on_devices(its.backbone, x2, devices), k1, batch.index)) / 2
            enqueued += [*k1]
        update(loss)
        for number, key in enumerate(enqueued):
            place = int(its.queue_pointer)
            its.queue[place], its.queue_index[place] = key, batch.index[number % ROWS]
            its.queue_pointer.fill_((place + 1) % len(its.queue))
        return {"feature_std": spread(h1)}

    return step


CASES = {  # layers, momentum, temperature, symmetric: what the papers say
    "moco": (2, (0.999, 0.999), 0.2, False),
    "moco_v1": (1, (0.999, 0.999), 0.07, False),
    "moco_v2plus": (2, (0.99, 0.999), 0.2, True),
}


def settings_of(name):
    """What configs/method says, without a dataset's scale."""
    settings = OmegaConf.load(CONFIGS / "method" / f"{name}.yaml")
    while "moco" in settings.defaults:
        settings.defaults.remove("moco")
        settings = OmegaConf.merge(OmegaConf.load(CONFIGS / "method" / "moco.yaml"), settings)
    settings = OmegaConf.to_container(settings.method, resolve=True)
    return {key: value for key, value in settings.items() if key != "_target_"}


def middle_of_training(method, batches):
    """The queue is full of others' keys and some of the first batch's own, and its next place is near its end."""
    index = torch.arange(100, 117)
    index[[2, 9, 16]] = batches[0].index[[1, 4, 1]]
    index[5] = -1
    assert (method.queue_index == -1).all()  # no image's
    return disturbed(begun(method), queue=units(17, 5), queue_index=index, queue_pointer=torch.tensor(14))


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_moco_steps_as_its_paper(name, devices):
    layers, momentum, temperature, symmetric = CASES[name]
    settings = settings_of(name) | {"out_dim": 5, "queue_size": 17, "batchnorm_groups": devices}
    if name == "moco_v2plus" and devices == 3:
        settings |= {"hidden_dim": 9, "teacher_momentum": 0.5, "teacher_momentum_end": 0.8}
        momentum = 0.5, 0.8
    batches = [batch_of(step) for step in (11, 12)]
    method = middle_of_training(MoCo(backbone(), facts(), **settings), batches)
    networks = {"backbone": backbone, "projector": lambda: projector(layers, settings["hidden_dim"] or 7)}
    reference = reference_moco(momentum, temperature, symmetric, devices)
    ranks = 3 if devices == 3 else 2  # which hold whole groups, or share one
    compare(
        method, reference, batches, networks=networks, first_step=11, features=of_projector_and_teacher, ranks=ranks
    )
