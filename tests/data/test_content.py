"""Fingerprints of data: what changes them, what does not, and what a resumed run says of a difference."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

import spmd
from spmd.data import TFDS, Arrays, DataConfig, content, records
from spmd.data.content import Entry
from spmd.data.text import Mixture, Text

FEATURES = {"image": ((8, 8, 1), "uint8"), "label": ((), "int32")}


def lines(path: Path, words: str, num: int = 60) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{words} {i}"}) + "\n" for i in range(num)))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        lines(tmp_path / f"set/{name}.jsonl", name)
    return tmp_path


def text(*files, **kwargs):
    return Text(files=files or ("set/*.jsonl",), sequence_length=8, cache_dir="cache", **kwargs)


def known(config, split="train"):
    return content.describe(config, {split: lambda: config.open(split)})


# ---- what does not change it


SAME = {
    "another glob": lambda: text("set/b*", "set/../set/a*"),
    "absolute": lambda: text(os.path.abspath("set/*.jsonl")),
    "one by one": lambda: text("set/a.jsonl", "./set/b.jsonl"),
    "named twice": lambda: text("set/*.jsonl", "./set/a.jsonl"),
    "moved": lambda: os.rename("set", "moved") or text("moved/*.jsonl"),
    "copied": lambda: (
        shutil.copytree("set", "other/[1]") and text(os.path.abspath("other/[[]1]/*"))
    ),
    "touched": lambda: os.utime("set/a.jsonl", (1, 1)) or text(),
    "beside it": lambda: lines(Path("set/c.txt"), "c") or text(),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_content(case, place):
    before = known(text())
    now = known(SAME[case]())
    if case == "another glob":  # the order of reading is that of the globs
        assert content.describe_difference(before["train"], now["train"]) == [
            "  in another order: b.jsonl, a.jsonl"
        ]
    else:
        assert now == before


# ---- what does


def damaged(name: str, at: int) -> None:
    found = bytearray(Path(name).read_bytes())
    found[at] ^= 1
    stamp = os.stat(name)
    Path(name).write_bytes(found)
    os.utime(name, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a copy that keeps the times


CHANGED = {
    "added": (lambda: lines(Path("set/c.jsonl"), "c"), r"  added: c.jsonl \(\d+ bytes\)"),
    "added above": (lambda: lines(Path("d.jsonl"), "d"), r"  added: d.jsonl \(\d+ bytes\)"),
    "missing": (lambda: os.remove("set/b.jsonl"), r"  missing: b.jsonl \(\d+ bytes\)"),
    "longer": (
        lambda: lines(Path("set/b.jsonl"), "b", 61),
        r"  changed: b.jsonl \(\d+ -> \d+ bytes\)",
    ),
    "first byte": (lambda: damaged("set/b.jsonl", 10), "  changed: b.jsonl$"),
    "last byte": (lambda: damaged("set/b.jsonl", -3), "  changed: b.jsonl$"),
    "renamed": (lambda: os.rename("set/b.jsonl", "set/z.jsonl"), "  renamed: b.jsonl -> z.jsonl"),
    "exchanged": (
        lambda: [os.rename(f"set/{a}.jsonl", f"set/{b}.jsonl") for a, b in ("ax", "ba", "xb")],
        "  changed: a.jsonl, b.jsonl",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_another_content(case, place):
    change, message = CHANGED[case]
    before = known(text())
    change()
    now = known(text("set/*.jsonl", "*.jsonl") if case == "added above" else text())
    (line,) = content.describe_difference(before["train"], now["train"])
    assert re.fullmatch(message, line), line
    assert content.digest_content(before["train"]) != content.digest_content(now["train"])


def test_the_cache_of_tokens_follows_what_keeps_its_size_and_its_time(place):
    before = text().open("train").tokens.tolist()
    damaged("set/a.jsonl", 10)
    assert text().open("train").tokens.tolist() != before


def test_only_the_ends_of_large_files_are_read(place, monkeypatch):
    monkeypatch.setattr(content, "EDGE", 100)
    ends = content.describe_files(["set/a.jsonl"])
    damaged("set/a.jsonl", 500)
    content._MEMORY.clear()
    assert content.describe_files(["set/a.jsonl"]) == ends
    damaged("set/a.jsonl", -50)
    assert content.describe_files(["set/a.jsonl"]) != ends


def test_digests_of_large_sets_are_remembered_on_disk(place, monkeypatch):
    monkeypatch.setattr(content, "_REMEMBER", 1)
    want = content.describe_files(["set/a.jsonl", "set/b.jsonl"], "cache")
    content._MEMORY.clear()
    monkeypatch.setattr(content, "_digest_ends", None)  # nothing is read again
    assert content.describe_files(["set/a.jsonl", "set/b.jsonl"], "cache") == want
    (file,) = Path("cache/content").iterdir()
    file.write_text("{")
    content._MEMORY.clear()
    with pytest.raises(TypeError):
        content.describe_files(["set/a.jsonl", "set/b.jsonl"], "cache")


def test_ten_thousand_files_take_two_seconds(tmp_path):
    for i in range(10_000):
        (tmp_path / f"{i}.txt").write_text(str(i))
    paths = [str(tmp_path / f"{i}.txt") for i in range(10_000)]
    seconds = []
    for _ in range(3):
        content._MEMORY.clear()
        began = time.perf_counter()
        assert len(content.describe_files(paths)) == 10_000
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2


# ---- every kind of source


class Own(DataConfig):
    """Says nothing of its content."""

    values = tuple(range(1000))
    random = False

    def open(self, split):
        parent = self

        class Rows:
            def __len__(self):
                return len(parent.values)

            def take(self, indices):
                x = np.array(parent.values)[indices]
                return {"x": x + np.random.default_rng().random(len(x)) if parent.random else x}

        return Rows()


class Doubled(TFDS):
    """Reads something else than its base describes."""

    def open(self, split):
        return Own().open(split)


def arrays(**change):
    made = {"x": np.arange(600.0).reshape(200, 3), "y": np.arange(200)} | change
    return Arrays(train=lambda: made, eval=lambda: made)


def changed(x, at):
    x = x.copy()
    x[at] += 1
    return x


def test_arrays_are_known_by_their_bytes(monkeypatch):
    x = np.arange(600.0).reshape(200, 3)
    before = known(arrays())
    assert known(arrays()) == before
    for other in (changed(x, (77, 1)), x.astype(np.float32), x[:199]):
        y = np.arange(len(other))
        (line, *_) = content.describe_difference(
            before["train"], known(arrays(x=other, y=y))["train"]
        )
        assert line.startswith("  changed: x")
    monkeypatch.setattr(content, "ARRAY", 100)  # large ones by both ends, and rows between
    monkeypatch.setattr(content, "EDGE", 100)
    assert known(arrays(x=changed(x, 0))) != known(arrays()) != known(arrays(x=changed(x, -1)))


def test_a_source_that_says_nothing_is_sampled():
    own = Own()
    before = known(own)
    assert before == {"train": [Entry("x", 1000, before["train"][0].digest)]}
    for values in (
        tuple(range(999)),
        (*range(999), 0),
        (1, *range(1, 1000)),
        tuple(map(float, range(1000))),
    ):
        other = Own()
        object.__setattr__(other, "values", values)
        assert known(other) != before
    object.__setattr__(own, "random", True)  # by its length and its features alone
    assert known(own) == known(own)
    assert known(Doubled(name="digits")) == before


def test_tfds_mixtures_and_tokenizers(tmp_path, place):
    digits = TFDS(name="digits", features=FEATURES, cache_dir=str(tmp_path / "c"))
    before = known(digits)
    assert [e.name for e in before["train"]] == [
        "digits-train.array_record-00000-of-00001",
        "features.json",
    ]
    shutil.move(tmp_path / "c/tfds", tmp_path / "sets")
    moved = dataclasses.replace(digits, dir=str(tmp_path / "sets"))
    assert known(moved) == before != known(moved, "eval")
    sequence = Text(name="stdlib_source", eval_split="test", sequence_length=64)
    assert known(sequence)["train"] != known(sequence, "eval")["eval"]
    both = Mixture(
        parts=(text("set/a.jsonl"), text("set/b.jsonl")),
        weights=(1, 1),
        sequence_length=8,
        cache_dir="cache",
    )
    assert [e.name for e in known(both)["train"]] == ["0: a.jsonl", "1: b.jsonl"]
    assert known(text())["tokenizer"] != known(text(tokenizer="chars"))["tokenizer"]
    assert known(text())["train"] == known(text(), "eval")["eval"]


@pytest.mark.parametrize("edge", [100, 2**20])
def test_an_embedded_set_prepared_anew_is_the_same(tmp_path, monkeypatch, edge):
    """TFDS writes the features of a record in the order of a hash table, which each process has its own."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    monkeypatch.setattr(records, "EDGE", edge)
    digits = TFDS(name="digits", features=FEATURES, cache_dir=str(tmp_path))
    before = known(digits)
    (shard,) = (tmp_path / "tfds/digits/1.0.0").glob("*-train.array_record*")
    reader = ArrayRecordReader(str(shard))
    found = reader.read_all()
    reader.close()

    def rewrite(change):
        writer = ArrayRecordWriter(str(shard), "group_size:1")
        for i, record in enumerate(found):
            (whole,) = records._split_message(record)
            features = change(i, records._split_message(whole))
            body = b"".join(b"\n" + varint(len(x)) + x for x in features)
            writer.write(b"\n" + varint(len(body)) + body)
        writer.close()
        return known(digits)

    assert rewrite(lambda i, features: features[::-1]) == before
    for at in (0, len(found) - 1):
        label = lambda x: x[:-1] + bytes([x[-1] ^ 1]) if b"label" in x else x
        now = rewrite(lambda i, xs, at=at, label=label: [label(x) if i == at else x for x in xs])
        assert content.describe_difference(before["train"], now["train"]) == [
            f"  changed: {shard.name}"
        ]
    assert rewrite(lambda i, features: features) == before


def varint(number):
    low = number & 0x7F
    return bytes([low | 0x80]) + varint(number >> 7) if number > 0x7F else bytes([low])


# ---- a run that is resumed


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
        data=Text(files=("set/*.jsonl",), sequence_length=8, batch_size=4, cache_dir="cache"),
        optimizer=AdamW(learning_rate=1e-2, schedule="constant", warmup_steps=0),
        train=TrainConfig(steps=2),
    )
"""


def test_a_resumed_run_has_the_same_data_or_says_what_differs(place):
    (place / "tiny.py").write_text(EXPERIMENT)
    load = lambda *words: spmd.load(
        str(place / "tiny.py"), ["--run.dir", "run", "--simulate", "1", *words]
    )
    load().train()
    config = json.loads((place / "run/config.json").read_text())
    assert {k for k in config["identity"] if "content" in k} == {
        f"data.content.{part}" for part in ("train", "eval", "tokenizer")
    }
    saved = {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()}
    lines(place / "set/c.jsonl", "c")
    for call in (lambda: load("--train.steps", "3").train(), lambda: load().restore()):
        with pytest.raises(
            ValueError, match=r"evaluation data of the run in run changed"
        ) as refused:
            call()
        for part in (
            "  added: c.jsonl (",
            "--run.fresh",
            "--run.dir",
            "put the data back",
        ):
            assert part in str(refused.value)
    assert {p: p.read_bytes() for p in (place / "run").rglob("*") if p.is_file()} == saved
    load().experiment.restore(same=("tokenizer",))  # what `sample` needs
    with pytest.raises(ValueError, match="the tokenizer of the run in run changed"):
        load("--data.tokenizer", "chars").experiment.restore(same=("tokenizer",))
    os.remove(place / "set/c.jsonl")
    os.rename(place / "set", place / "moved")
    moved = ("--data.files", "moved/*.jsonl", "--eval.every", "9")
    assert load("--train.steps", "3", *moved).train().steps == 3
    # A directory from before contents were recorded goes on with any; then it knows them.
    config = json.loads((place / "run/config.json").read_text())
    config["identity"] = {k: v for k, v in config["identity"].items() if "content" not in k}
    (place / "run/config.json").write_text(json.dumps(config))
    (place / "run/data.json").unlink()
    lines(place / "moved/c.jsonl", "c")
    assert load("--train.steps", "4", *moved).train().steps == 4
    os.remove(place / "moved/a.jsonl")
    with pytest.raises(ValueError, match=r"  missing: a.jsonl"):
        load("--train.steps", "5", *moved).train()
    (place / "run/data.json").write_text("{")  # without it the files have no names
    with pytest.raises(ValueError, match="training data and the evaluation data of the run"):
        load("--train.steps", "5", *moved).train()
