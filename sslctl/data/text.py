"""Plain text files as samples of token ids, by a vocabulary learnt from the training files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sslctl.data.held_out import held_out_names
from sslctl.data.listing import existing_folder
from sslctl.data.modality import TEXTS, Modality
from sslctl.data.sources import Source
from sslctl.errors import InputError, reason_of, say, user_path
from sslctl.ops.special_files import refuse_special
from sslctl.runs.file_list import FileList

PAD, UNKNOWN, CLS, MASK = 0, 1, 2, 3
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[MASK]")  # the first ids, in this order


@dataclass(frozen=True)
class Texts(Source):
    """tokens: (N, L) int64, each row [CLS] and L - 1 tokens of one file; image_size is L. tokenizer: as JSON."""

    tokens: Tensor | None = None
    tokenizer: str = ""
    vocabulary: int = 0
    modality: ClassVar[Modality] = TEXTS
    all_of_one_size: ClassVar[bool] = True
    per_sample: ClassVar[tuple[str, ...]] = (*Source.per_sample, "tokens")

    @property
    def in_memory(self) -> Tensor:
        return self.tokens

    @property
    def tokenizer_hash(self) -> str:
        return hashlib.blake2b(self.tokenizer.encode(), digest_size=16).hexdigest()

    def spelt(self) -> tuple[str, ...]:
        """Returns what each of the V tokens is written as, for people; the end of a line as \\n."""
        tokenizer = _library().Tokenizer.from_str(self.tokenizer)
        pieces = (tokenizer.decode([i], skip_special_tokens=False) for i in range(self.vocabulary))
        return tuple(piece.replace("\n", "\\n").replace("\t", " ").replace("\r", "") for piece in pieces)

    def summary(self) -> str:
        return f"{len(self):,} texts of {self.image_size} tokens, {self.vocabulary:,} different ones"

    def describe(self, index: int) -> str:
        return f"{self.paths[index]}, text {index}"


def text(split: str, root: str | None, length: int, vocabulary: int, tokenizer: str | None) -> Texts:
    """Reads root/*.txt, nested or not, without labels; root/<class>/*.txt when all files lie in class folders: with labels.

    root/train/ and root/test/ (or val/), each of this kind, are the splits where they are there; else a fixed fifth of a
    labelled dataset's samples is the test split. The vocabulary is learnt from the training files' whole text, the held-out fifth
    in it where there is no test/: samples are pieces of so many tokens, so that there is no fifth before there is a vocabulary.
    """
    if not root:
        raise InputError("dataset.root is not set: dataset.root=/path/to/texts, with .txt files")
    if length < 2:
        raise InputError(f"dataset.length={length}: a sample is [CLS] and at least one token")
    base = existing_folder(root)
    train_folder, folder = _folders(base, split)
    # The vocabulary and the classes are those of the training files, whatever the split.
    training = _contents(train_folder)
    texts = training if folder == train_folder else _contents(folder)
    encoder = _tokenizer(list(training.values()), vocabulary, tokenizer)
    classes = _classes(train_folder, list(training))
    if not classes and split == "test":
        raise InputError(f"{base} has no labels to evaluate on: put the files into a folder for each class")
    unknown = sorted({path.parent.name for path in texts} - set(classes)) if classes else []
    if unknown:
        raise InputError(f"{folder}: class folder {unknown[0]} does not exist in {train_folder}")
    # Each file is cut into pieces of length - 1 tokens, which [CLS] goes before.
    rows, labels, paths, names, short, count = [], [], [], [], 0, 0
    for path, content in texts.items():
        ids = torch.tensor(encoder.encode(content).ids, dtype=torch.int64)
        count += len(ids)
        pieces = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)  # a rest is left out
        short += not len(pieces)
        for number, piece in enumerate(pieces):
            rows.append(torch.cat([torch.tensor([CLS]), piece]))
            labels.append(classes.index(path.parent.name) if classes else -1)
            paths.append(str(path))
            names.append(f"{path.relative_to(folder).as_posix()}#{number}")
    if classes and folder == base:
        places = (held_out_names(names, [[label] for label in labels]) == (split == "test")).nonzero()[0].tolist()
        rows, labels, paths = ([values[row] for row in places] for values in (rows, labels, paths))
    if not rows:
        raise InputError(f"{folder}: {count} tokens are too few for samples of {length} (dataset.length)")
    if short:
        say(
            f"  {short} of {len(texts)} files in {folder} are shorter than {length - 1} tokens and left out (dataset.length)"
        )
    tokens, labels = torch.stack(rows), torch.tensor(labels)
    content = tokens.numpy().tobytes() + labels.numpy().tobytes() + encoder.to_str().encode()
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    files = tuple(path.relative_to(folder).as_posix() for path in texts)
    own = {"file_list": FileList(files, tuple(path.stat().st_size for path in texts), are_rows=False)}
    own |= {"tokens": tokens, "tokenizer": encoder.to_str(), "vocabulary": encoder.get_vocab_size()}
    return Texts(base.name, split, None, tuple(paths), labels, classes, 1, length, digest, **own)


def _folders(base: Path, split: str) -> tuple[Path, Path]:
    """Returns the training texts' folder and this split's: train/ and test/ or val/, or the base for both."""
    train, test = base / "train", next((d for d in (base / "test", base / "val") if d.is_dir()), None)
    if not train.is_dir():
        return base, base
    if split == "test" and test is None:
        raise InputError(f"{base} has a train/ folder but neither test/ nor val/: no test split")
    return train, train if split == "train" else test


def _contents(folder: Path) -> dict[Path, str]:
    """Reads the .txt files below a folder, sorted, each once. Raises InputError where there are none, or where one is empty."""
    contents = {path: _read(path) for path in sorted(folder.rglob("*.txt")) if path.is_file()}
    if not contents:
        raise InputError(f"no .txt files in {folder}")
    empty = next((path for path, content in contents.items() if not content.strip()), None)
    if empty:
        raise InputError(f"{empty} is empty")
    return contents


def _classes(folder: Path, paths: list[Path]) -> tuple[str, ...]:
    """Returns the class folders' names where every file lies in one; says so where only some do, and there are no labels then."""
    outside = [path for path in paths if len(path.relative_to(folder).parts) != 2]
    if not outside:
        return tuple(sorted({path.parent.name for path in paths}))
    if len(outside) < len(paths):
        say(
            f"  {folder}: no labels, since {len(outside)} of {len(paths)} files lie outside class folders, {outside[0]} first"
        )
    return ()


def _read(path: Path) -> str:
    try:
        refuse_special(path)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {reason_of(error)}") from error


def _tokenizer(contents: list[str], vocabulary: int, saved: str | None) -> Any:
    """Reads a tokenizer from a file, or learns byte pairs of the texts (Sennrich et al. 2016, arXiv:1508.07909)."""
    tokenizers = _library()
    if saved and saved.startswith("{"):  # a tokenizer itself: that of a run's training texts for its eval_dataset
        return tokenizers.Tokenizer.from_str(saved)
    if saved:
        path = user_path(saved)
        if not path.is_file():
            raise InputError(f"dataset.tokenizer={path}: no such file")
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        wrong = [token for i, token in enumerate(SPECIAL) if tokenizer.token_to_id(token) != i]
        if wrong:
            raise InputError(f"dataset.tokenizer={path}: its first tokens are not {', '.join(SPECIAL)}")
        return tokenizer
    if vocabulary < 256 + len(SPECIAL):
        raise InputError(f"dataset.vocabulary={vocabulary}: the {256 + len(SPECIAL)} bytes and special tokens at least")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(contents, trainer)
    return tokenizer


def _library() -> Any:
    """Imports the tokenizers package; raises InputError where it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise InputError("dataset=text needs a tokenizer: pip install 'sslctl[text]'") from None
    return tokenizers


class TextTransform:
    """A text to a backbone's input. tokenizer: a file; length: tokens, [CLS] first, filled up with [PAD]."""

    def __init__(self, tokenizer: Path, length: int):
        self.tokenizer, self.length = _library().Tokenizer.from_file(str(tokenizer)), length

    def __call__(self, content: str) -> Tensor:
        """Returns (length,) int64; what does not fit is cut off."""
        ids = [CLS, *self.tokenizer.encode(content).ids][: self.length]
        return torch.tensor(ids + [PAD] * (self.length - len(ids)))
