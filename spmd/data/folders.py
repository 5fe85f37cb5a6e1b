"""Image files of an `Images` config: found, split, read."""

# N examples

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from spmd.core.fields import check, closest
from spmd.core.storage import is_remote, json_text
from spmd.data import content, decode, files, index
from spmd.data.content import Content, Entry

if TYPE_CHECKING:
    from spmd.data.images import Images

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
EVALUATION = ("eval", "val", "valid", "validation", "test")
_NAMED = 5000  # up to so many files each has its own entry in the fingerprint
_SAMPLED = 1024  # files of a larger set whose bytes are hashed
_ALL_BYTES = 2**28  # up to so many bytes all files are


class Rows(NamedTuple):
    """The examples of a place, in the order of their names.

    name, path: of the image [N]. label: its class, "" without. group: what is split as one. mask: files.
    columns: {name: float32 [N]}. sizes: bytes, -1 where they have not been looked up.
    """

    name: list[str]
    path: list[str]
    label: list[str]
    group: list[str]
    mask: list[str]
    columns: dict[str, np.ndarray]
    sizes: list[int]

    def pick(self, rows: np.ndarray) -> Rows:
        """Some of them."""
        taken = [
            [values[i] for i in rows] if values else []
            for values in self
            if isinstance(values, list)
        ]
        name, path, label, group, mask, sizes = taken
        columns = {k: x[rows] for k, x in self.columns.items()}
        return Rows(name, path, label, group, mask, columns, sizes)


class FileSource:
    """Encoded images read from their files; `name_of` names the file of an example.

    columns: {feature: [N]} of what is no file.
    """

    def __init__(self, rows: Rows, label_N: np.ndarray | None, *, masks: bool):
        self.rows, self._masks = rows, masks
        self.columns = dict(rows.columns) | ({} if label_N is None else {"label": label_N})

    def __len__(self) -> int:
        return len(self.rows.name)

    def name_of(self, index: int) -> str:
        """The file of an example, relative to the folder."""
        return self.rows.name[index]

    def take(self, indices: np.ndarray) -> dict[str, Any]:
        """Examples at `indices` int64 [N]: images and masks as bytes."""
        batch: dict[str, Any] = {"image": files.read_all([self.rows.path[i] for i in indices])}
        if self._masks and self.rows.mask:
            batch["mask"] = files.read_all([self.rows.mask[i] for i in indices])
        elif self._masks:
            batch["mask"] = [_blank(image) for image in batch["image"]]
        return batch | {name: x[indices] for name, x in self.columns.items()}


def _blank(image: bytes) -> bytes:
    """A mask of class 0 for an image that is predicted."""
    import io

    from PIL import Image

    header, file = decode.read_header(image, 3), io.BytesIO()
    Image.new("L", (header.width, header.height)).save(file, "PNG")
    return file.getvalue()


# ---- what is there


def _read(config: Images, root: str, *, labelled: bool = True) -> Rows:
    """The examples of a folder or an index. labelled: False where classes and masks may be missing."""
    listed, key = config.listed, (root, labelled)
    if key not in listed:
        listed[key] = _list(config, root, labelled=labelled)
    return listed[key]


def _list(config: Images, root: str, *, labelled: bool) -> Rows:
    if not files.is_folder(root):
        return index.read(config, root, labelled=labelled)
    check(
        not config.group_by and not config.columns,
        f"data.group_by and data.columns name columns of an index (.csv, .jsonl, .parquet), and {root} is a"
        " folder",
    )
    if config.target == "mask":
        return _read_pairs(root, labelled=labelled)
    return _read_classes(root, labelled=labelled)


def _read_classes(root: str, *, labelled: bool) -> Rows:
    images = files.below(root, SUFFIXES)
    check(bool(images), f"{root} holds no image ({', '.join(SUFFIXES)}); give another folder")
    labels = [f.name.partition("/")[0] if "/" in f.name else "" for f in images]
    stray = [f.name for f, label in zip(images, labels, strict=True) if not label]
    check(
        not stray or not labelled,
        f"{root} holds images that are in no class folder: {shorten(stray)}; make a folder for each class",
    )
    empty = sorted(set(files.subfolders(root)) - set(labels)) if labelled else []
    check(
        not empty,
        f"class without images in {root}: {shorten(empty)}; put images there, or remove the folder",
    )
    names = [f.name for f in images]
    return Rows(names, [f.path for f in images], labels, names, [], {}, [f.size for f in images])


def _read_pairs(root: str, *, labelled: bool) -> Rows:
    folders = files.subfolders(root)
    paired = "image" in folders and "mask" in folders
    check(
        paired or not labelled,
        f"{root} has no folders image and mask (data.target=mask); it has: {shorten(folders) or 'none'}",
    )
    base = posixpath.join(root, "image") if "image" in folders else root
    images = files.below(base, SUFFIXES)
    check(bool(images), f"{base} holds no image ({', '.join(SUFFIXES)}); give another folder")
    masks: list[str] = []
    if paired and labelled:
        stem = lambda name: posixpath.splitext(name)[0]
        by_stem = {
            stem(f.name): f.path for f in files.below(posixpath.join(root, "mask"), SUFFIXES)
        }
        alone = [f.name for f in images if stem(f.name) not in by_stem]
        check(not alone, f"images of {base} have no mask of their name in mask: {shorten(alone)}")
        rest = sorted(set(by_stem) - {stem(f.name) for f in images})
        check(not rest, f"masks of {root} have no image of their name in image: {shorten(rest)}")
        masks = [by_stem[stem(f.name)] for f in images]
    names = [f.name for f in images]
    paths, sizes = [f.path for f in images], [f.size for f in images]
    return Rows(names, paths, [""] * len(names), names, masks, {}, sizes)


def _places(config: Images) -> tuple[str, str]:
    """(where the training examples are, where those of the evaluation are: "" is a share of the former)."""
    root = files.locate(config.path, "data.path")
    evaluation = files.locate(config.eval_path, "data.eval_path") if config.eval_path else ""
    if not files.is_folder(root):
        return root, evaluation
    folders = files.subfolders(root)
    if "train" not in folders:
        return root, evaluation
    others = [name for name in EVALUATION if name in folders]
    if others and not evaluation:
        evaluation = posixpath.join(root, others[0])
    return posixpath.join(root, "train"), evaluation


def shorten(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


# ---- splits and classes


def in_evaluation(groups: Sequence[str], fraction: float) -> np.ndarray:
    """bool [N]: whether the hash of each name is below a fraction."""
    hashes = [
        hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8] for name in groups
    ]
    return np.frombuffer(b"".join(hashes), ">u8") < np.uint64(int(fraction * 2**64))


def _split(config: Images, split: str) -> Rows:
    train, evaluation = _places(config)
    if evaluation:
        return _read(config, train if split == "train" else evaluation)
    rows = _read(config, train)
    chosen = in_evaluation(rows.group, config.eval_fraction)
    kept = rows.pick(np.flatnonzero(chosen if split == "eval" else ~chosen))
    check(
        bool(kept.name),
        f"data.eval_fraction={config.eval_fraction} of {len(rows.name)} images leaves none for"
        f" {'the evaluation' if split == 'eval' else 'training'}; give another, or --data.eval-path",
    )
    return kept


def class_names(config: Images) -> list[str]:
    """The classes of the training data: numbers by their value, names in alphabetical order."""
    names = set(_read(config, _places(config)[0]).label)
    if all(name.lstrip("-").isdigit() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def open_split(config: Images, split: str) -> FileSource:
    """The source of a split."""
    rows = _split(config, split)
    if config.target != "label":
        return FileSource(rows, None, masks=config.target == "mask")
    classes = list(config.classes or class_names(config))
    unknown = sorted(set(rows.label) - set(classes))
    check(
        not unknown,
        f"classes of the {'training' if split == 'train' else 'evaluation'} images that are not among the"
        f" {len(classes)} of training: {shorten(unknown)}.{closest(unknown[0], classes) if unknown else ''}"
        f" The classes are: {shorten(classes)}",
    )
    return FileSource(rows, _numbered(rows.label, classes), masks=False)


def open_all(config: Images) -> FileSource:
    """All images of `path`, whatever their split; an unknown class is -1."""
    root = files.locate(config.path, "data.path")
    rows = _read(config, root, labelled=False)
    label_N = _numbered(rows.label, config.classes) if config.target == "label" else None
    return FileSource(rows, label_N, masks=config.target == "mask")


def _numbered(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    numbers = {name: i for i, name in enumerate(classes)}
    return np.array([numbers.get(label, -1) for label in labels], np.int32)


# ---- content


def describe(source: FileSource) -> Content:
    """The fingerprint of the files: of small sets all bytes, of large ones names, sizes and a sample."""
    rows = source.rows
    paths = [*rows.path, *rows.mask]
    about = hashlib.sha256(json_text([rows.label, _lists(rows.columns)]).encode()).hexdigest()[:32]
    labels = Entry("labels and columns", len(rows.name), about)
    names = [*rows.name, *(posixpath.basename(mask) for mask in rows.mask)]
    sizes = rows.sizes if len(rows.sizes) == len(paths) else []
    if len(paths) <= _NAMED and (not sizes or sum(sizes) <= _ALL_BYTES):
        return [*_entries(paths, names), labels]
    chosen = np.unique(np.linspace(0, len(paths) - 1, _SAMPLED).astype(np.int64))
    sample = _entries([paths[i] for i in chosen], [names[i] for i in chosen])
    listing = hashlib.sha256(json_text([names, sizes]).encode()).hexdigest()[:32]
    return [Entry("names and sizes", len(names), listing), *sample, labels]


def _entries(paths: list[str], names: list[str]) -> Content:
    present = [p for p in paths if is_remote(p) or _exists(p)]
    entries = dict(zip(present, content.describe_files(present), strict=True))
    missing = Entry("", -1, "missing")
    return [entries.get(p, missing)._replace(name=n) for p, n in zip(paths, names, strict=True)]


def _exists(path: str) -> bool:
    import os

    return os.path.isfile(path)


def _lists(columns: dict[str, np.ndarray]) -> dict[str, list[Any]]:
    return {name: x.tolist() for name, x in columns.items()}
