"""Images in files: a folder of class folders, pairs of image/ and mask/, or an index with columns.

A folder with `train` and one of `eval`, `val`, `valid`, `validation`, `test` has its splits; of any other,
the examples to evaluate on are chosen by a hash of their name, so that new files move no old one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import tyro

from spmd.core.fields import check, located
from spmd.data import DataConfig, Features, Source, Split

if TYPE_CHECKING:
    from spmd.data.content import Content
    from spmd.data.folders import FileSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images(DataConfig):
    """Encoded images, and a class, a mask or numbers for each; `data.transforms` decode and resize them."""

    path: str = located("")
    """A folder of class folders, or of image/ and mask/; or an index: .csv, .jsonl, .parquet. gs:// too."""
    eval_path: str = located("")
    """The same, to evaluate on; without it those of `path`, or eval_fraction."""
    eval_fraction: float = 0.1
    """Share of the files to evaluate on, by a hash of their name, where no others are given for it."""
    group_by: str = ""
    """Column of the index: examples with one value of it are all on one side, as those of a patient."""
    target: Literal["label", "mask", "columns"] = "label"
    """Truth that goes with an image: its class, its mask, or numbers of an index."""
    image_column: str = "image"
    """Column of the index with the files, relative to the index."""
    image_pattern: str = "{}"
    """File of an image, with {} for what its column says: image/{}.png where that is a number."""
    label_column: str = "label"
    """Column of the index with the classes, names or numbers."""
    mask_column: str = "mask"
    """Column of the index with the files of the masks."""
    mask_pattern: str = "{}"
    """File of a mask, with {} for what its column says."""
    columns: tuple[str, ...] = ()
    """Columns of the index that are features, float32."""
    classes: tuple[str, ...] = ()
    """Names of the classes; empty is those of the training data, sorted, kept in the run."""
    features: tyro.conf.Suppress[Features] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        check(
            0 < self.eval_fraction < 1,
            f"data.eval_fraction={self.eval_fraction} must be between 0 and 1",
        )
        for name in ("image_pattern", "mask_pattern"):
            pattern = getattr(self, name)
            check(
                "{}" in pattern, f"data.{name}={pattern!r} has no {{}}, which stands for the column"
            )
        check(
            self.target != "columns" or bool(self.columns),
            "data.target=columns needs data.columns, the names of columns of the index",
        )
        features: dict[str, tuple[tuple[int, ...], str]] = {"image": ((), "bytes")}
        if self.target == "label":
            features["label"] = ((), "int32")
        elif self.target == "mask":
            features["mask"] = ((), "bytes")
        features |= dict.fromkeys(self.columns, ((), "float32"))
        object.__setattr__(self, "features", features)
        super().__post_init__()

    def found(self, recorded: Mapping[str, Any] | None = None) -> Images:
        """With the names of the classes: those that a run recorded, or of the training data."""
        if "_listed" in vars(self):  # it has been found
            return self
        config = self._listing({})
        if self.target != "label" or self.classes:
            return config
        classes = (recorded or {}).get("classes")
        if not classes:
            if not self.path and recorded is None:
                return self
            from spmd.data import folders

            classes = folders.class_names(config)
        return dataclasses.replace(config, classes=tuple(classes))._listing(config.listed)

    def _listing(self, listed: dict[Any, Any]) -> Images:
        """A copy that keeps what its places hold, so that a start lists each of them once."""
        copy = dataclasses.replace(self)
        object.__setattr__(copy, "_listed", listed)
        return copy

    @property
    def listed(self) -> dict[Any, Any]:
        """The examples of the places that were listed before, kept by `found` alone."""
        return vars(self).get("_listed", {})

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 where they are not known yet."""
        return len(self.classes)

    def open(self, split: Split) -> FileSource:
        """The files of a split."""
        from spmd.data import folders

        return folders.open_split(self, split)

    def open_all(self) -> FileSource:
        """All files of `path`, to predict; they need neither class nor mask."""
        from spmd.data import folders

        return folders.open_all(self)

    def content(self, split: Split, source: Callable[[], Source]) -> Content:
        """The files and labels of the split."""
        from spmd.data import folders

        files: Any = source()
        return folders.describe(files)
