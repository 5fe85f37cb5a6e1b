"""Data sets of Hugging Face `datasets`, saved by `save_to_disk`; reading needs no such package."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from spmd.core.fields import check, closest, located
from spmd.data import DataConfig, Source, Split, grouped

if TYPE_CHECKING:
    from spmd.data.content import Content
    from spmd.data.tables.opening import TableSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace(DataConfig):
    """A saved data set, mapped into memory: random access by rows."""

    path: str = located("")
    """Directory that `save_to_disk` wrote: of a data set, or of several splits."""
    train_split: str = "train"
    """Split to train on, where the directory has several."""
    eval_split: str = ""
    """Split to evaluate on; empty is test, validation, or else eval_fraction."""
    eval_fraction: float = 0.1
    """Share of the rows to evaluate on where no split is for it: every tenth row, say."""
    columns: tyro.conf.Suppress[Mapping[str, tuple[str, ...]]] = dataclasses.field(
        default_factory=dict
    )
    """Feature -> its column, or as many as it has elements; by default the column of its name."""
    missing: Literal["error", "nan", "zero"] = "error"
    """Value in the place of missing ones; error: such a row is a bad record."""
    label: str = "label"
    """Column whose class names are those of the data."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty is those of the column `label`, where it has some."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            0 < self.eval_fraction <= 0.5,
            f"data.eval_fraction={self.eval_fraction} must be more than 0 and at most 0.5",
        )

    def found(self, recorded: Mapping[str, Any] | None = None) -> HuggingFace:
        """With the names of the classes: those that a run recorded, or of the column."""
        if self.classes or (recorded is None and not self.path):
            return self
        classes = (recorded or {}).get("classes")
        if classes is None:
            classes = _class_names(self._directories("train")[0], self.label)
        return dataclasses.replace(self, classes=tuple(classes))

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where they are not known."""
        return len(self.classes)

    def open(self, split: Split) -> TableSource:
        """The rows of a split."""
        from spmd.data.tables.arrow import ArrowRows, Unmappable
        from spmd.data.tables.opening import TableSource, check_missing

        directory, every = self._directories(split)
        paths = _arrow_files(directory)
        check(
            bool(self.features),
            f"data.features is empty; declare {{name: (shape, dtype)}} for {directory}",
        )
        try:
            rows = ArrowRows(paths, self.features, self.columns, self.missing)
        except Unmappable:
            raise ValueError(f"{directory} is compressed; save it anew with save_to_disk") from None
        check_missing(self, rows, paths[0])
        return TableSource(rows, grouped.Held(None, every, held=split == "eval"))

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The Arrow files of the split."""
        del source
        from spmd.data import content

        return content.describe_files(_arrow_files(self._directories(split)[0]))

    def columns_of(self, feature: str) -> tuple[str, ...]:
        """The columns of a feature."""
        return tuple(self.columns.get(feature, (feature,)))

    def _directories(self, split: str) -> tuple[Path, int]:
        """(directory of a split, every which row is evaluated on: 0 where a split is for it)."""
        from spmd.data import files

        root = Path(files.locate(self.path, "data.path"))
        every = round(1 / self.eval_fraction)
        file = root / "dataset_dict.json"
        if not file.exists():
            check(
                not self.eval_split,
                f"data.eval_split={self.eval_split!r}: {root} is one data set, without splits",
            )
            return root, every
        names = [str(name) for name in _json(file)["splits"]]
        held = self.eval_split or next((n for n in ("test", "validation") if n in names), "")
        name = held if split == "eval" and held else self.train_split
        check(
            name in names,
            f"{root} has no split {name!r}.{closest(name, names)} It has: {', '.join(names)}",
        )
        return root / name, 0 if held else every


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); save the data set anew with save_to_disk"
        ) from None


def _arrow_files(directory: Path) -> list[str]:
    """The Arrow files of a split, in their order."""
    check(
        (directory / "state.json").exists(),
        f"{directory} was not written by save_to_disk: it has no state.json; write it by"
        " load_dataset(...).save_to_disk(DIR)",
    )
    state = _json(directory / "state.json")
    check(
        not state.get("_indices_data_files"),
        f"{directory} was saved with an index of its rows; save it anew after flatten_indices()",
    )
    return [os.path.join(directory, each["filename"]) for each in state["_data_files"]]


def _class_names(directory: Path, label: str) -> list[str]:
    """The names of a ClassLabel column; none where the column has no names."""
    file = directory / "dataset_info.json"
    features = _json(file).get("features") or {} if file.exists() else {}
    about = features.get(label)
    return [str(name) for name in about.get("names", ())] if isinstance(about, dict) else []
