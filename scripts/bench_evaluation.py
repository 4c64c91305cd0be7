"""Times the cached linear probe and kNN on 50,000 × 512 features: python scripts/bench_evaluation.py [--threads N]

kNN is given as a ratio to the bare chunked product with top-k, interleaved in one run, median of 5.
"""

import argparse
import resource
import statistics
import time

import torch
import torch.nn.functional as F

from sslctl.evaluation.features import Features
from sslctl.evaluation.knn import knn_votes
from sslctl.evaluation.linear import Grid, fit_probe

TRAIN, TEST, DIM, CLASSES, K = 50_000, 10_000, 512, 10, 200


def made_up(rows: int, centers: torch.Tensor, generator: torch.Generator) -> Features:
    """Overlapping Gaussian classes."""
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return Features(centers[labels] + 3 * torch.randn(rows, DIM, generator=generator), labels, CLASSES)


def bare(queries: torch.Tensor, bank: torch.Tensor, chunk: int) -> None:
    """The least a kNN must do: similarities and the k largest."""
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    for part in queries.split(chunk):
        (part @ bank.T).topk(K, dim=1, sorted=False)


def seconds(function, *arguments, **settings) -> float:
    began = time.perf_counter()
    function(*arguments, **settings)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(CLASSES, DIM, generator=generator) / 4
    train, test = made_up(TRAIN, centers, generator), made_up(TEST, centers, generator)

    pairs = []
    for _ in range(5):
        least = seconds(bare, test.features, train.features, 1000)
        ours = seconds(knn_votes, test.features, train, k=K, temperature=0.1)
        pairs.append((ours, least))
    ratios = [ours / least for ours, least in pairs]
    ours, least = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"kNN     {ours:.2f} s, bare product with top-k {least:.2f} s, ratio {statistics.median(ratios):.2f}", end="")
    print(f" ({min(ratios):.2f} to {max(ratios):.2f})")

    grid = Grid([0.01, 0.03, 0.1, 0.3], [0.0, 1e-4, 1e-3], epochs=100, batch_size=1024, validation=0.1)
    taken = [seconds(fit_probe, train, grid, 0) for _ in range(3)]
    print(f"linear  {statistics.median(taken):.1f} s for {len(grid.settings())} settings and the final fit", end="")
    print(f" ({min(taken):.1f} to {max(taken):.1f})")
    print(f"memory  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at most, both together")


if __name__ == "__main__":
    main()
