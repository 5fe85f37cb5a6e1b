"""Pairs of texts: every format, packed rows against their pairs, the tokenizer, every mistake."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from spmd.cli import main
from spmd.data import loader
from spmd.data.text import bpe
from spmd.data.text.pairs import Pairs
from spmd.data.text.tokenizer import FromFile

PAIRS = [
    (f"the file {i} is open {'very ' * (i % 7)}".strip(), f"Die Datei {i} ist geöffnet")
    for i in range(60)
]


def write(root):
    """The same pairs in every format."""
    sides = {"en": [a for a, _ in PAIRS], "de": [b for _, b in PAIRS]}
    parquet.write_table(pa.table(sides | {"id": [0] * len(PAIRS)}), root / "p.parquet")
    rows = [json.dumps({"en": a, "de": b}, ensure_ascii=False) for a, b in PAIRS]
    (root / "p.jsonl").write_text("\n".join(rows))
    (root / "p.tsv").write_text("en\tde\n" + "".join(f"{a}\t{b}\n" for a, b in PAIRS))
    for name, lines in sides.items():
        (root / f"p.{name}").write_text("".join(f"{line}\n" for line in lines))


def data_of(root, file="p.jsonl", **options):
    files = {"files": (str(root / file),), "eval_files": (str(root / file),)}
    lengths = {"source_length": 96, "target_length": 80}
    columns = {"source_column": "en", "target_column": "de"}
    return Pairs(**{**files, **columns, **lengths, "cache_dir": str(root / "cache"), **options})


def read(batch, data):
    """The pairs of rows, by their segments; asserts what else a row holds."""
    tokenizer, found = data.open_tokenizer(), []
    for row in range(len(batch["tokens"])):
        one = {name: x[row] for name, x in batch.items()}
        num = one["segments"].max()
        assert num == one["source_segments"].max() >= 1
        for segment in range(1, num + 1):
            source, target = one["source_segments"] == segment, one["segments"] == segment
            assert (np.diff(np.flatnonzero(target)) == 1).all()
            np.testing.assert_array_equal(one["positions"][target], np.arange(target.sum()))
            np.testing.assert_array_equal(one["source_positions"][source], np.arange(source.sum()))
            assert one["source"][source][-1] == one["targets"][target][-1] == tokenizer.end
            assert one["tokens"][target][0] == tokenizer.end
            np.testing.assert_array_equal(one["tokens"][target][1:], one["targets"][target][:-1])
            decode = tokenizer.decode
            found.append((decode(one["source"][source]), decode(one["tokens"][target])))
        empty = one["segments"] == 0
        assert (one["targets"][empty] == -1).all() and (one["tokens"][empty] == 0).all()
    return found


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl", "p.tsv", "p.en"])
def test_rows_hold_each_pair_once(tmp_path, name):
    write(tmp_path)
    lines = {f"{s}target_files": (str(tmp_path / "p.de"),) for s in ("", "eval_")}
    data = data_of(tmp_path, name, **(lines if name == "p.en" else {}))
    source = data.open("train")
    assert len(source) < len(PAIRS) / 2
    assert sorted(read(source.take(np.arange(len(source))), data)) == sorted(PAIRS)
    assert list(data.pairs("eval")) == PAIRS
    singly = data_of(tmp_path, name, **(lines if name == "p.en" else {}), packed=False)
    assert len(singly.open("train")) == len(PAIRS)


def test_the_stream_goes_on_where_it_stopped(tmp_path):
    write(tmp_path)
    data = data_of(tmp_path)
    options = {"batch_size": 4, "seed": 0, "stop": 9}
    batches = list(loader.train_batches(data.open("train"), **options))
    later = list(loader.train_batches(data.open("train"), **options, start=5))
    for a, b in zip(batches[5:], later, strict=True):
        np.testing.assert_array_equal(a["source"], b["source"])


def test_a_trained_tokenizer_is_deterministic_and_kept(tmp_path, monkeypatch):
    write(tmp_path)
    texts = [text for pair in PAIRS for text in pair]
    assert bpe.train(texts, 300) == bpe.train(iter(texts), 300)
    data = data_of(tmp_path, tokenizer="bpe:300")
    tokenizer = data.open_tokenizer()
    assert tokenizer.vocab_size == 300 and tokenizer.end == 0
    odd = "Straße\t \x00 naïve ☃ </s>"
    assert tokenizer.decode(tokenizer.encode([odd])[0]) == odd
    monkeypatch.setattr(bpe, "train", None)  # from the cache
    assert data.open_tokenizer().key == tokenizer.key
    assert data_of(tmp_path, "p.parquet").open_tokenizer()
    monkeypatch.undo()
    out = tmp_path / "tokenizer.json"
    words = f"--data.files {tmp_path}/p.jsonl --data.eval-files {tmp_path}/p.jsonl".split()
    words += ["--data.source-column", "en", "--data.target-column", "de"]
    command = ["data", "tokenizer", "--experiment", "translate_help", *words]
    assert main([*command, "--vocab", "300", "--out", str(out)]) == 0
    assert FromFile(str(out)).key == tokenizer.key


MISTAKES = {
    "empty target": ('{"en": "a", "de": " "}', {}, "record 1 of bad: the column 'de' is empty"),
    "no text": ('{"en": "a", "de": 3}', {}, "the column 'de' is int, not text"),
    "no column": ('{"en": "a", "fr": "b"}', {}, "no column 'de'."),
    "no json": ('{"en": "a"', {}, "bad.jsonl, line 1: not JSON"),
    "too long": (json.dumps({"en": "a" * 99, "de": "b"}), {}, "(1 are longer); raise them"),
    "chars": ("", {"tokenizer": "chars"}, "data.tokenizer=chars has no token that ends a text"),
    "bpe": ("", {"tokenizer": "bpe:10"}, "data.tokenizer='bpe:10': write bpe:N"),
    "no end": ("", {"end": "none"}, "has no token that ends a text; give --data.end"),
    "both": ("", {"name": "wmt17_translate/de-en"}, "both data.files="),
    "one side": ("", {"target_files": ("x",)}, "give both, or neither"),
    "uneven": ("", {"files": ("p.en",), "lines": True}, "ends after 59 lines"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    text, options, message = MISTAKES[name]
    (tmp_path / "bad.jsonl").write_text(text or '{"en": "a", "de": "b"}')
    if options.pop("lines", False):
        (tmp_path / "p.de").write_text("b\n" * 59)
        options |= {f"{side}target_files": ("p.de",) for side in ("", "eval_")}
    with pytest.raises(ValueError) as error:
        data_of(tmp_path, "bad.jsonl", **options).open("train")
    assert message in str(error.value) and "\n" not in str(error.value)


COMMANDS = {
    "empty target": ("bad.jsonl", "", "record 1 of bad: the column 'de' is empty"),
    "longer": ("long.jsonl", "", "has no pair of at most data.source_length=48"),
    "vocabulary": ("p.jsonl", "--data.tokenizer bpe:600 --model.vocab 300", "--model.vocab"),
    "lengths": ("p.en", "--data.target-files p.de --data.eval-target-files p.de", "59 lines"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_mistakes_at_the_command(tmp_path, name, monkeypatch, capsys):
    """One line, exit code 2, nothing trained."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    (tmp_path / "p.de").write_text("b\n" * 59)
    (tmp_path / "bad.jsonl").write_text('{"en": "a", "de": " "}')
    (tmp_path / "long.jsonl").write_text(json.dumps({"en": "x" * 99, "de": "b"}))
    file, words, message = COMMANDS[name]
    command = f"--experiment translate_help --data.files {file} --data.eval-files {file} {words}"
    columns = ["--data.source-column", "en", "--data.target-column", "de"]
    capsys.readouterr()
    bytes_ = [] if "bpe" in words else ["--data.tokenizer", "bytes"]
    options = [*columns, *bytes_, "--data.cache-dir", "cache", "--run.dir", "run"]
    assert main([*command.split(), *options]) == 2
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if not line.endswith("data.target_length=48")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert "Traceback" not in said.err and "step" not in said.out


def test_bad_and_long_pairs_are_counted(tmp_path, capsys):
    lines = [
        '{"en": "a", "de": "b"}',
        '{"en": "", "de": "b"}',
        json.dumps({"en": "a" * 99, "de": "b"}),
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    source = data_of(tmp_path, skip_bad=1).open("train")
    assert (len(source), len(source.skipped), source.longer) == (1, 1, 1)
    assert (
        "1 of 3 pairs are left out, being longer than data.source_length=96"
        in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="Mend it, leave it out"):
        data_of(tmp_path).open("train")
