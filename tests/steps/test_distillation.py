"""Steps of SEED, CompRess and distillation beside steps written from their papers, and of learning from labels and indices."""

import pytest
import torch
from torch import nn

from sslctl.methods.compress import CompRess
from sslctl.methods.diet import DIET
from sslctl.methods.distill import Distill
from sslctl.methods.seed import SEED
from sslctl.methods.supervised import Supervised
from sslctl.models.preprocess import Preprocess
from sslctl.models.teacher import Teacher
from tests.steps.compare import (
    CHANNELS,
    CLASSES,
    IMAGES,
    ROWS,
    SIDE,
    backbone,
    batch_of,
    begun,
    compare,
    disturbed,
    facts,
    rate_at,
    spread,
    transformer,
    unit,
    units,
)


def a_teacher(width):
    """A frozen network in evaluation, with statistics of BatchNorm unlike a batch's."""
    network = backbone((5, width), seed=3)
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer += torch.rand(buffer.shape)
    return Teacher(network, {}, Preprocess(CHANNELS, SIDE, SIDE, [0.5] * CHANNELS, [0.3] * CHANNELS))


def write(memory, pointer, rows):
    """A row after the other from the pointer on; returns where the next one goes."""
    place = int(pointer)
    for row in rows:
        memory[place] = row
        place = (place + 1) % len(memory)
    return place


# --- SEED, arXiv:2101.04731, section 3.2 ---


def reference_seed(its, batch, step, update):
    x = batch.views["global"][0]
    h, t = its.backbone(x), unit(its.teacher(x)).detach()
    z = unit(its.projector(h))
    losses = []
    for student, teacher in zip(z, t, strict=True):
        bank = torch.cat([teacher[None], its.queue])  # the teacher's own embedding is part of it
        p_teacher = torch.softmax(bank @ teacher / 0.1, 0)  # eq. 3
        p_student = torch.softmax(bank @ student / 0.3, 0)  # eq. 4
        losses.append(-(p_teacher * p_student.log()).sum())  # eq. 5
    update(sum(losses) / ROWS)
    its.queue_pointer.fill_(write(its.queue, its.queue_pointer, t))
    return {"feature_std": spread(h), "agreement": (z.detach() * t).sum(1).mean()}


def test_seed_steps_as_its_paper():
    settings = {"queue_size": 10, "student_temperature": 0.3, "teacher_temperature": 0.1}
    method = SEED(backbone(), facts(), teacher=a_teacher(9), **settings)
    disturbed(begun(method), queue=units(10, 9), queue_pointer=torch.tensor(7))

    def features(its, x):
        h = its.backbone(x)
        return {"backbone": h, "projector": its.projector(h), "teacher": its.teacher(x)}

    networks = {"backbone": backbone, "projector": lambda: nn.Sequential(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 9))}
    batches = [batch_of(step, views=views) for step, views in ((0, 1), (1, 2))]
    compare(method, reference_seed, batches, networks=networks, features=features)


# --- CompRess, arXiv:2010.14713, section 3 ---


@pytest.mark.parametrize("variant", ["1q", "2q"])
def test_compress_steps_as_its_paper(variant):
    def reference(its, batch, step, update):
        x = batch.views["global"][0]
        h, t = its.backbone(x), unit(its.teacher(x)).detach()
        own = its.teacher_memory if variant == "1q" else its.student_memory
        p = torch.softmax(t @ its.teacher_memory.T / 0.2, 1)  # eq. 1
        q = torch.softmax(unit(h) @ own.T / 0.2, 1)
        key = None if variant == "1q" else unit(its.key_backbone(x)).detach()  # of the slow student, as it was
        update((p * (p / q).log()).sum() / ROWS)  # eq. 2
        place = write(its.teacher_memory, its.memory_pointer, t)
        if variant == "2q":
            assert write(its.student_memory, its.memory_pointer, key) == place
            with torch.no_grad():
                for slow, fast in zip(its.key_backbone.parameters(), its.backbone.parameters(), strict=True):
                    slow.copy_(0.8 * slow + 0.2 * fast)
        its.memory_pointer.fill_(place)
        return {"feature_std": spread(h)}

    width = 7 if variant == "1q" else 9  # of the teacher; the student's is 7
    settings = {"variant": variant, "memory_size": 10, "temperature": 0.2, "key_momentum": 0.8}
    method = CompRess(backbone(), facts(), teacher=a_teacher(width), **settings)
    memories = {"teacher_memory": units(10, width, seed=1), "student_memory": units(10, 7, seed=2)}
    memories = {name: rows for name, rows in memories.items() if hasattr(method, name)}
    disturbed(begun(method), memory_pointer=torch.tensor(7), **memories)
    batches = [batch_of(step, views=views) for step, views in ((0, 1), (1, 2))]
    compare(
        method,
        reference,
        batches,
        networks={"backbone": backbone},
        features=lambda its, x: {"backbone": its.backbone(x), "teacher": its.teacher(x)},
    )


# --- Distillation of features ---


def transformers_teacher():
    """A frozen vision transformer of 2×2 patches, whose features are wider than the student's."""
    return Teacher(transformer(seed=3), {}, Preprocess(CHANNELS, SIDE, SIDE, [0.5] * CHANNELS, [0.3] * CHANNELS))


def tokens_of(body, x):
    return body.network.model.forward_features((x - body.mean) / body.std)  # (B, 1 + 4, 8), the class token first


def resampled(places, side):
    """(B, D, s, s) -> (B, D, side, side): of each new place, from its centre to the four nearest old ones."""
    size = places.shape[-1]
    where = ((torch.arange(side, dtype=places.dtype) + 0.5) * size / side - 0.5).clamp(0, size - 1)
    weights = torch.zeros(side, size, dtype=places.dtype)
    for row, position in enumerate(where.tolist()):
        low = int(position)
        weights[row, low] += 1 - (position - low)
        if position > low:
            weights[row, low + 1] += position - low
    return torch.einsum("ya,bdac,xc->bdyx", weights, places, weights)


def reference_distill(loss, patch_loss):
    def distance(kind, student, teacher):  # (n, D) each
        if kind == "mse":
            return sum(((a - b) ** 2).sum() for a, b in zip(student, teacher, strict=True)) / student.numel()
        return sum(1 - unit(a) @ unit(b) for a, b in zip(student, teacher, strict=True)) / len(student)

    def step(its, batch, step, update):
        x = batch.views["global"][0]
        places = its.backbone.network.feature_map((x - its.backbone.mean) / its.backbone.std)  # (B, 7, 4, 4)
        h, tokens = places.sum((2, 3)) / 16, tokens_of(its.teacher, x).detach()
        t, figures = tokens[:, 0], {"feature_std": spread(h)}
        total = 0.0
        if loss:
            z = its.projector(h)
            if loss == "queue":
                place = write(bank := its.queue.clone(), its.queue_pointer, unit(t))
                p, q = (torch.softmax(unit(rows) @ bank.T / 0.3, 1) for rows in (t, z))
                total = total + 0.7 * (p * (p / q).log()).sum() / ROWS
            else:
                total = total + 0.7 * distance(loss, z, t)
            figures["agreement"] = (unit(z.detach()) * unit(t)).sum(1).mean()
        if patch_loss:
            moved = torch.einsum("oi,bihw->bohw", its.patch_projector[0].weight, places)
            moved = resampled(moved + its.patch_projector[0].bias[:, None, None], 2)  # (B, 8, 2, 2)
            rows, targets = moved.flatten(2).transpose(1, 2).flatten(0, 1), tokens[:, 1:].flatten(0, 1)
            total = total + 1.5 * distance(patch_loss, rows, targets)
            figures["patch_agreement"] = (unit(rows.detach()) * unit(targets)).sum(1).mean()
        update(total)
        if loss == "queue":
            its.queue.copy_(bank)
            its.queue_pointer.fill_(place)
        return figures

    return step


DISTILLED = {
    "weight": 0.7,
    "patch_weight": 1.5,
    "queue_size": 10,
    "temperature": 0.3,
    "head_layers": 1,
    "hidden_dim": 5,
}


@pytest.mark.parametrize(
    ("loss", "patch_loss"),
    [("queue", "cosine"), ("cosine", "mse"), ("mse", None), ("queue", None), (None, "cosine")],
)
def test_distillation_steps_on_pooled_features_and_on_those_of_patches(loss, patch_loss):
    settings = DISTILLED | ({} if loss else {"weight": 0.0}) | ({} if patch_loss else {"patch_weight": 0.0})
    forms = {"loss": loss or "queue", "patch_loss": patch_loss or "mse"}
    method = Distill(backbone(), facts(), teacher=transformers_teacher(), **forms, **settings)
    state = {"queue": units(10, 8), "queue_pointer": torch.tensor(7)} if loss == "queue" else {}
    disturbed(begun(method), **state)
    assert (method.batch_coupling is None) == (loss != "queue")

    def features(its, x):
        h = its.backbone(x)
        projected = {"projector": its.projector(h)} if loss else {}
        return {"backbone": h, **projected, "teacher": tokens_of(its.teacher, x)[:, 0]}

    networks = {"projector": lambda: nn.Sequential(nn.Linear(7, 8))} if loss else {}
    networks |= {"patch_projector": lambda: nn.Sequential(nn.Linear(7, 8))} if patch_loss else {}
    batches = [batch_of(step, views=views) for step, views in ((0, 1), (1, 2))]
    compare(method, reference_distill(loss, patch_loss), batches, networks=networks, features=features)


# --- DIET, arXiv:2302.10260, algorithm 1 ---


def reference_diet(smoothing, unit_features, frozen):
    def step(its, batch, step, update):
        x = batch.views["global"][0]
        with torch.set_grad_enabled(not frozen(step)):
            h = its.backbone.train(not frozen(step))(x)
        logits = (unit(h) if unit_features else h) @ its.classifier.weight.T  # (B, N)
        losses = []
        for row, own in zip(logits, batch.index.tolist(), strict=True):
            target = torch.full((IMAGES,), smoothing / IMAGES)
            target[own] += 1 - smoothing
            losses.append(-(target * torch.log_softmax(row, 0)).sum())
        update(sum(losses) / ROWS)
        right = [int(row.argmax()) == own for row, own in zip(logits, batch.index.tolist(), strict=True)]
        figures = {"feature_std": spread(h), "top1": sum(right) / ROWS}
        return figures

    return step


@pytest.mark.parametrize(("smoothing", "unit_features", "head_epochs"), [(0.8, False, 0.0), (0.3, True, 0.1)])
def test_diet_steps_on_the_smoothed_cross_entropy_of_the_images_own_numbers(smoothing, unit_features, head_epochs):
    settings = {"label_smoothing": smoothing, "unit_features": unit_features, "head_epochs": head_epochs}
    method = disturbed(DIET(backbone(), facts(), **settings))
    networks = {"backbone": backbone, "classifier": lambda: nn.Linear(7, IMAGES, bias=False)}
    reference = reference_diet(smoothing, unit_features, lambda step: bool(head_epochs) and step == 0)
    batches = [batch_of(step, views=views) for step, views in ((0, 1), (1, 2))]
    with torch.no_grad():  # features are 0 or more: all are taken for the first image, which is right once
        method.classifier.weight[batches[0].index[0]] = 3.0
    compare(method, reference, batches, networks=networks, features=lambda its, x: {"backbone": its.backbone(x)})


# --- Labels ---


def reference_supervised(pooled, rates):
    def step(its, batch, step, update):
        h = pooled(its, batch.views["global"][0])
        logits = its.classifier(h)
        update(
            -sum(torch.log_softmax(row, 0)[y] for row, y in zip(logits, batch.label, strict=True)) / ROWS,
            rates=rates(step),
        )
        right = [int(row.argmax()) == int(y) for row, y in zip(logits, batch.label, strict=True)]
        return {"feature_std": spread(h), "top1": sum(right) / ROWS}

    return step


def classifier(method):
    """Starts at small weights; for the comparison ones that tell its logits apart."""
    assert 0 < method.classifier.weight.abs().max() < 0.1
    assert not method.classifier.bias.any()
    return disturbed(method)


def own_rates(step):
    """Of the layers of a small ResNet: the stem, two blocks, and a classifier at its own multiple."""
    shares = {"backbone.network.conv1": 0.125, "backbone.network.bn1": 0.125}
    shares |= {"backbone.network.layers.0": 0.25, "backbone.network.layers.1": 0.5, "classifier": 3.0}
    return {name: share * rate_at(step) for name, share in shares.items()}


def test_supervised_steps_on_the_cross_entropy_of_the_first_view():
    settings = {"frozen": False, "pool": "own", "layer_decay": 0.5, "classifier_lr_scale": 3.0}
    method = classifier(Supervised(backbone(), facts(), **settings))
    networks = {"backbone": backbone, "classifier": lambda: nn.Linear(7, CLASSES)}
    reference = reference_supervised(lambda its, x: its.backbone(x), own_rates)
    batches = [batch_of(step, views=views) for step, views in ((0, 1), (1, 2))]
    compare(method, reference, batches, networks=networks, features=lambda its, x: {"backbone": its.backbone(x)})


def test_supervised_linear_probe_steps_on_a_backbone_in_evaluation():
    """No gradient and no statistics of the batch reach it."""
    settings = {"frozen": True, "pool": "own", "layer_decay": 1.0, "classifier_lr_scale": 1.0}
    method = classifier(Supervised(backbone(), facts(), **settings))

    networks = {"backbone": lambda: backbone().requires_grad_(False), "classifier": lambda: nn.Linear(7, CLASSES)}
    reference = reference_supervised(lambda its, x: its.backbone.eval()(x), lambda step: {})
    batches = [batch_of(step, views=1) for step in (0, 1)]
    compare(method, reference, batches, networks=networks, features=lambda its, x: {"backbone": its.backbone(x)})


@pytest.mark.parametrize("frozen", [False, True])
def test_supervised_steps_on_the_mean_over_a_vision_transformers_patches(frozen):
    def pooled(its, x):
        body = its.backbone
        tokens = body.network.model.forward_features((x - body.mean) / body.std)  # (B, 1 + 4, D), the class token first
        return tokens[:, 1:].sum(1) / 4

    settings = {"frozen": frozen, "pool": "mean", "layer_decay": 1.0, "classifier_lr_scale": 3.0}
    method = classifier(Supervised(transformer(), facts(), **settings))
    networks = {"backbone": lambda: transformer().requires_grad_(not frozen)}
    reference = reference_supervised(pooled, lambda step: {"classifier": 3.0 * rate_at(step)})
    batches = [batch_of(step, views=1) for step in (0, 1)]
    compare(method, reference, batches, networks=networks, features=lambda its, x: {"mean": pooled(its, x)})
