"""sslctl's losses beside lightly's on the same random inputs: values and gradients, or the reason why they differ.

    pip install sslctl[bench]; python scripts/parity_losses.py [--markdown FILE]

Float64, 64 rows of 32 dimensions. `gradient` is the norm of the difference as a part of lightly's norm, over all inputs
that have a gradient in both.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import lightly.loss as theirs
import torch
from lightly.loss.memory_bank import MemoryBankModule
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sslctl import losses as ours

ROWS, DIM, PROTOTYPES = 64, 32, 48
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Pair:
    """Two losses of the same inputs. reason: why they differ, where they do."""

    name: str
    other: str
    inputs: tuple[Tensor, ...]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    reason: str = ""
    differs: bool = False  # by their definitions


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pairs() -> list[Pair]:
    """Every loss of ours that lightly has as well."""
    z1, z2 = normal(1, ROWS, DIM), normal(2, ROWS, DIM)
    bank = torch.nn.functional.normalize(normal(3, 128, DIM), dim=1)
    views, teacher = normal(4, 4, ROWS, PROTOTYPES), normal(5, 2, ROWS, PROTOTYPES)
    cosines = [torch.nn.functional.normalize(normal(6 + i, ROWS, PROTOTYPES), dim=1) for i in range(3)]
    prototypes = normal(9, PROTOTYPES, DIM)
    anchors = normal(10, 3, ROWS, DIM)
    patches, patch_teacher = normal(11, ROWS, 9, PROTOTYPES), normal(12, ROWS, 9, PROTOTYPES)
    mask = normal(13, ROWS, 9) > 0.5
    columns = torch.nn.functional.normalize(normal(14, DIM, 40), dim=0)
    return [
        Pair(
            "nt_xent", "NTXentLoss", (z1, z2), lambda a, b: ours.nt_xent(a, b, 0.2), theirs.NTXentLoss(temperature=0.2)
        ),
        Pair(
            "info_nce (MoCo)",
            "NTXentLoss, memory bank",
            (z1, z2),
            lambda a, b: ours.info_nce(a, b.detach(), bank, 0.1),
            lambda a, b: with_bank(theirs.NTXentLoss(temperature=0.1, memory_bank_size=(128, DIM)), bank)(
                a, b.detach()
            ),
        ),
        Pair("dcl", "DCLLoss", (z1, z2), lambda a, b: ours.dcl(a, b, 0.1), theirs.DCLLoss(temperature=0.1)),
        Pair(
            "dcl (DCLW)",
            "DCLWLoss",
            (z1, z2),
            lambda a, b: ours.dcl(a, b, 0.1, 0.5),
            theirs.DCLWLoss(temperature=0.1, sigma=0.5),
        ),
        Pair(
            "nnclr",
            "NTXentLoss",
            (z1, z2),
            lambda a, b: ours.nnclr(a, b, 0.5),
            theirs.NTXentLoss(temperature=0.5),
            reason="lightly trains NNCLR with the whole NT-Xent, negatives of the same view and a gradient to the"
            " neighbours included; the paper's (eq. 3) has neither",
            differs=True,
        ),
        Pair(
            "negative_cosine",
            "NegativeCosineSimilarity",
            (z1, z2),
            ours.negative_cosine,
            lambda a, b: theirs.NegativeCosineSimilarity()(a, b.detach()),
            reason="ours detaches the target itself",
        ),
        Pair(
            "barlow_twins",
            "BarlowTwinsLoss",
            (z1, z2),
            lambda a, b: ours.barlow_twins(a, b, 5e-3),
            barlow_without_flag(),
        ),
        Pair("vicreg", "VICRegLoss", (z1, z2), lambda a, b: ours.vicreg(a, b, 25.0, 25.0, 1.0), theirs.VICRegLoss()),
        Pair(
            "swav, sinkhorn",
            "SwaVLoss",
            tuple(cosines),
            lambda *s: ours.swav(torch.stack(s), torch.stack([ours.sinkhorn(x, 0.05, 3) for x in s[:2]]), 0.1),
            lambda a, b, c: theirs.SwaVLoss()([a, b], [c]),
        ),
        Pair(
            "dino",
            "DINOLoss",
            (views, teacher),
            lambda s, t: ours.dino(s, t, torch.zeros(PROTOTYPES, dtype=s.dtype), 0.1, 0.04),
            lambda s, t: theirs.DINOLoss(output_dim=PROTOTYPES).double()(list(t.detach()), list(s), teacher_temp=0.04),
        ),
        Pair(
            "ibot",
            "IBOTPatchLoss",
            (patches, patch_teacher),
            lambda s, t: ours.ibot(s, t, torch.zeros(PROTOTYPES, dtype=s.dtype), mask, 0.1, 0.04).mean(),
            lambda s, t: theirs.IBOTPatchLoss(output_dim=PROTOTYPES).double()(
                t[mask].detach(), s[mask], mask.view(ROWS, 3, 3)
            ),
        ),
        Pair("msn", "MSNLoss", (anchors, prototypes), lambda a, p: our_msn(a, z2, p), lambda a, p: their_msn(a, z2, p)),
        Pair(
            "whitening_mse",
            "WMSELoss",
            (z1[:, :8], z2[:, :8]),
            lambda a, b: ours.whitening_mse(torch.stack([a, b]), torch.arange(ROWS)[None, None]),
            lambda a, b: theirs.WMSELoss(embedding_dim=8, w_size=ROWS, track_running_stats=False).double()(
                torch.cat([a, b])
            ),
            reason="one part that is the whole batch; lightly draws its parts from the global generator",
        ),
        Pair("sigreg", "SIGReg", (z1,), lambda z: ours.sigreg(z, columns), lambda z: their_sigreg(z, columns)),
    ]


def with_bank(loss: theirs.NTXentLoss, rows: Tensor) -> theirs.NTXentLoss:
    """lightly's loss with a given memory."""
    bank: MemoryBankModule = loss.memory_bank
    bank.bank = rows.T.contiguous() if bank.bank.shape[0] == rows.shape[1] else rows.clone()
    return loss.double()


def barlow_without_flag() -> Callable[[Tensor, Tensor], Tensor]:
    return theirs.BarlowTwinsLoss(lambda_param=5e-3)


def our_msn(anchors: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize
    scores = unit(anchors, dim=-1) @ unit(prototypes, dim=1).T  # (3, ROWS, PROTOTYPES)
    sharp = ((unit(targets, dim=1) @ unit(prototypes, dim=1).T).detach() / (0.1 * 0.25)).log_softmax(1)
    return ours.msn(scores, ours.sinkhorn(sharp, 1.0, 3), 0.1, 1.0)


def their_msn(anchors: Tensor, targets: Tensor, prototypes: Tensor) -> Tensor:
    return theirs.MSNLoss()(anchors.flatten(0, 1), targets, prototypes)


def their_sigreg(z: Tensor, columns: Tensor) -> Tensor:
    """lightly's statistic on given directions; it draws its own from the global generator."""
    loss = theirs.SIGReg(num_vectors=columns.shape[1])
    loss._generate_unit_vectors = lambda *arguments, **keywords: columns
    return loss.double()(z[None])


@dataclass(frozen=True)
class Outcome:
    """What came out of a pair."""

    pair: Pair
    ours: float
    theirs: float
    gradient: float  # difference as a part of lightly's norm

    @property
    def agrees(self) -> bool:
        return math.isclose(self.ours, self.theirs, rel_tol=TOLERANCE, abs_tol=TOLERANCE) and self.gradient < TOLERANCE

    @property
    def verdict(self) -> str:
        if self.pair.differs:
            return "differs, as documented" if not self.agrees else "agrees, although documented to differ"
        return "agrees" if self.agrees else "DIFFERS"


def compare(pair: Pair) -> Outcome:
    """Values and gradients of both losses on copies of the same inputs."""
    actual = []
    for loss in (pair.ours, pair.theirs):
        leaves = [tensor.clone().requires_grad_() for tensor in pair.inputs]
        value = loss(*leaves).sum()
        value.backward()
        actual.append((value.item(), [leaf.grad for leaf in leaves]))
    (mine, own), (other, their) = actual
    both = [(a, b) for a, b in zip(own, their, strict=True) if a is not None and b is not None]
    a, b = (torch.cat([pair[side].flatten() for pair in both]) for side in (0, 1))
    return Outcome(pair, mine, other, float((a - b).norm() / b.norm()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="also write the table between the marks of this file")
    arguments = parser.parse_args()
    outcomes = [compare(pair) for pair in pairs()]
    header = ("sslctl.losses", "lightly", "ours", "lightly's", "gradient", "verdict", "remark")
    rows = [
        (o.pair.name, o.pair.other, f"{o.ours:.8f}", f"{o.theirs:.8f}", f"{o.gradient:.1e}", o.verdict, o.pair.reason)
        for o in outcomes
    ]
    table = Table(*header, title=f"lightly {version('lightly')}, torch {torch.__version__}, float64")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if arguments.markdown:
        lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
        before, _, rest = arguments.markdown.read_text().partition("<!-- table -->")
        _, _, after = rest.partition("<!-- /table -->")
        text = "\n".join(lines)
        arguments.markdown.write_text(f"{before}<!-- table -->\n{text}\n<!-- /table -->{after}")
    if any(o.verdict == "DIFFERS" for o in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
