"""Times `sslctl pretrain` against a bare loop: python scripts/bench_pretrain.py --root DIR [--method simclr --lightly]

DIR holds train/<class>/*.jpg of 32×32 (CIFAR-10). sslctl runs as a user runs it, with its views, log, checks and
TensorBoard, and saves once at the end. The bare loop trains the same networks on random views that lie ready in memory,
with no logging and no checks. lightly's loop is that of its documentation with two loader processes. Each runs in a process
of its own, in turn; images/s, median of the rounds, after 20 steps of warm-up.
"""

import argparse
import copy
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_checkpoint import environment, run_sslctl, seconds_and_images
from bench_views import table
from torch import Tensor, nn

from sslctl.models.backbones import Backbone, ResNet, SmallResNet
from sslctl.models.heads import mlp

WARMUP, QUEUE, DIM = 20, 4096, 128
BATCH_SIZES = {"small_resnet": 64, "resnet18": 16}  # for a CPU


def ours(args: argparse.Namespace, root: Path) -> float:
    """Images/s of `sslctl pretrain`."""
    own = {"moco": ["method.batchnorm_groups=1"], "simclr": ["augmentation.global.jitter.strength=0.5"]}[args.method]
    steps = WARMUP + args.steps
    with tempfile.TemporaryDirectory() as place:
        records = run_sslctl(
            Path(place) / "run",
            args.threads,
            *(f"method={args.method}", f"backbone={args.backbone}", "dataset=cifar10", "optimizer=sgd"),
            *(f"dataset.root={root}", f"trainer.batch_size={args.batch_size}", "trainer.save_every_epochs=null"),
            *(f"trainer.epochs={-(-steps * args.batch_size // images_in(root))}", "scheduler.warmup_epochs=0", *own),
        )
    seconds, images = seconds_and_images(records, WARMUP, steps, args.batch_size)
    return images / seconds


# --- Bare loops: the losses of one step after another ---


def moco_losses(student: nn.Module, views: Iterable[Tensor]) -> Iterator[Tensor]:
    """MoCo v2: EMA teacher, queue, InfoNCE."""
    teacher, place = copy.deepcopy(student).requires_grad_(False), 0
    queue = F.normalize(torch.randn(QUEUE, DIM), dim=1)
    for x1, x2 in views:
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.01)
            keys = F.normalize(teacher(x2), dim=1)
        query = F.normalize(student(x1), dim=1)
        logits = torch.cat([(query * keys).sum(1, keepdim=True), query @ queue.T], 1) / 0.2
        yield F.cross_entropy(logits, torch.zeros(len(x1), dtype=torch.long))
        queue[place : place + len(keys)] = keys
        place = (place + len(keys)) % QUEUE


def simclr_losses(student: nn.Module, views: Iterable[Tensor]) -> Iterator[Tensor]:
    """SimCLR: both views in one forward, NT-Xent."""
    for pair in views:
        z = F.normalize(student(pair.flatten(0, 1)), dim=1)
        logits = (z @ z.T / 0.5).fill_diagonal_(float("-inf"))
        yield F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def lightly_losses(student: nn.Module, root: Path, batch_size: int) -> Iterator[Tensor]:
    """lightly's views, loader and loss; the backbone normalises."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=32, cj_strength=0.5, gaussian_blur=0.0, normalize=None)
    dataset, criterion = LightlyDataset(str(root / "train"), transform=transform), NTXentLoss(temperature=0.5)
    settings = {"shuffle": True, "drop_last": True, "num_workers": 2, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(dataset, batch_size, **settings)
    for (x1, x2), _, _ in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield criterion(student(x1), student(x2))


def build_student(method: str, backbone: str, *, lightly: bool) -> nn.Module:
    """sslctl's backbone with its normalisation, and the method's projector (lightly's own for lightly)."""
    net = (
        SmallResNet([64, 128, 256], 1, 0, "batch", 3, 32)
        if backbone == "small_resnet"
        else ResNet(18, "auto", True, "batch", 3, 32)
    )
    if lightly:
        from lightly.models.modules import SimCLRProjectionHead

        head = SimCLRProjectionHead(net.embed_dim, net.embed_dim, DIM)
    else:
        norm = method == "simclr"
        head = mlp(net.embed_dim, net.embed_dim, DIM, 2, norm=norm, last_norm="scale" if norm else "")
    return nn.Sequential(Backbone(net, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]), head)


def time_loop(args: argparse.Namespace) -> float:
    """Images/s of the loop that --only names, in this process."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    student = build_student(args.method, args.backbone, lightly=args.only == "lightly")
    student.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    if args.only == "lightly":
        losses = lightly_losses(student, args.root, args.batch_size)
    else:
        ready = itertools.cycle([torch.rand(2, args.batch_size, 3, 32, 32) for _ in range(8)])
        losses = {"moco": moco_losses, "simclr": simclr_losses}[args.method](student, ready)
    for step, loss in enumerate(itertools.islice(losses, WARMUP + args.steps)):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == WARMUP - 1:
            began = time.perf_counter()
    return args.steps * args.batch_size / (time.perf_counter() - began)


# --- Taking turns ---


def in_its_process(only: str, args: argparse.Namespace, root: Path) -> float:
    """`time_loop` in a fresh process."""
    options = {"method": args.method, "backbone": args.backbone, "batch-size": args.batch_size, "steps": args.steps}
    options |= {"threads": args.threads, "root": root, "only": only}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(args.threads))
    return float(done.stdout.split()[-1]) if done.returncode == 0 else sys.exit(done.stderr)


def images_in(root: Path) -> int:
    return sum(1 for _ in root.glob("train/*/*"))


def link_part(root: Path, count: int, place: Path) -> Path:
    """A folder of links to `count` images of every class alike: no run reads more files than it trains on."""
    paths = sorted(root.glob("train/*/*"), key=lambda path: (path.name, path.parent.name))
    for split, part in (("train", paths[:count]), ("test", paths[:100])):
        for path in part:
            link = place / split / path.parent.name / path.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--method", choices=["moco", "simclr"], default="moco")
    parser.add_argument("--backbone", choices=list(BATCH_SIZES), default="small_resnet")
    parser.add_argument(
        "--batch-size", type=int, help="default: " + ", ".join(f"{b} {n}" for n, b in BATCH_SIZES.items())
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lightly", action="store_true", help="SimCLR only")
    parser.add_argument("--only", choices=["bare", "lightly"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch_size = args.batch_size or BATCH_SIZES[args.backbone]
    if args.lightly and args.method != "simclr":
        parser.error("--lightly compares SimCLR: add --method simclr")
    if QUEUE % args.batch_size and args.method == "moco":
        parser.error(f"--batch-size must divide the queue of {QUEUE}")
    if not images_in(args.root):
        parser.error(f"no images in {args.root}/train/<class>")
    if args.only:
        print(time_loop(args))
        return
    rounds = []
    with tempfile.TemporaryDirectory() as place:
        root = link_part(args.root, (WARMUP + args.steps) * args.batch_size, Path(place))
        for _ in range(args.rounds):
            taken = {"sslctl": ours(args, root), "bare loop": in_its_process("bare", args, root)}
            rounds.append(taken | ({"lightly": in_its_process("lightly", args, root)} if args.lightly else {}))
    print(f"{args.method}, {args.backbone}, batches of {args.batch_size}, {args.steps} steps, {args.threads} threads\n")
    print(table(rounds, "images/s", "sslctl", inverse=True))


if __name__ == "__main__":
    main()
