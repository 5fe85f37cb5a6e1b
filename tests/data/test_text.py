"""Text: packed windows against an oracle that knows documents, mixtures, tokenizers, every mistake."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spmd
from spmd.data import formats, loader
from spmd.data.mixing import Turns
from spmd.data.text import Mixture, Text, corpus
from spmd.data.text.tokenizer import Bytes, Chars, FromFile
from spmd.data.text.windows import Windows, slice_tokens

ROOT = Path(__file__).parent.parent.parent
FEATURES = ["tokens", "targets", "segments", "positions"]
POEM = "Rose is a rose\n\tis a rose.\n" * 40


def oracle(documents, length, stride):
    """The windows, token by token."""
    flat = [(d, token) for d, document in enumerate(documents) for token in document]
    windows, first = [], 0
    while first + 1 < len(flat):
        rows, begin, segment = [], first, 0
        for at in range(first, first + length):
            if at >= len(flat):
                rows.append((0, -1, 0, 0))
                continue
            document, token = flat[at]
            if at == first or document != flat[at - 1][0]:
                begin, segment = at, segment + 1
            follows = at + 1 < len(flat) and flat[at + 1][0] == document
            rows.append((token, flat[at + 1][1] if follows else -1, segment, at - begin))
        windows.append(np.array(rows).T)
        if first + length >= len(flat) - 1:
            break
        first += stride or length
    return windows


def windows_of(documents, length, stride=0):
    tokens = np.array([t for d in documents for t in d], np.uint16)
    starts = np.cumsum([0, *map(len, documents)])[: len(documents)].astype(np.int64)
    return Windows(tokens, starts, length, stride)


DOCUMENTS = st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=9), max_size=12)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(DOCUMENTS, st.integers(1, 9), st.integers(0, 9), st.randoms(use_true_random=False))
def test_windows_are_the_oracles(documents, length, stride, random):
    stride = min(stride, length)
    source, want = windows_of(documents, length, stride), oracle(documents, length, stride)
    assert len(source) == len(want)
    if not want:
        return
    chosen = [random.randrange(len(want)) for _ in range(5)]
    batch = source.take(np.array(chosen, np.int64))
    assert list(batch) == FEATURES
    assert all(x.dtype == np.int32 and x.flags.c_contiguous for x in batch.values())
    for row, index in enumerate(chosen):
        got = np.stack([batch[name][row] for name in FEATURES])
        np.testing.assert_array_equal(got, want[index])


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(DOCUMENTS.filter(len), st.data())
def test_a_part_of_the_tokens_is_the_text_cut_there(documents, data):
    flat = [(d, t) for d, document in enumerate(documents) for t in document]
    start = data.draw(st.integers(0, len(flat) - 1))
    stop = data.draw(st.integers(start + 1, len(flat)))
    source = windows_of(documents, 4)
    cut = Windows(*slice_tokens(source.tokens, source.starts, start, stop), 4)
    inside = flat[start:stop]
    kept = [[t for d, t in inside if d == n] for n in sorted({d for d, _ in inside})]
    want = oracle(kept, 4, 0)
    assert len(cut) == len(want)
    for i, window in enumerate(want):
        got = cut.take(np.array([i]))
        np.testing.assert_array_equal(np.stack([got[n][0] for n in FEATURES]), window)


def test_with_stride_one_each_character_begins_a_window():
    """nanoGPT's random windows: positions 0 to len(data) - length - 1."""
    source = windows_of([list(range(100))], 10, 1)
    assert len(source) == 90
    batch = source.take(np.arange(90))
    assert sorted(batch["tokens"][:, 0]) == list(range(90))
    assert (batch["targets"] == batch["tokens"] + 1).all() and (batch["segments"] == 1).all()


# ---- mixtures


WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=7)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(WEIGHTS)
def test_after_any_number_of_examples_each_part_is_within_one_of_its_share(weights):
    which, before = Turns(weights).assign(np.arange(3 * sum(weights)))
    counts = np.cumsum(which[:, None] == np.arange(len(weights)), axis=0)
    share = np.array(weights) / sum(weights)
    assert np.abs(counts - share * np.arange(1, len(which) + 1)[:, None]).max() < 1
    np.testing.assert_array_equal(before, counts[np.arange(len(which)), which] - 1)


@pytest.fixture
def files(tmp_path):
    """Three texts, of 700, 250 and 90 bytes."""
    for name, letter, num in (("a", "a", 700), ("b", "b", 250), ("c", "c", 90)):
        (tmp_path / f"{name}.txt").write_text(letter * num)
    return tmp_path


def mixture(files, **kwargs):
    texts = tuple(
        Text(files=(str(files / f"{n}.txt"),), eval_files=(str(files / "a.txt"),)) for n in "abc"
    )
    given = {"parts": texts, "weights": (0.5, 0.3, 0.2), "sequence_length": 8}
    return Mixture(**(given | {"cache_dir": str(files / "cache")} | kwargs))


def stream(source, steps, batch_size=10, **kwargs):
    found = list(loader.train_batches(source, seed=3, batch_size=batch_size, stop=steps, **kwargs))
    return {name: np.concatenate([b[name] for b in found]) for name in found[0]}


def test_a_mixture_reads_each_part_by_its_share_and_in_epochs_of_its_own(files):
    source = mixture(files).open("train")
    sizes = [len(p) for p in source.parts]
    ids = stream(source, 60)["example_id"]
    which = np.searchsorted(np.cumsum(sizes), ids, side="right")
    for n in (1, 7, 100, 599):
        counts = np.bincount(which[:n], minlength=3)
        assert np.abs(counts - np.array([0.5, 0.3, 0.2]) * n).max() < 1
    for k, size in enumerate(sizes):
        mine = ids[which == k] - sum(sizes[:k])
        assert len(mine) > 2 * size  # several epochs, each a shuffle of all its windows
        epochs = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        assert (epochs[0] != epochs[1]).any()


def test_weights_of_a_mixture_by_step(files):
    """At step 5 the shares change, at step 9 one part ends; the order is one function of the position."""
    shares = [(0, (0.5, 0.3, 0.2)), (50, (0.2, 0.2, 0.6)), (90, (0, 1, 3))]
    schedule = ((5, shares[1][1]), (9, shares[2][1]))
    source = mixture(files, schedule=schedule, batch_size=10).open("train")
    sizes = [len(p) for p in source.parts]
    ids = stream(source, 40)["example_id"]
    which = np.searchsorted(np.cumsum(sizes), ids, side="right")
    for (start, weights), (end, _) in zip(shares, [*shares[1:], (400, ())], strict=True):
        for n in range(1, end - start + 1):
            counts = np.bincount(which[start : start + n], minlength=3)
            assert np.abs(counts - np.array(weights) / sum(weights) * n).max() < 1
    for k, size in enumerate(sizes):  # epochs go on where the shares change
        mine = ids[which == k] - sum(sizes[:k])
        epochs = mine[: len(mine) // size * size].reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    np.testing.assert_array_equal(stream(source, 40, start=7)["example_id"], ids[70:])
    for position in (1, 49, 50, 51, 90, 333):
        consumed = source.consumed(position)
        counts = [consumed[f"data/part_{k}/tokens"] / 8 for k in range(3)]
        assert counts == [*np.bincount(which[:position], minlength=3)]
    for bad, message in (
        (((5, (1, 1, 1)), (5, (1, 1, 2))), "must ascend"),
        (((5, (1, 1)),), "one number for each of the 3 parts"),
        (((5, (0, 0, 0)),), "one of them more than 0"),
        (((5, (1, 1, 1.00001)),), "fewer digits"),
    ):
        with pytest.raises(ValueError, match=message):
            mixture(files, schedule=bad)


def test_the_rows_of_a_mixture_are_those_of_its_parts(files):
    source = mixture(files).open("train")
    batch = source.take(np.arange(len(source)))
    letters = [set(Bytes().decode(row)) - {"\0"} for row in batch["tokens"]]
    assert letters == [{n} for n, p in zip("abc", source.parts, strict=True) for _ in range(len(p))]
    assert len(mixture(files).open("eval")) == 3 * -(-700 // 8)  # each part evaluates on a.txt


@pytest.mark.parametrize("kind", ["text", "mixture"])
def test_the_stream_is_a_pure_function_of_seed_and_step(files, kind):
    """Resumed at any step, cut over processes, threads or dispatches, it is the same stream."""
    config = mixture(files)
    source = config.open("train") if kind == "mixture" else config.texts()[0].open("train")
    whole = stream(source, 40)
    resumed = stream(source, 40, start=17)
    rows = [stream(source, 40, rows=np.arange(p * 5, p * 5 + 5), threads=4) for p in range(2)]
    scanned = list(
        loader.train_batches(source, seed=3, batch_size=10, stop=40, steps_per_dispatch=4)
    )
    for name, x in whole.items():
        np.testing.assert_array_equal(resumed[name], x[170:])
        halves = [r[name].reshape(40, 5, *x.shape[1:]) for r in rows]
        np.testing.assert_array_equal(np.concatenate(halves, axis=1).reshape(x.shape), x)
        np.testing.assert_array_equal(
            np.concatenate([b[name] for b in scanned]).reshape(x.shape), x
        )


# ---- documents and their cache


def everything(config, split="train"):
    source = config.open(split)
    return source.tokens, source.starts


def text(root, *names, **kwargs):
    given = {"sequence_length": 4, "cache_dir": str(root / "cache")}
    return Text(files=tuple(str(root / n) for n in names), **(given | kwargs))


def test_files_lines_rows_and_compressed_files_are_documents(tmp_path):
    said = ["one", "zwei\r\nzwölf", "", "trois \U0001f600"]
    lines = "".join(json.dumps({"text": t, "n": 1}) + "\n\n" for t in said)
    (tmp_path / "b.jsonl").write_text(lines)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    column = pa.array(said).dictionary_encode()
    table = pa.table({"n": range(len(said)), "text": column})
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=3)
    (tmp_path / "a.txt").write_bytes(b"ein\r\nText")
    (tmp_path / "empty.txt").write_text("")
    config = text(tmp_path, "*.txt", "*.jsonl*", "*.parquet", eval_files=(str(tmp_path / "a.txt"),))
    tokens, starts = everything(config)
    encode = lambda t: [*t.encode("utf-8", "surrogatepass"), 255]
    want = [encode(t) for t in ("ein\r\nText", *3 * ("one", "zwei\r\nzwölf", said[3]))]
    assert np.split(tokens, starts[1:].tolist())[0].tolist() == want[0]
    assert [x.tolist() for x in np.split(tokens, starts[1:])] == want
    assert tokens.dtype == np.uint16
    no_end, _ = everything(text(tmp_path, "a.txt", eval_fraction=0.01, end="none"))
    assert no_end.tolist() == list(b"ein\r\nTex")


def test_the_last_part_is_evaluated_where_nothing_else_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    config = text(tmp_path, "a.txt", tokenizer="chars")
    train, evaluated = everything(config)[0], everything(config, "eval")[0]
    cut = int(len(POEM) * 0.9)  # nanoGPT's
    tokenizer = config.open_tokenizer()
    assert tokenizer.vocab_size == len(set(POEM))
    assert (tokenizer.decode(train), tokenizer.decode(evaluated)) == (POEM[:cut], POEM[cut:])


def test_a_long_text_is_encoded_in_pieces_as_it_is_whole(tmp_path, monkeypatch, bpe):
    (tmp_path / "a.txt").write_text(POEM)
    whole = everything(text(tmp_path, "a.txt", tokenizer=bpe))
    monkeypatch.setattr(formats, "PIECE", 50)
    monkeypatch.setattr(formats, "CHUNK", 200)
    config = text(tmp_path, "a.txt", tokenizer=bpe, cache_dir=str(tmp_path / "pieces"))
    seen = list(corpus.file_documents(config.files, "text", "").pieces())
    assert len(seen) > 10 and "".join(p.text for p in seen) == POEM
    assert [p.first for p in seen].count(True) == [p.last for p in seen].count(True) == 1
    for a, b in zip(whole, everything(config), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_cache_is_written_once_mended_and_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    config = text(tmp_path, "a.txt")
    want = everything(config)[0].tolist()
    (cache,) = (tmp_path / "cache/tokens").iterdir()
    stamp = (cache / "tokens.npy").stat().st_mtime_ns
    everything(config)
    assert (cache / "tokens.npy").stat().st_mtime_ns == stamp
    known = json.loads((cache / "complete.json").read_text())
    assert (known["tokens"], known["documents"]) == (len(POEM) + 1, 1)
    for damage in (
        lambda: (cache / "tokens.npy").write_bytes(b"short"),
        lambda: (cache / "complete.json").unlink(),
    ):
        damage()
        assert everything(config)[0].tolist() == want
    (tmp_path / "a.txt").write_text(POEM.replace("rose", "lily"))
    assert everything(config)[0].tolist() != want
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 2


@pytest.mark.multiprocess
def test_processes_may_tokenize_at_once(tmp_path):
    (tmp_path / "a.txt").write_text(POEM * 100)
    code = (
        "from spmd.data.text import Text; print(len(Text(files=('a.txt',), cache_dir='cache',"
        " tokenizer='chars', sequence_length=16).open('train')))"
    )
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert len({p.communicate(timeout=60)[0] for p in [start() for _ in range(3)]} - {""}) == 1
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 2  # characters and tokens


def test_the_standard_library_is_a_data_set():
    config = Text(name="stdlib_source", eval_split="test", sequence_length=64)
    counts = {split: len(config.open(split).starts) for split in ("train", "eval")}
    assert counts["train"] > 100 and counts["eval"] >= 5
    source, tokenizer = config.open("train"), config.open_tokenizer()
    documents = np.split(source.tokens, source.starts[1:])
    ours = Path(json.__file__).parent.parent / "bisect.py"
    both = [*documents, *np.split(*(lambda s: (s.tokens, s.starts[1:]))(config.open("eval")))]
    assert ours.read_text("utf-8") in [tokenizer.decode(d) for d in both]
    assert all(d[-1] == 255 and (d[:-1] != 255).all() for d in both)


# ---- tokenizers


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A byte-level BPE with GPT-2's end token, trained on the poem."""
    import tokenizers

    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(
        [POEM],
        vocab_size=300,
        min_frequency=1,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    made.save(str(path))
    return str(path)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.text())
def test_bytes_and_characters_come_back(said):
    tokenizer = Bytes()
    (ids,) = tokenizer.encode([said])
    assert tokenizer.decode([*ids, 255]) == said and 255 not in ids
    chars = Chars("".join(sorted({*said, "x"})))
    assert chars.decode(chars.encode([said])[0]) == said


def test_a_file_tokenizer(bpe, tmp_path):
    tokenizer = FromFile(bpe)
    assert (tokenizer.end, tokenizer.begin) == (0, None)
    ids, other = tokenizer.encode([POEM, "Zürich"])
    assert tokenizer.decode([*ids, 0]) == POEM and len(ids) < len(POEM) / 2
    assert tokenizer.decode(other) == "Zürich"
    (injected,) = tokenizer.encode(["a<|endoftext|>b"])  # text, not the end of a document
    assert 0 not in injected and tokenizer.decode(injected) == "a<|endoftext|>b"
    assert FromFile(bpe, "none").end is None
    (tmp_path / "a.txt").write_text(POEM)
    tokens, _ = everything(text(tmp_path, "a.txt", tokenizer=bpe, eval_fraction=1e-6))
    assert tokens.tolist() == [*ids]  # the end was kept for evaluation


def test_a_file_tokenizer_that_begins_documents(bpe, tmp_path):
    """As Llama's: its post-processor puts a token before each text."""
    import tokenizers

    made = tokenizers.Tokenizer.from_file(bpe)
    made.add_special_tokens(["<s>"])
    one = made.token_to_id("<s>")
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", one)]
    )
    made.save(str(tmp_path / "begins.json"))
    said = [{"text": "Rose"}, {"text": "is a rose"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, said)))
    config = text(tmp_path, "a.jsonl", tokenizer=str(tmp_path / "begins.json"), eval_fraction=1e-6)
    tokenizer = config.open_tokenizer()
    assert (tokenizer.begin, tokenizer.end, tokenizer.vocab_size) == (one, 0, one + 1)
    tokens, starts = everything(config)
    assert tokens[starts].tolist() == [one, one] and tokens[starts[1] - 1] == 0
    assert tokenizer.decode(tokens) == "Roseis a rose"


# ---- mistakes

MISTAKES = {
    "column": (
        {"files": ("a.parquet",), "field": "txt"},
        r"no column 'txt' \(data.field\).*It has: n, text",
    ),
    "column of numbers": (
        {"files": ("a.parquet",), "field": "n"},
        r"the column 'n' \(data.field\) is int64, not text. Columns with text: text",
    ),
    "empty row": ({"files": ("a.parquet",)}, "a.parquet, row 2: the column 'text' .* is empty"),
    "torn table": (
        {"files": ("torn.parquet",)},
        "torn.parquet is no Parquet file that can be read",
    ),
    "not Parquet": (
        {"files": ("a.parquet",), "format": "jsonl"},
        "is Parquet by its name: leave out --data.format jsonl",
    ),
    "other suffix": ({"files": ("table.txt",)}, "no text by its first bytes, but Parquet: give it"),
    "nothing": ({}, "no text is named; give --data.files"),
    "both": ({"files": ("a.txt",), "name": "digits"}, "give one of them"),
    "no match": ({"files": ("no*.txt",)}, r"no file matches data.files='no\*.txt'"),
    "no eval": ({"eval_files": ("gone",)}, "no file matches data.eval_files='gone'"),
    "json": ({"files": ("bad.jsonl",)}, r"bad.jsonl, line 3: not JSON: Expecting value at column"),
    "field": (
        {"files": ("a.jsonl",), "field": "txt"},
        r"a.jsonl, line 1: no field 'txt' \(data.field\). Did you mean 'text'\? It has: text",
    ),
    "no object": ({"files": ("list.jsonl",)}, r"line 1: not a JSON object but a list"),
    "number": (
        {"files": ("number.jsonl",)},
        r"number.jsonl, line 1: the field 'text' .* number \(1\)",
    ),
    "utf-8": ({"files": ("latin.txt",)}, "latin.txt, line 1: not UTF-8"),
    "gzip": ({"files": ("torn.txt.gz",)}, "torn.txt.gz is damaged near line 1"),
    "short": ({"sequence_length": 2000}, "too few to fill a sequence of data.sequence_length=2000"),
    "empty": ({"files": ("empty.txt",)}, r"has 0 tokens, too few .*\(without a byte: empty.txt\)"),
    "no characters": ({"files": ("empty.txt",), "tokenizer": "chars"}, "is empty"),
    "tokenizer": (
        {"tokenizer": "gone.json"},
        "no tokenizer file 'gone.json'; give --data.tokenizer",
    ),
    "no tokenizer": ({"tokenizer": "a.jsonl"}, "a.jsonl is not a Hugging Face tokenizer.json"),
    "end": ({"end": "<stop>"}, "with data.tokenizer=bytes give auto or none"),
    "set": ({"files": (), "name": "stdlib_sourc"}, "Did you mean 'stdlib_source'"),
    "split": (
        {"files": (), "name": "stdlib_source", "train_split": "train+tset"},
        "Did you mean 'test'",
    ),
    "feature": ({"files": (), "name": "stdlib_source", "field": "txt"}, "Did you mean 'text'"),
    "no text": (
        {"files": (), "name": "digits", "field": "label"},
        "'label' of 'digits' is no text",
    ),
    "length": ({"sequence_length": 0}, "data.sequence_length=0 must be at least 1"),
    "stride": ({"stride": -1}, "data.stride=-1 must be at least 0"),
    "gaps": ({"stride": 5}, "data.stride=5 must be at most data.sequence_length=4"),
    "fraction": ({"eval_fraction": 1.0}, "data.eval_fraction=1.0 must be between 0 and 1"),
}


def test_a_file_is_read_once_whatever_names_it(tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    (tmp_path / "link.txt").symlink_to("a.txt")
    every = corpus.file_documents(
        [str(tmp_path / "*.txt"), str(tmp_path / "a*")], "text", "data.files"
    )
    assert len(every.content) == 1
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(POEM.encode()))
    with pytest.raises(ValueError, match=r"a\.txt and .*a\.txt\.gz, one the other compressed"):
        corpus.file_documents([str(tmp_path / "a*")], "text", "data.files")


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(POEM)
    Path("empty.txt").write_text("")
    Path("a.jsonl").write_text('{"text": "one"}\n')
    Path("bad.jsonl").write_text('{"text": "one"}\n\n{"text": \n')
    Path("list.jsonl").write_text('["one"]\n')
    Path("number.jsonl").write_text('{"text": 1}\n')
    Path("latin.txt").write_bytes(b"\xe4\xf6\xfc")
    pq.write_table(pa.table({"n": [1, 2], "text": ["one", None]}), "a.parquet")
    Path("torn.parquet").write_bytes(Path("a.parquet").read_bytes()[:-9])
    Path("table.txt").write_bytes(Path("a.parquet").read_bytes())
    Path("torn.txt.gz").write_bytes(gzip.compress(POEM.encode() * 9)[:60])
    kwargs, message = MISTAKES[case]
    given = {"files": ("a.txt",)} if kwargs else {}
    with pytest.raises(ValueError, match=message):
        Text(**({"sequence_length": 4, "cache_dir": "cache"} | given | kwargs)).open("train")
    tokens = Path("cache/tokens")
    assert not tokens.exists() or not list(tokens.glob(".*"))  # nothing half-written stays


MIXED = {
    "number": ({"weights": (1, 2)}, "one number for each of the 3 parts"),
    "zero": ({"weights": (1, 2, 0)}, "must all be more than 0"),
    "digits": ({"weights": (1, 2, 0.1234567)}, "with fewer digits"),
    "chars": ({"tokenizer": "chars"}, "a mixture needs bytes or a file"),
}


@pytest.mark.parametrize("case", MIXED)
def test_mistakes_of_mixtures(case, files):
    kwargs, message = MIXED[case]
    with pytest.raises(ValueError, match=message):
        mixture(files, **kwargs).open("train")


def test_a_model_of_a_smaller_vocabulary_or_a_shorter_one_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    config = text(tmp_path, "a.txt")
    model = lambda **fields: types.SimpleNamespace(**fields)
    config.check_model(model(vocab=256, length=4))
    config.check_model(model())
    config.check_model(model(vocab=50304))  # padded
    with pytest.raises(
        ValueError, match=r"model.vocab=255 is less than the 256 .* --model.vocab 256,"
    ):
        config.check_model(model(vocab=255))
    with pytest.raises(ValueError, match=r"sequence_length=4 is more than model.length=3"):
        config.check_model(model(vocab=256, length=3))


# ---- the command line


@pytest.mark.gate
def test_commands(run_main, tmp_path):
    (tmp_path / "poem.txt").write_text(POEM)
    mine = ("--experiment", "lm_shakespeare", "--data.name", "", "--data.files", "poem.txt")
    mine = (*mine, "--data.eval-split", "", "--data.batch-size", "8")
    shown = run_main("data", "show", *mine)
    assert shown.returncode == 0, shown.stderr
    assert f"vocabulary: {len(set(POEM))}" in shown.stdout and "    Rose is a" in shown.stdout
    assert run_main("data", "prepare", *mine).returncode == 0
    refused = run_main(*mine, "--train.steps", "2", "--model.vocab", 4)
    assert refused.returncode == 2 and f"use --model.vocab {len(set(POEM))}" in refused.stderr
    assert "Traceback" not in refused.stderr and not (tmp_path / "runs").exists()
    words = (*mine, "--model.vocab", len(set(POEM)), "--optimizer.warmup-steps", 1)
    words = (*words, "--simulate", 4, "--mesh.fsdp", 4, "--mesh.data", 1, "--train.steps", 3)
    done = run_main(*words, "--eval.every", 3)
    assert done.returncode == 0, done.stderr
    assert "eval/loss" in done.stdout


def test_words_of_the_command_line_reach_the_declared_features():
    config = spmd.load("lm_stdlib", ["--data.sequence-length", "24"]).experiment.data
    assert config.abstract_batch(2)["tokens"] == ((2, 24), "int32")
