"""DIET beside its author's code, and distillation of features beside LightlyTrain's, whose classes are executed one by one."""

import ast
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from parity_harness import Comparison, Side, Sides, copy_weights
from parity_networks import (
    MEAN,
    ROWS,
    SIDE,
    STD,
    Encoder,
    batch,
    convolutional,
    descend,
    facts,
    leave_out,
    optimizer_of,
    ours,
    settings,
    trainable,
    transformer,
)
from parity_official import Official, absent
from torch import Tensor, nn
from torch.nn import functional as F

from sslctl.methods.diet import DIET
from sslctl.methods.distill import Distill
from sslctl.models.preprocess import Preprocess
from sslctl.models.teacher import Teacher

LR, DECAY = 0.02, 1e-2
METHODS = Path("src") / "lightly_train" / "_methods"


def diet(official: Official) -> Sides:
    method = DIET(convolutional(), facts(), label_smoothing=0.8, unit_features=False, head_epochs=0.0).double()
    trainer = SimpleNamespace(Trainer=nn.Module)  # of a package that is not public, as are their loaders
    script = official.load("noise-robust-vit", "examples.simpler_randomlabel", {"omega": trainer, **absent("submitit")})
    theirs = script.Model()
    theirs.args = settings(supervised=False, clip=False, label_smoothing=0.8)
    theirs.model, theirs.extra_classifier = Encoder(convolutional()), nn.Linear(12, 64)
    theirs.index_to_class, theirs.classifier, theirs.train_loss = torch.arange(64), nn.Linear(12, 4), MagicMock()
    leave_out(theirs.extra_classifier.bias, *theirs.classifier.parameters())  # their probe's loss is ln 4 then
    trained, parts = [method.backbone, method.classifier.weight], [theirs.model, theirs.extra_classifier.weight]
    copy_weights(trained, parts)
    optimizer = torch.optim.SGD(trainable(theirs), lr=LR, momentum=0.9, weight_decay=DECAY)

    def step(number: int) -> Tensor:
        data = batch(number)
        theirs.data = data.views["global"][0], torch.stack([data.label, data.index], 1)
        return descend(optimizer, theirs.compute_loss() - math.log(4))

    own = optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False)
    return ours(method, own, batch, trained), Side(step, parts)


# --- LightlyTrain ---


def classes_of(path: Path, **bases: type) -> dict[str, Any]:
    """Executes the classes of a file whose imports are not there, each by itself, on these bases; others are left out."""
    scope = {"torch": torch, "F": F, "Tensor": Tensor, "TrainingStepResult": SimpleNamespace, **vars(nn), **bases}
    scope["init"] = nn.init
    tree = ast.parse(path.read_text())
    future = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and all(getattr(base, "id", None) in scope for base in node.bases):
            exec(compile(ast.Module([*future, node], []), str(path), "exec"), scope)
    return scope


def distilled(official: Official, version: str, of_patches: bool) -> Sides:
    frozen = Teacher(transformer(), {}, Preprocess(3, SIDE, SIDE, MEAN, STD))
    method = Distill(
        convolutional(), facts(), teacher=frozen, loss="queue", weight=float(not of_patches), patch_loss="mse",
        patch_weight=float(of_patches), queue_size=4 * ROWS, temperature=0.07, head_layers=1, hidden_dim=1,
    ).double()  # fmt: skip
    folder = official.folder("lightly-train") / METHODS / version.lower()
    code = classes_of(folder / f"{version.lower()}.py", Method=nn.Module)
    losses = classes_of(folder / f"{version.lower()}_loss.py")
    theirs, backbone = code[version].__new__(code[version]), convolutional()
    nn.Module.__init__(theirs)
    theirs._mixup_data = lambda images: images
    if of_patches:
        theirs.method_args = settings(n_teacher_blocks=1)
        layers = lambda images, n, reshape: [frozen.with_map(images)[1]]  # noqa: E731
        theirs.teacher_embedding_model = settings(get_intermediate_layers=layers)
        theirs.student_embedding_model = lambda images, pool: backbone.with_map(images)[1]
        theirs.student_projection_head = code["DistillationV2Head"](12, 16, 1, 1)
        theirs.criterion = losses["DistillationV2Loss"]()
        head = method.patch_projector
    else:
        theirs.teacher_embedding_model, theirs.student_embedding_model = frozen, backbone
        theirs.flatten, theirs.student_projection_head = nn.Flatten(1), nn.Linear(12, 16)
        theirs.criterion = losses["DistillationLoss"](temperature=0.07)
        theirs.register_buffer("teacher_queue", newest_first(method))
        head = method.projector
    trained, parts = [method.backbone, head], [backbone, theirs.student_projection_head]
    copy_weights(trained, parts)
    optimizer = torch.optim.SGD(trainable(*parts), lr=LR, momentum=0.9, weight_decay=DECAY)
    own = ours(
        method, optimizer_of(method, "sgd", lr=LR, weight_decay=DECAY, exclude=False), batch, trained,
        state=lambda: {} if of_patches else {"queue": newest_first(method)},
    )  # fmt: skip
    other = Side(
        lambda number: descend(optimizer, theirs.training_step_impl({"views": batch(number).views["global"]}, number).loss),
        parts, state=lambda: {} if of_patches else {"queue": theirs.teacher_queue},
    )  # fmt: skip
    return own, other


def newest_first(method: Distill) -> Tensor:
    """Our ring of batches in the order of their queue, which is shifted."""
    blocks = method.queue.view(-1, ROWS, method.queue.shape[1])
    newest = int(method.queue_pointer) // ROWS - 1
    return torch.cat([blocks[newest - age] for age in range(len(blocks))])


FEATURES = [
    Comparison(
        "DIET", "noise-robust-vit", "`simpler_randomlabel.Model.compute_loss`", diet,
        remark="without the bias of their classifier, which the paper does not have; SGD",
    ),
    Comparison(
        "Distillation, queue", "lightly-train", "`Distillation.training_step_impl`, `DistillationLoss`",
        partial(distilled, version="Distillation", of_patches=False), 6, remark="images are not mixed; SGD",
    ),
    Comparison(
        "Distillation, patches", "lightly-train", "`DistillationV2.training_step_impl`, `DistillationV2Head`",
        partial(distilled, version="DistillationV2", of_patches=True),
        remark="one block of the teacher; images are not mixed; SGD",
    ),
]  # fmt: skip
