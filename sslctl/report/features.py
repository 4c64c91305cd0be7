"""What the features of a run look like: neighbours, a map, a confusion matrix. Extraction goes through the cache."""

import importlib.util

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sslctl.data.sources import Source
from sslctl.evaluation.features import Features, is_cached
from sslctl.evaluation.knn import knn_votes, neighbours
from sslctl.evaluation.subjects import Subject
from sslctl.evaluation.task import Reader, key_of
from sslctl.report.images import spread

_PIXELS = 16  # side of the images that neighbours by pixels are looked for with


def features_at(subject: Subject, source: Source, rows: np.ndarray, read: Reader) -> Features:
    """Returns the features of some rows: cut from those of the whole source where they are kept, else extracted."""
    if len(rows) == len(source) or is_cached(key_of(subject, source)):
        whole = read(subject, source)
        chosen = torch.from_numpy(rows)
        return Features(whole.features[chosen], whole.labels[chosen], whole.num_classes)
    return read(subject, source.subset(torch.from_numpy(rows)))


def most_rows(subject: Subject, source: Source, most: int) -> int:
    """Returns all rows of a source whose features are kept, else at most so many."""
    return len(source) if is_cached(key_of(subject, source)) else min(len(source), most)


# --- Neighbours ---


def nearest_rows(rows: Tensor, queries: Tensor, count: int) -> Tensor:
    """Returns the rows nearest to each query by cosine, the query itself left out: (Q, count).

    rows: (N, D); queries: (Q,).
    """
    _, nearest = neighbours(rows[queries], rows, count + 1)
    itself = (nearest == queries[:, None]).int()
    return nearest.gather(1, itself.argsort(dim=1, stable=True))[:, : min(count, len(rows) - 1)]


def same_class(rows: Tensor, labels: Tensor, count: int) -> float:
    """Returns how often one of an image's nearest is of its class. rows: (N, D); labels: (N,)."""
    nearest = nearest_rows(rows, torch.arange(len(rows)), count)
    return (labels[nearest] == labels[:, None]).float().mean().item()


def pixel_rows(thumbnails: Tensor) -> Tensor:
    """Turns small images into rows, their mean brightness taken away. (N, C, h, w) uint8 -> (N, D)."""
    images = thumbnails.float()
    if images.shape[2] > _PIXELS:
        images = F.interpolate(images, (_PIXELS, _PIXELS), mode="area")
    rows = images.flatten(1)
    return rows - rows.mean(1, keepdim=True)


# --- The map ---


def in_two_dimensions(features: Tensor, seed: int) -> tuple[np.ndarray, str] | None:
    """Returns ((n, 2), how it was made): UMAP where it is installed, else t-SNE. None for fewer than 10 images."""
    rows = F.normalize(features.float(), dim=1).numpy()
    if len(rows) < 10:
        return None
    if importlib.util.find_spec("umap"):
        import umap

        near = min(15, len(rows) - 1)
        places = umap.UMAP(n_neighbors=near, metric="cosine", random_state=seed).fit_transform(rows)
        return np.asarray(places, dtype=float), f"UMAP, {near} neighbours, cosine"
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    dims = min(50, *rows.shape)
    reduced = PCA(dims, random_state=seed).fit_transform(rows)
    perplexity = min(30, (len(rows) - 1) // 3)
    start = (
        "pca" if reduced[:, 0].std() > 1e-6 and dims >= 2 else "random"
    )  # collapsed features have no principal components
    places = TSNE(perplexity=perplexity, init=start, max_iter=500, random_state=seed).fit_transform(reduced)
    return places.astype(float), f"t-SNE, perplexity {perplexity}, of unit features"


# --- Who is taken for whom ---


def knn_predictions(
    subject: Subject, train: Source, test: Source, read: Reader, *, most: int, k: int, temperature: float
) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns (labels, predicted, how) of test images by weighted kNN; all of them where features are kept, else a part."""
    bank_rows = spread(len(train), most_rows(subject, train, most), seed=0)
    rows = spread(len(test), most_rows(subject, test, most), seed=0)
    bank, queries = features_at(subject, train, bank_rows, read), features_at(subject, test, rows, read)
    votes = knn_votes(queries.features, bank, k=k, temperature=temperature)
    words = (
        f"kNN (k={min(k, len(bank_rows))}, temperature {temperature:g}): {len(rows):,} {test.split} images of {test.name}"
        f" against {len(bank_rows):,} training images"
    )
    return queries.labels.numpy(), votes.argmax(1).numpy(), words
