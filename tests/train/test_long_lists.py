"""A run's vocabularies stand beside config.json, and are part of its identity all the same."""

from __future__ import annotations

import json

import pytest
from etils import epath

from spmd.train import long_lists, rundir

IDS = [f"user-{i}" for i in range(1000)]
FIELDS = {"model.dim": 8, "data.user_ids": IDS, "data.classes": ["a", "b"]}


def test_long_lists_are_kept_beside_config_json_and_compared_in_full(tmp_path):
    path = epath.Path(tmp_path)
    config = {"model": {"dim": 8}, "data": {"user_ids": tuple(IDS), "classes": ("a", "b")}}
    rundir.write_config(path, "x", config, FIELDS)
    text = (path / "config.json").read_text()
    assert "user-7" not in text and len(text.splitlines()) < 40
    written = rundir.read_config(path)["config"]["data"]
    assert written["classes"] == ["a", "b"] and written["user_ids"]["values"] == 1000
    assert json.loads((path / long_lists.FILE).read_text()) == {"data.user_ids": IDS}
    assert rundir.read_identity(path) == FIELDS
    assert rundir.inspect(path, FIELDS, fresh=False) == {}
    other = FIELDS | {"data.user_ids": [*IDS[:999], "user-x"]}
    with pytest.raises(ValueError, match="number 1000: 'user-999' -> 'user-x'"):
        rundir.inspect(path, other, fresh=False)
    # Lists without config.json are what a killed process left: the directory is free.
    (path / "config.json").unlink()
    assert rundir.inspect(path, FIELDS, fresh=False) == {}
    rundir.write_config(path, "x", config, FIELDS)
    lists = (path / long_lists.FILE).read_text()
    (path / long_lists.FILE).write_text(lists.replace("user-7", "user-8", 1))
    with pytest.raises(ValueError, match=r"config\.json is not a run's configuration"):
        rundir.read_identity(path)
    (path / long_lists.FILE).unlink()
    with pytest.raises(ValueError, match=r"config\.json is not a run's configuration"):
        rundir.read_identity(path)
