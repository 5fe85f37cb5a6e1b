"""run.py predict: a row for each example, in Parquet or JSON lines, from any mesh."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

import spmd
from spmd.cli import predict


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_predictions_are_those_of_the_run(suffix, run_main, tmp_path, digits_run):
    words = ["predict", "--experiment", "digits", "--run.dir", digits_run, "--simulate", "1"]
    out = tmp_path / f"out.{suffix}"
    # 359 examples in batches of 100: the last one is padded.
    done = run_main(*words, "--out", out, "--data.eval-batch-size", "100")
    assert done.returncode == 0, done.stderr
    assert f"{out}: 359 rows, step 60" in done.stdout
    if suffix == "parquet":
        rows = pq.read_table(out).to_pylist()
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["example"] for row in rows] == list(range(359))
    exp = spmd.load("digits", ["--run.dir", str(digits_run), "--simulate", "1"])
    snapshot = exp.restore()
    examples = snapshot.program.open_evaluation().take(np.arange(359))
    want = snapshot.predict(examples)
    np.testing.assert_allclose([row["output"] for row in rows], want, rtol=1e-5, atol=1e-5)
    right = want.argmax(-1) == examples["label"]
    assert right.mean() == pytest.approx(snapshot.evaluate()["eval/accuracy"])
    assert [*tmp_path.glob(".out*")] == []

    again = run_main(*words, "--out", out)
    assert again.returncode == 2
    assert f"--out {out} exists; name a new file" in again.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the new file: run.py predict --experiment NAME --out FILE.parquet"),
        (["--out", "x.csv"], "--out x.csv is neither .parquet nor .jsonl"),
        (["--out", "no/where.jsonl"], "--out no/where.jsonl: there is no directory no"),
    ],
)
def test_mistakes_with_predictions(words, message, run_main, digits_run):
    done = run_main("predict", "--experiment", "digits", "--run.dir", digits_run, *words)
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


class Files:
    """Examples that are files."""

    def name_of(self, index: int) -> str:
        return f"{index}.png"


@pytest.mark.parametrize("name", ["example", "file"])
def test_an_output_may_not_have_the_name_of_a_column(name):
    outputs = {"scores": np.ones((2, 3)), name: np.ones(2)}
    with pytest.raises(ValueError, match=f"an output named '{name}'.*its outputs: scores, {name}"):
        predict.columns_of(outputs, 0, Files())
    columns = predict.columns_of({"scores": outputs["scores"]}, 7)
    assert [*columns] == ["example", "scores"] and columns["example"].tolist() == [7, 8]
