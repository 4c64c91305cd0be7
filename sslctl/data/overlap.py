"""Whether judged images are among those trained on, by their content: a result on such images says too much."""

import hashlib
import os
from collections.abc import Iterator

from sslctl.data.sources import Source
from sslctl.runs.checksums import digest_of_file

_COMPARED = 2 * 2**30  # bytes of files that are read for it at most


def overlap(trained: Source, judged: Source) -> str | None:
    """Says how many of the judged images are among the trained ones, or that it was not looked at; None where none is."""
    if trained.description is None or judged.description is None:
        return None  # a benchmark's own splits, or nothing that lies in a folder of images
    if trained.images is not None and judged.images is not None:
        shared = _shared(_hashes_of(trained), _hashes_of(judged))
    else:
        shared = _shared_files(trained.paths, judged.paths)
    if shared is None:
        return f"{judged.name}: whether judged images are among the trained ones was not looked at, they are too many"
    if not shared:
        return None
    return (
        f"{shared:,} of the {len(judged):,} images that {judged.name} is judged by are among those trained on: its figures"
        " are too good; dataset.splits={train: FOLDER, test: FOLDER} keeps them apart"
    )


def doubts(trained: Source, judged: Source | None) -> list[str]:
    """Says what of the data may not be meant, each with the key that answers it: for the plan of every verb."""
    both = [source for source in (trained, judged) if source is not None and source.description]
    warnings = [warning for source in both for warning in source.description.warnings]
    shared = overlap(trained, judged) if judged is not None else None
    return list(dict.fromkeys([*warnings, *([shared] if shared else [])]))


def _shared(trained: Iterator[bytes], judged: Iterator[bytes]) -> int:
    known = set(trained)
    return sum(digest in known for digest in judged)


def _hashes_of(source: Source) -> Iterator[bytes]:
    """Yields a hash of each image's pixels, those of one value left out: they are alike everywhere."""
    for image in source.images.numpy():
        if image.min() != image.max():
            yield hashlib.blake2b(image.tobytes() + str(image.shape).encode(), digest_size=16).digest()


def _shared_files(trained: tuple[str, ...], judged: tuple[str, ...]) -> int | None:
    """Counts the judged files whose bytes are a trained one's; None where too many have the same size as one."""
    by_size = {}
    for path in dict.fromkeys(trained):
        by_size.setdefault(os.path.getsize(path), []).append(path)
    alike = {path: by_size.get(os.path.getsize(path), []) for path in judged}
    of_size = {path: os.path.getsize(path) for path, others in alike.items() if others}
    to_read = set(of_size) | {other for path in of_size for other in alike[path]}
    if sum(os.path.getsize(path) for path in to_read) > _COMPARED:
        return None
    digests = {path: digest_of_file(path) for path in to_read}
    trained_digests = {digests[other] for path in of_size for other in alike[path]}
    return sum(digests[path] in trained_digests for path in of_size)
