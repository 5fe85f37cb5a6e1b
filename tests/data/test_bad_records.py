"""Bad records: each is named with its file and line, or passes as an empty row that moves no other."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

import spmd
from spmd.data import loader
from spmd.data.skips import Skips
from spmd.data.text import Text

GOOD = [json.dumps({"text": f"a good line {i}"}).encode() for i in range(40)]


def text(*files, **options):
    return Text(files=files, sequence_length=8, cache_dir="cache", **options)


def write(name, lines):
    content = b"\n".join(lines) + b"\n"
    Path(name).write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    return name


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def tokens(name, **options):
    """Those of the file, evaluation included."""
    config = text(name, **options)
    return np.concatenate([config.open(split).tokens for split in ("train", "eval")]).tolist()


BAD = {
    "lone surrogate": (
        rb'{"text": "half \ud83d of one"}',
        r"half of a surrogate pair (\ud83d) at",
    ),
    "null": (b'{"text": null, "body": "x"}', "is null, not text. Fields with text: body"),
    "number": (b'{"text": 3}', "is a number (3), not text"),
    "another field": (
        b'{"Text": "x"}',
        "no field 'text' (data.field). Did you mean 'Text'? It has: Text",
    ),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8 (byte 0xff at 10: invalid start byte)"),
    "not JSON": (b'{"text": "x"', "not JSON: Expecting ',' delimiter at column 13"),
    "an array": (b'["x"]', "not a JSON object but a list"),
    "nested": (b"[" * 100_000, "nested too deeply"),
    "NUL bytes": (b"\0" * 8, "not JSON"),
}


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL", "x.ndjson.GZ"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_named_or_passes_without_a_trace(name, case):
    """Once N pass, the N+1st is refused; what is read is what it would be without them."""
    record, message = BAD[case]
    want = tokens(write("good.jsonl", GOOD))
    write(name, [*GOOD[:3], record, *GOOD[3:20], record, *GOOD[20:]])
    for limit, line in ((0, 4), (1, 22)):
        with pytest.raises(ValueError) as refused:
            tokens(name, skip_bad=limit)
        said = str(refused.value)
        assert f"{name}, line {line}: " in said and message in said and "skip" in said
        assert "\n" not in said
    assert tokens(name, skip_bad=2) == want
    opened = text(name, skip_bad=2).open("train")
    assert [why.split(":")[0] for why in opened.skipped] == [f"{name}, line 4", f"{name}, line 22"]


MARKED = {
    "x.jsonl": b"\xef\xbb\xbf",
    "x.JSONL": b"",
    "x.Jsonl.Gz": b"\xef\xbb\xbf",
    "x.NDJSON": b"",
}


@pytest.mark.parametrize("name", MARKED)
def test_a_mark_of_byte_order_and_capital_suffixes_change_nothing(name):
    want = tokens(write("good.jsonl", GOOD))
    assert tokens(write(name, [MARKED[name] + GOOD[0], *GOOD[1:]])) == want
    plain = [f"a good line {i}".encode() for i in range(40)]
    one = tokens(write("good.txt", plain))
    assert tokens(write("x.TXT", [MARKED[name] + plain[0], *plain[1:]])) == one


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.gz"])
@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_byte_of_a_compressed_file_is_refused(name, seed):
    """Wherever it is, trailer included. How many records follow is known for a file that is one document."""
    rng = np.random.default_rng(seed)
    write(name, [json.dumps({"text": rng.bytes(40).hex()}).encode() for _ in range(200)])
    found = bytearray(Path(name).read_bytes())
    for at in (*rng.integers(12, len(found) - 8, 3), -6):
        damaged = found.copy()
        damaged[at] ^= 1 << int(rng.integers(8))
        Path(name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"^{name}(, line \d+: | is damaged )"):
            tokens(name)
        if "jsonl" in name:
            with pytest.raises(
                ValueError, match=r"is damaged behind line .*data.skip_bad does not let it"
            ):
                tokens(name, skip_bad=10**6)
    if "txt" in name:
        other = write("y.txt", GOOD)
        both = text(name, other, skip_bad=1).open("train")
        assert (
            both.tokens.tolist() == text(other).open("train").tokens.tolist()
            and len(both.skipped) == 1
        )


def test_characters_of_a_bad_record_are_not_in_the_vocabulary():
    """Streamed: a document of several pieces counts only when all of it is good."""
    Path("bad.txt").write_bytes("Ω line\n".encode() * 60_000 + b"\xff")
    write("good.txt", [b"plain characters"] * 20)
    with pytest.raises(ValueError, match=r"^bad.txt, line 60001: not UTF-8"):
        text("*.txt", tokenizer="chars").open_tokenizer()
    known = text("*.txt", tokenizer="chars", skip_bad=1).open_tokenizer()
    assert known.vocab_size == text("good.txt", tokenizer="chars").open_tokenizer().vocab_size
    assert tokens("*.txt", tokenizer="chars", skip_bad=1) == tokens("good.txt", tokenizer="chars")


# ---- sources of examples


class Rows:
    """100 examples, some of which cannot be read."""

    def __init__(self, *bad):
        self._bad = bad

    def __len__(self):
        return 100

    def take(self, indices):
        for i in indices:
            if i in self._bad:
                raise ValueError(f"record {i} is torn")
        return {"x": indices.astype(np.float32) + 1}


def batches(source, skips, **options):
    made = loader.train_batches(source, batch_size=10, seed=3, stop=20, skips=skips, **options)
    return {
        name: np.concatenate([b[name] for b in made2])
        for made2 in [list(made)]
        for name in made2[0]
    }


BAD_ROWS = tuple(range(0, 100, 7))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("rows", [None, [2, 3, 5]])
def test_an_empty_row_keeps_its_example_and_moves_no_other(steps, rows):
    options = {"steps_per_dispatch": steps, "rows": None if rows is None else np.array(rows)}
    want, got = (batches(Rows(*bad), Skips("train", len(bad)), **options) for bad in ((), BAD_ROWS))
    np.testing.assert_array_equal(got["example_id"], want["example_id"])
    bad = np.isin(want["example_id"], BAD_ROWS)
    assert bad.sum() > 0
    np.testing.assert_array_equal(got["weight"], np.where(bad, 0, want["weight"]))
    np.testing.assert_array_equal(got["x"], np.where(bad, 0, want["x"]))


def test_every_bad_record_counts_once_over_epochs_and_evaluation():
    skips = Skips("train", 2)
    batches(Rows(7, 50), skips)  # two epochs
    assert sorted(skips.reasons) == [7, 50] and skips.merge([]) == 0
    with pytest.raises(
        ValueError, match="example 8 of the train data: record 8 is torn"
    ) as refused:
        skips.take(Rows(8), np.array([8]))
    assert "data.skip_bad" in str(refused.value) or "--data.skip-bad" in str(refused.value)
    found = list(loader.eval_batches(Rows(7, 50), batch_size=30, skips=Skips("evaluation", 2)))
    assert sum(b["weight"].sum() for b in found) == 98
    with pytest.raises(ValueError, match="example 50 of the evaluation data"):
        list(loader.eval_batches(Rows(7, 50), batch_size=30, skips=Skips("evaluation", 1)))


def test_the_limit_is_that_of_all_processes():
    """Each has found what the others have not; all end alike."""
    found = [{"3": "three"}, {"3": "three", "77": "seventy-seven"}, {"5": "five"}]
    assert Skips("train", 3).merge(found) == 3
    said = set()
    for own in found:
        skips = Skips("train", 2)
        skips.reasons = {int(i): why for i, why in own.items()}
        with pytest.raises(ValueError, match="seventy-seven") as refused:
            skips.merge(found)
        said.add(str(refused.value))
    assert len(said) == 1


EXPERIMENT = """
from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import TrainConfig

def config():
    return Experiment(
        model=Transformer(vocab=256, length=16, layers=1, embed=8, heads=1, kv_heads=1),
        task=LanguageModel(),
        data=Text(files=("x.jsonl",), sequence_length=8, batch_size=4, cache_dir="cache"),
        optimizer=AdamW(learning_rate=1e-2, schedule="constant", warmup_steps=0),
        train=TrainConfig(steps=4),
    )
"""


def test_a_run_counts_and_logs_what_it_passed_over(tmp_path, capsys):
    (tmp_path / "tiny.py").write_text(EXPERIMENT)
    write("x.jsonl", [*GOOD[:3], b'{"text": null}', *GOOD[3:]])
    load = lambda *words: spmd.load(
        str(tmp_path / "tiny.py"), ["--run.dir", "out", "--simulate", "1", *words]
    )
    with pytest.raises(
        ValueError, match=r"x.jsonl, line 4: the field 'text' \(data.field\) is null"
    ):
        load().train()
    assert not (tmp_path / "out").exists()
    run = load("--data.skip-bad", "1").train()
    assert (
        "passed over 1 bad records, each an empty row: x.jsonl, line 4" in capsys.readouterr().out
    )
    assert [x["data/skipped_records"] for x in run.history if "data/skipped_records" in x][-1] == 1
