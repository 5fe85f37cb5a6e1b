"""Texts that stand in for a user's files."""

from __future__ import annotations

import dataclasses

from spmd.data.text import Text


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOrEmbedded(Text):
    """Files, where some are given, in place of the embedded text of `name`."""

    def __post_init__(self) -> None:
        if self.files and self.name == "stdlib_source":
            object.__setattr__(self, "name", "")
            object.__setattr__(self, "eval_split", "")
        super().__post_init__()
