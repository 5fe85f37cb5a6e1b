"""Criteo's format: values, missing ones, mistakes; the first steps of its experiment."""

from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pytest

import spmd
from spmd.data import criteo
from spmd.data.criteo import Criteo

NUM = 200


@pytest.fixture
def config(tmp_path):
    text = "".join(criteo.generate_lines(NUM, seed=3))
    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "more.gz").write_bytes(gzip.compress(text.encode()))
    return Criteo(
        files=(str(tmp_path / "train.txt"),), ids=(50,) * 26, cache_dir=str(tmp_path / "cache")
    )


def by_python(line: str, ids: int) -> tuple[int, list[float], list[int]]:
    label, *values = line.rstrip("\n").split("\t")
    numbers = [np.log1p(max(int(x), 0)) if x else 0.0 for x in values[:13]]
    hashed = lambda x: 1 + int(criteo._mix(np.array([int(x, 16)], np.uint32))[0]) % (ids - 1)
    return int(label), numbers, [hashed(x) if x else 0 for x in values[13:]]


def test_values_are_those_of_each_line_and_splits_share_them(config, tmp_path):
    lines = (tmp_path / "train.txt").read_text().splitlines()
    train, held = config.open("train"), config.open("eval")
    assert len(train) + len(held) == NUM and len(held) == round(NUM / 7)
    index = np.array([5, 0, len(train) - 1])
    for source, first in ((train, 0), (held, len(train))):
        taken = source.take(index % len(source))
        for row, i in enumerate(index % len(source)):
            label, numbers, ids = by_python(lines[first + i], 50)
            assert taken["label"][row] == label
            np.testing.assert_allclose(taken["numbers"][row], numbers, rtol=1e-6)
            assert [taken[f"category_{c:02}"][row] for c in range(26)] == ids
    every = train.take(np.arange(len(train)))
    categories = np.stack([every[f"category_{c:02}"] for c in range(26)])
    assert (categories == 0).mean() == pytest.approx(0.1, abs=0.02)
    assert categories.min() == 0 and categories.max() == 49 and categories.dtype == np.int32
    zipped = dataclasses.replace(config, files=(str(tmp_path / "more.gz"),)).open("train")
    np.testing.assert_array_equal(zipped.take(index)["numbers"], train.take(index)["numbers"])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda v: v[:-1], r"is no log of Criteo's .* Expected 40 columns, got 39"),
        (lambda v: ["7", *v[1:]], r"line 4: the label is not 0 or 1"),
        (lambda v: [*v[:3], "many", *v[4:]], r"is no log of Criteo's .*conversion error to int32"),
        (lambda v: [*v[:14], "xyz", *v[15:]], r"line 4: category 1 is 'xyz', no hexadecimal"),
    ],
)
def test_a_line_in_another_format_is_named(config, tmp_path, change, message):
    lines = (tmp_path / "train.txt").read_text().splitlines()
    lines[3] = "\t".join(change(lines[3].split("\t")))
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        config.open("train")


@pytest.mark.gate
def test_the_first_steps_of_the_experiment(tmp_path, monkeypatch):
    """On generated lines, with small tables."""
    monkeypatch.setenv("SPMD_CACHE_DIR", str(tmp_path / "cache"))
    words = ["--model.limit", "100", "--data.limit", "100", "--data.generated", "2000"]
    words += ["--model.dim", "8", "--model.bottom", "16", "--model.top", "16"]
    words += ["--data.batch-size", "64", "--data.eval-batch-size", "64", "--train.steps", "20"]
    run = spmd.load("criteo_dlrm", [*words, "--run.dir", str(tmp_path / "run")]).train()
    assert run.metrics["eval/auc"] > 0.5 and np.isfinite(run.metrics["eval/loss"])
