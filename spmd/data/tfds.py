"""Prepared TFDS sets: located, prepared, read through TFDS; TFDS itself is imported for the last two only."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from spmd.core.fields import check, closest
from spmd.data import TFDS, cache_root, content, data_root, records, splits
from spmd.data import cache as caches
from spmd.data.builders import EMBEDDED, RUNNING, make_builder

_NAME = re.compile(r"(?P<name>[a-z]\w*)(/(?P<config>\w[\w.\-]*))?(:(?P<version>\d+\.\d+\.\d+))?")


def parse_name(name: str) -> tuple[str, str | None, str | None]:
    """`name[/config][:version]`; ValueError for anything else (names become paths)."""
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"data.name={name!r} is not a TFDS name; write name, name/config or name:1.0.0"
        )
    return match["name"], match["config"], match["version"]


def prepared_dir(config: TFDS) -> Path | None:
    """The directory of the prepared set (the newest version unless one is named), or None."""
    name, _, version = parse_name(config.name)
    version = version or RUNNING.get(name)
    for versions in _prepared_versions(config):
        chosen = [p for p in versions if version in (None, p.name)]
        if chosen:
            return chosen[-1]
    return None


def _prepared_versions(config: TFDS) -> Iterator[list[Path]]:
    """For each root the directories of the set's prepared versions, ascending."""
    name, config_name, _ = parse_name(config.name)
    roots = [Path(data_root(config.dir))]
    if name in EMBEDDED:
        roots.append(Path(cache_root(config.cache_dir)) / "tfds")
    for root in roots:
        base = root / name / config_name if config_name else root / name
        infos = [info.parent for info in base.glob("*/dataset_info.json")] or [
            info.parent for info in base.glob("*/*/dataset_info.json") if not config_name
        ]
        versions = [p for p in infos if re.fullmatch(r"\d+\.\d+\.\d+", p.name)]
        subs = sorted({p.parent.name for p in versions if p.parent != base})
        check(
            len(subs) < 2,
            f"data.name={config.name!r} is prepared in several configs in {root}: {', '.join(subs)}; name"
            f" one: {name}/{subs[0] if subs else ''}",
        )
        yield sorted(versions, key=lambda p: tuple(map(int, p.name.split("."))))


def find(config: TFDS) -> Path:
    """The prepared directory; embedded sets are prepared in the cache on first use."""
    root = data_root(config.dir)
    name, _, version = parse_name(config.name)
    check(
        not config.dir or os.path.isdir(root),
        f"data.dir={config.dir!r} is no directory; give one that holds prepared TFDS sets,"
        " or leave it out for $TFDS_DATA_DIR or ~/tensorflow_datasets",
    )
    directory = prepared_dir(config)
    if directory is None and name in EMBEDDED:
        prepare(config, str(Path(cache_root(config.cache_dir)) / "tfds"))
        directory = prepared_dir(config)
    versions_present = [p.name for versions in _prepared_versions(config) for p in versions]
    check(
        directory is not None or not versions_present,
        f"data set {config.name!r}: version {version} is not prepared in {root};"
        f" there: {', '.join(versions_present)}. Name one of these, or no version for the newest",
    )
    if directory is None:
        present = (
            sorted(p.name for p in Path(root).iterdir() if p.is_dir())
            if os.path.isdir(root)
            else []
        )
        raise ValueError(
            f"data set {config.name!r} is not prepared in {root}"
            f" (there: {', '.join(present) or 'nothing'}).{closest(name, [*present, *EMBEDDED])}\n"
            "Point --data.dir (or TFDS_DATA_DIR) at a directory that has it, or prepare it once:\n"
            "  pip install tensorflow    # only to prepare; training never imports it\n"
            "  python run.py data prepare --experiment NAME"
        )
    return directory


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TFDS without its progress bars and log lines."""
    import logging

    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def prepare(config: TFDS, root: str) -> None:
    """Run the set's builder into `root` as array_record; stock builders need TensorFlow for it."""
    import importlib.util

    import tensorflow_datasets as tfds

    name, _, version = parse_name(config.name)
    is_data_dir = root == data_root(config.dir)
    fields = "--data.dir or TFDS_DATA_DIR" if is_data_dir else caches.FIELDS
    caches.make_scratch(Path(root), fields).rmdir()
    with quiet():
        if name in EMBEDDED:
            embedded = make_builder(name, root)
            check(
                version in (None, str(embedded.version)),
                f"data set {config.name!r}: there is no version {version} of the embedded set {name!r};"
                f" name {embedded.version}, or no version",
            )
            with contextlib.suppress(FileExistsError):  # another process was faster
                embedded.download_and_prepare()
            return
        check(
            importlib.util.find_spec("tensorflow") is not None,
            f"preparing the stock set {config.name!r} needs TensorFlow once (reading never does):"
            " pip install tensorflow, then the same command again",
        )
        try:
            stock = tfds.builder(config.name, data_dir=root, file_format="array_record")
        except tfds.core.DatasetNotFoundError:
            raise ValueError(
                f"TFDS knows no data set {config.name!r}.{closest(name, tfds.list_builders())}"
            ) from None
        stock.download_and_prepare()


class Slice(NamedTuple):
    """Examples `start` to `stop` of the split `name`, which has `total`."""

    directory: Path
    name: str
    start: int
    stop: int
    total: int


def locate(config: TFDS, split: str) -> Slice:
    """The files and range of examples of `split` (`train`, `train[:90%]`)."""
    splits.check_form(split)
    directory = find(config)
    info, sizes = _read_info(directory)
    name, start, stop = splits.locate(split, sizes, config.name)
    check(
        info.get("fileFormat") == "array_record",
        f"{directory} is stored as {info.get('fileFormat')}, which needs TensorFlow to read; prepare"
        " it anew as array_record: python run.py data prepare --experiment NAME --data.dir DIR",
    )
    return Slice(directory, name, start, stop, sizes[name])


def _read_info(directory: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(dataset_info.json, the number of examples of each split)."""
    file = directory / "dataset_info.json"
    try:
        info = json.loads(file.read_text())
        return info, {s["name"]: sum(map(int, s.get("shardLengths", ()))) for s in info["splits"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} does not describe a prepared set ({type(error).__name__}: {error}); copy it anew, or"
            f" move {directory} aside and prepare the set: python run.py data prepare --experiment NAME"
        ) from None


def is_readable(directory: Path) -> bool:
    """Whether a prepared set is stored as array_record, which is read without TensorFlow."""
    return _read_info(directory)[0].get("fileFormat") == "array_record"


def slice_content(part: Slice, *, embedded: bool = False) -> content.Content:
    """The files of a prepared split, and the description of its features.

    embedded: fingerprinted by its records, since each machine prepares the set for itself.
    """
    shards = sorted(map(str, part.directory.glob(f"*-{part.name}.*")))
    check(
        bool(shards),
        f"{part.directory} has no file of split {part.name!r}, which dataset_info.json names; copy it anew",
    )
    description = content.describe_files([str(part.directory / "features.json")])
    if embedded:
        return [
            records.fingerprint(Path(shard), Path(shard).name) for shard in shards
        ] + description
    return content.describe_files(shards) + description


def split_content(config: TFDS, split: str) -> content.Content:
    """The content of `split` (`train`, `train[:90%]`)."""
    return slice_content(locate(config, split), embedded=parse_name(config.name)[0] in EMBEDDED)


def fingerprint(directory: Path, split: str) -> str:
    """Fingerprint of a prepared split."""
    key = hashlib.sha256()
    for name in ("dataset_info.json", "features.json"):
        key.update((directory / name).read_bytes())
    for shard in sorted(directory.glob(f"*-{split}.*")):
        (entry,) = content.describe_files([str(shard)])
        key.update(f"{entry} {shard.stat().st_mtime_ns}".encode())
    return key.hexdigest()


def open_reader(
    config: TFDS, directory: Path, split: str, features: Iterable[str], encoded: Iterable[str] = ()
) -> Any:
    """TFDS's random access to a split, checked for `features`; quiet. encoded: those that stay bytes."""
    import tensorflow_datasets as tfds

    with quiet():
        builder: Any = tfds.builder_from_directory(str(directory))
        skip: Any = tfds.decode.SkipDecoding
        has = builder.info.features
        decoders = {name: skip() for name in encoded if name in has}
        source = builder.as_data_source(split=split, decoders=decoders or None)
        names = list(source.dataset_info.features)
    for feature in features:
        check(
            feature in names,
            f"data set {config.name!r} has no feature {feature!r}."
            f"{closest(feature, names)} It has: {', '.join(names)}",
        )
    return source
