"""The numbers of a run, computed once from its configuration and its data, and printed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from sslctl import distributed
from sslctl.data.sources import Source
from sslctl.errors import InputError, say, shown
from sslctl.factory.from_config import unused_operations
from sslctl.methods.base import Facts, Method
from sslctl.models.backbones import Backbone, describe
from sslctl.models.preprocess import measures_statistics
from sslctl.ops.image_size import ImageSize, in_words
from sslctl.schedules import SHAPES, Schedule, cosine_between, fitted_warmup, scaled_lr
from sslctl.views import ViewMaker


@dataclass(frozen=True)
class Plan:
    """Everything derived: nothing here is written back to the configuration."""

    source: str  # which it is, and what it holds
    data_lines: list[str]  # what was inferred of it
    num_images: int
    channels: int
    image_size: ImageSize
    batch_size: int
    epochs: int
    steps_per_epoch: int
    total_steps: int
    lr: float  # at the schedule's factor 1
    lr_words: str
    schedule: Schedule
    weight_decay: tuple[float, float | None]  # at the first step and, where it changes, at the last
    dropped: tuple[str, ...]
    device: torch.device
    precision: str
    accumulate_steps: int
    processes: int
    compiled: bool
    recomputed: bool  # blocks, in the backward pass
    deterministic: bool
    channels_last: bool
    clip_grad_norm: float | None
    threads: int
    log_every_steps: int
    save_every_steps: int | None
    knn_every_steps: int | None

    def facts(self, num_classes: int) -> Facts:
        """Returns what a method may know of its data and its run."""
        return Facts(
            channels=self.channels,
            image_size=self.image_size,
            num_images=self.num_images,
            num_classes=num_classes,
            batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
        )

    def is_time(self, every: int | None, step: int) -> bool:
        """Tells whether something that happens every so many steps happens after `step` completed steps."""
        return bool(every) and step % every == 0

    def evaluates_online_after(self, step: int) -> bool:
        """Tells whether the online evaluation is due after `step` completed steps: as often as asked, and at the end."""
        return self.is_time(self.knn_every_steps, step) or (bool(self.knn_every_steps) and step == self.total_steps)

    def lines(self) -> list[str]:
        """Describes the plan, a line a subject."""
        schedule = self.schedule
        return [
            f"data       {self.source}",
            *(f"           {line}" for line in self.data_lines),
            f"steps      {self.total_steps:,} = {self.epochs} epochs × {self.steps_per_epoch} steps of {self.batch_size} images"
            + (f" ({self._left_out} images of each epoch's order left out)" if self._left_out else ""),
            f"lr         {self.lr_words}; {schedule.shape}, warm-up {schedule.warmup_steps} steps{self._shortened}",
            f"dropped    {', '.join(self.dropped) or 'no operation'}",
            f"precision  {self.precision} on {self.device}, {self.threads} threads"
            + (f" in each of {self.processes} processes with {self._each} images" if self.processes > 1 else "")
            + (", channels_last" if self.channels_last else "")
            + (", compiled" if self.compiled else "")
            + (", blocks calculated again in the backward pass" if self.recomputed else "")
            + (f", batches in {self.accumulate_steps} parts" if self.accumulate_steps > 1 else "")
            + ("" if self.device.type == "cpu" or self.deterministic else "; resume exact to rounding only"),
        ]

    def lr_at(self, step: int) -> float:
        """Returns the learning rate of a step."""
        return self.lr * self.schedule(step)

    def weight_decay_at(self, step: int) -> float:
        """Returns the weight decay of a step: along half a cosine where it has an end of its own (DINO, section 3.2)."""
        start, end = self.weight_decay
        return start if end is None else cosine_between(start, end, step, self.schedule.length)

    @property
    def _each(self) -> int:
        return self.batch_size // self.processes

    @property
    def _shortened(self) -> str:
        steps = self.schedule.asked_warmup
        if steps == self.schedule.warmup_steps:
            return ""
        return f", a tenth of the run, as the scheduler's {steps} would not end in it: scheduler.warmup_epochs chooses another"

    @property
    def _left_out(self) -> int:
        return self.num_images % self.batch_size


@dataclass(frozen=True)
class Run:
    """What is trained, on which images, by which views of them, and where it is kept."""

    plan: Plan
    method: Method
    source: Source
    views: ViewMaker
    run_dir: Path


def make_plan(config: Any, source: Source) -> Plan:
    """Raises InputError for what only the data shows: fewer images than a batch."""
    trainer = config.trainer
    steps_per_epoch = len(source) // trainer.batch_size
    if steps_per_epoch == 0:
        raise InputError(
            f"0 steps per epoch: {source.name} has {len(source)} images, trainer.batch_size={trainer.batch_size}"
            f" (incomplete batches are left out): trainer.batch_size={fitting_batch(len(source))}",
            advice=[f"trainer.batch_size={fitting_batch(len(source))}"],
        )
    total = trainer.epochs * steps_per_epoch
    scaling = config.optimizer.lr_scaling
    lr = scaled_lr(config.optimizer.base_lr, trainer.batch_size, scaling)
    factor = {"linear": f" × {trainer.batch_size}/256", "sqrt": f" × √({trainer.batch_size}/256)", "none": ""}
    every = trainer.save_every_steps
    if every is None and trainer.save_every_epochs is not None:
        every = max(1, round(trainer.save_every_epochs * steps_per_epoch))
    evaluation = config.get("evaluation")
    knn_every = evaluation.knn_every_epochs if evaluation else None
    return Plan(
        source=f"{source.name} ({source.split}): {source.summary()}",
        data_lines=source.data_lines(),
        num_images=len(source),
        channels=source.channels,
        image_size=source.image_size,
        batch_size=trainer.batch_size,
        epochs=trainer.epochs,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        lr=lr,
        lr_words=f"{lr:.4g} = base_lr {config.optimizer.base_lr:g}{factor[scaling]} ({scaling} scaling)",
        schedule=_schedule(config.scheduler, steps_per_epoch, total),
        weight_decay=(config.optimizer.weight_decay, config.optimizer.get("weight_decay_end")),
        dropped=unused_operations(config, source),
        device=choose_device(trainer.device),
        precision=trainer.precision,
        accumulate_steps=trainer.accumulate_steps,
        processes=distributed.world_size(),
        compiled=trainer.compile,
        recomputed=trainer.activation_checkpointing,
        deterministic=trainer.deterministic,
        channels_last=trainer.channels_last,
        clip_grad_norm=trainer.clip_grad_norm,
        threads=trainer.threads or distributed.default_threads(),
        log_every_steps=trainer.log_every_steps,
        save_every_steps=every,
        knn_every_steps=max(1, round(knn_every * steps_per_epoch)) if knn_every else None,
    )


def fitting_batch(images: int) -> int:
    """Suggests a batch size that so few images fill at least four times, where there are as many."""
    return max(1, 1 << max(0, (images // 4).bit_length() - 1))


def _schedule(scheduler: Any, steps_per_epoch: int, total: int) -> Schedule:
    """Converts every duration to steps, once: <name>_steps, else <name>_epochs, else <name>_share, of the run."""
    settings = OmegaConf.to_container(scheduler, resolve=True)
    shape = settings.pop("shape")
    if shape not in SHAPES:
        raise InputError(f"scheduler.shape={shape}: expected one of {', '.join(SHAPES)}")
    lengths = {"steps": 1, "epochs": steps_per_epoch, "share": total}
    names = sorted({k.rsplit("_", 1)[0] for k in settings if k.endswith(("_epochs", "_steps"))})
    durations = {name: _in_steps(settings, name, lengths) for name in names}
    warmup = durations.pop("warmup") or 0
    for name, steps in durations.items():
        if steps is None or steps == 0:
            shares = f", scheduler.{name}_share" if name == "milestones" else ""
            raise InputError(f"scheduler.{name}_epochs{shares} or scheduler.{name}_steps must be set, and more than 0")
    stretch = settings.pop("stretch", 1.0)
    if stretch < 1:
        raise InputError(f"scheduler.stretch={stretch:g}: expected 1 or more")
    return Schedule(shape, total, fitted_warmup(warmup, total), settings | durations, stretch, warmup)


def _in_steps(settings: dict, name: str, lengths: dict[str, int]) -> int | list[int] | None:
    """Takes a duration out of a scheduler's settings: the first that is given in a unit of these lengths in steps."""
    durations = {unit: settings.pop(f"{name}_{unit}", None) for unit in lengths}
    unit, value = next(((unit, value) for unit, value in durations.items() if value is not None), ("steps", None))
    if value is None:
        return None
    many = isinstance(value, list)
    if many != (name == "milestones"):
        raise InputError(f"scheduler.{name}_{unit}={value}: expected {'a number' if many else 'a list, [a,b]'}")
    if unit == "share" and not all(0 < part < 1 for part in value):
        raise InputError(f"scheduler.{name}_share={value}: expected parts of the run, between 0 and 1")
    return [round(v * lengths[unit]) for v in value] if many else round(value * lengths[unit])


def choose_device(name: str) -> torch.device:
    """Returns a device by its name; auto is CUDA, then MPS, then the CPU. Raises InputError for one that is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if there[d])
    if not there[name]:
        others = [device for device, yes in there.items() if yes]
        raise InputError(
            f"trainer.device={name}: none here; there is {', '.join(others)}", advice=[f"trainer.device={others[0]}"]
        )
    return torch.device(name)


def _normalisation(backbone: Backbone) -> str:
    """Says by which mean and std of the training images channels are normalised, the first few of them."""
    mean, std = (
        ", ".join(f"{v:.3g}" for v in values.flatten()[:4].tolist()) + (", …" if values.numel() > 4 else "")
        for values in (backbone.mean, backbone.std)
    )
    return f"normalise  by mean {mean} and std {std}, measured on training images: dataset.mean=[…] dataset.std=[…]"


def print_plan(
    config: Any,
    run: Run,
    warnings: list[str],
    notes: list[str],
    normalization: str | None = None,
    adaptation: list[str] | None = None,
) -> None:
    """Prints what will be trained, on what and where, before anything happens.

    warnings: of the data; notes: of other runs. normalization: whose mean and std are taken, of a run that starts from weights;
    adaptation: how its network goes on learning.
    """
    method, source, names = run.method, run.source, config.names
    backbone = method.backbone
    count = sum(p.numel() for p in backbone.parameters())
    network = f"timm {config.backbone.model}" if names.backbone == "timm" else names.backbone
    sizes = ", ".join(f"{count} {group} of {in_words(size)} px" for group, (count, size) in run.views.sizes().items())
    state = f"{run.run_dir} (exists)" if run.run_dir.exists() else run.run_dir
    lines = [
        *run.plan.lines(),
        *([_normalisation(backbone)] if measures_statistics(config.dataset, source) else []),
        *([f"scale      {names.scale}: {len(source):,} samples; scale=… chooses another"] if names.scale else []),
        f"backbone   {network}: {count / 1e6:.2f} M parameters, {backbone.embed_dim} features,"
        f" stem {describe(backbone.network)}",
        *(adaptation or []),
        *([f"input      {normalization}"] if normalization else []),
        f"method     {names.method}; {source.modality.augmentation.format(sizes)}",
        f"run        {state}",
        *(f"note       {shown(note)}" for note in (*method.notes(), *notes)),
        *(f"warning    {shown(warning)}" for warning in warnings),
    ]
    say(*lines)
