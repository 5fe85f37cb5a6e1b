"""Tables: each format gives the same rows, types are checked, orders are pure in (seed, epoch)."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spmd.data import loader
from spmd.data.grouped import GroupOrder
from spmd.data.tables import Table
from spmd.data.transform import Transform

ROWS = 1000
FEATURES = {
    "x": ((3,), "float32"),
    "label": ((), "int32"),
    "flag": ((), "bool"),
    "v": ((2,), "float32"),
    "image": ((), "bytes"),
}
COLUMNS = {"x": ("a", "b", "c"), "label": ("kind",)}
FORMATS = ("parquet", "arrow", "stream", "csv", "jsonl")


def values(num=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "a": rng.normal(size=num).astype(np.float32),
        "unused": [f"text {i}" for i in range(num)],
        "b": rng.integers(-9, 9, num),
        "c": rng.normal(size=num).astype(np.float32),
        "kind": np.arange(num, dtype=np.int64),
        "flag": rng.integers(0, 2, num).astype(bool),
        "v": rng.normal(size=(num, 2)).astype(np.float32).tolist(),
        "image": [b"\xff" * (i % 7) + bytes([i % 250]) for i in range(num)],
    }


def save(root, form, columns, rows_per_group=64):
    """A file, or for Arrow and Parquet two, of these columns."""
    root.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if form == "csv":
        text = [",".join(columns)] + [
            ",".join(map(str, row)) for row in zip(*columns.values(), strict=True)
        ]
        (root / "t.csv").write_text("\n".join(text) + "\n")
    elif form == "jsonl":
        (root / "t.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())) + "\n")
    half = len(table) // 3 // 64 * 64
    for name, part in (("0", table[:half]), ("1", table[half:])):
        if form == "parquet":
            pq.write_table(part, root / f"{name}.parquet", row_group_size=rows_per_group)
        elif form in ("arrow", "stream"):
            make = pa.ipc.new_file if form == "arrow" else pa.ipc.new_stream
            with make(str(root / f"{name}.arrow"), part.schema) as writer:
                writer.write_table(part, max_chunksize=rows_per_group)
    return root


def numeric(columns):
    return {k: v for k, v in columns.items() if k not in ("v", "image", "flag")}


def table(root, features=None, **more):
    more = {"columns": COLUMNS, "batch_size": 16, "cache_dir": str(root.parent / "cache")} | more
    how = {"transforms": TAKEN, "eval_transforms": TAKEN}
    return Table(files=(str(root),), features=features or FEATURES, **how, **more)


@dataclasses.dataclass(frozen=True)
class Sizes(Transform):
    """Encoded values as their number of bytes."""

    def features(self, features):
        return {k: ((), "int32") if d == "bytes" else (s, d) for k, (s, d) in features.items()}

    def __call__(self, batch, draws):
        return {
            k: np.array([len(v) for v in x], np.int32) if x.dtype.hasobject else x
            for k, x in batch.items()
        }


TAKEN = (Sizes(),)


def check_rows(batch, columns, rows):
    for j, name in enumerate("abc"):
        np.testing.assert_array_equal(batch["x"][:, j], np.asarray(columns[name], np.float32)[rows])
    np.testing.assert_array_equal(batch["label"], rows)
    assert batch["x"].dtype == np.float32 and batch["label"].dtype == np.int32
    if "flag" in batch:
        np.testing.assert_array_equal(batch["flag"], columns["flag"][rows])
        np.testing.assert_array_equal(batch["v"], np.array(columns["v"], np.float32)[rows])
        assert list(batch["image"]) == [columns["image"][i] for i in rows]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("convert", [False, True])
def test_every_format_gives_the_rows(form, convert, tmp_path, capsys):
    columns, rng = values(), np.random.default_rng(1)
    text = form in ("csv", "jsonl")
    features = {k: FEATURES[k] for k in ("x", "label")} if text else FEATURES
    root = save(tmp_path / "t", form, numeric(columns) if text else columns)
    config = dataclasses.replace(table(root, features), convert=convert, eval_fraction=0.25)
    for split in ("train", "eval"):
        source = config.open(split)
        rows = np.array([i for i in range(ROWS) if (i % 4 == 3) == (split == "eval")])
        assert len(source) == len(rows)
        for _ in range(3):
            chosen = rng.integers(0, len(rows), 200)
            check_rows(source.take(chosen), columns, rows[chosen])
    converted = "converting" in capsys.readouterr().err
    assert converted == (text or (convert and form == "parquet"))
    config.open("train")
    assert "converting" not in capsys.readouterr().err  # once


def test_compressed_arrow_is_converted(tmp_path, capsys):
    columns = values()
    (tmp_path / "t").mkdir()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(
        str(tmp_path / "t/0.arrow"), pa.table(columns).schema, options=options
    ) as w:
        w.write_table(pa.table(columns))
    config = dataclasses.replace(table(tmp_path / "t"), eval_files=("x",))
    check_rows(config.open("train").take(np.arange(50)), columns, np.arange(50))
    assert "converting" in capsys.readouterr().err


# ---- the order of groups


@pytest.mark.parametrize("window", [1, 100, 300, 10**6])
def test_the_order_of_groups_is_a_permutation_of_each_epoch(window):
    edges = np.cumsum([0, 50, 0, 70, 50, 3, 120, 50])
    order = GroupOrder(7, edges, window)
    num = int(edges[-1])
    epochs = [order[np.arange(e * num, (e + 1) * num)] for e in range(3)]
    for rows in epochs:
        np.testing.assert_array_equal(np.sort(rows), np.arange(num))
    assert (epochs[0] != epochs[1]).any() and (epochs[0] != np.arange(num)).any()
    # Pure: any positions, asked in any order, by another object.
    positions = np.random.default_rng(0).permutation(3 * num)[:200]
    want = np.concatenate(epochs)[positions]
    np.testing.assert_array_equal(GroupOrder(7, edges, window)[positions], want)
    assert (GroupOrder(8, edges, window)[np.arange(num)] != epochs[0]).any()
    # Rows that are read together are of few groups.
    group = np.searchsorted(edges, epochs[0], side="right") - 1
    spans = [len(set(group[i : i + 16])) for i in range(0, num, 16)]
    assert max(spans) <= (3 if window == 1 else 7)


def test_a_window_of_parquet_reads_each_group_once(tmp_path, monkeypatch):
    from spmd.data.tables.parquet import ParquetRows

    columns = values(4096)
    root = save(tmp_path / "t", "parquet", columns)
    config = dataclasses.replace(table(root), window=256, eval_files=("x",))
    source, reads = config.open("train"), []
    read = ParquetRows._read
    monkeypatch.setattr(
        ParquetRows, "_read", lambda self, *args: (reads.append(args[0]), read(self, *args))[1]
    )
    batches = loader.train_batches(
        source, batch_size=64, seed=0, stop=64, transform=config.pipeline("train", source, 0)
    )
    rows = np.concatenate([b["label"] for b in batches])
    np.testing.assert_array_equal(np.sort(rows), np.arange(4096))
    assert sorted(reads) == list(range(64))
    # Shuffled over windows, and within them.
    assert abs(np.corrcoef(np.arange(4096), rows)[0, 1]) < 0.3
    assert len({int(r) // 64 for r in rows[:256]}) >= 3


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_batches_do_not_depend_on_processes_or_resumption(form, tmp_path):
    root = save(tmp_path / "t", form, values())
    config = dataclasses.replace(table(root), window=128)
    source = config.open("train")
    transform = config.pipeline("train", source, 3)

    def rows(start=0, stop=150, of=(0, 1), threads=2):
        batches = loader.train_batches(
            config.open("train"),
            batch_size=16,
            seed=3,
            start=start,
            stop=stop,
            rows=np.arange(of[0], 16, of[1]),
            threads=threads,
            transform=transform,
        )
        return np.stack([b["label"] for b in batches])

    whole = rows()
    np.testing.assert_array_equal(rows(start=77), whole[77:])
    for num in (2, 4):
        for k in range(num):
            np.testing.assert_array_equal(rows(60, 70, (k, num), 1), whole[60:70, k::num])


# ---- mistakes


@pytest.mark.parametrize(
    ("columns", "features", "message"),
    [
        ({"agee": [1]}, {"age": ((), "int32")}, "no column 'age' (feature 'age'). Did you mean 'agee'?"),
        ({"a": [0.5, 1]}, {"a": ((), "int32")}, "column 'a' is double, feature 'a' is declared int32;"),
        ({"a": ["x", "y"]}, {"a": ((), "float32")}, "column 'a' is string, feature 'a' is declared"),
        (
            {"a": [{"b": 1}, {"b": 2}]},
            {"a": ((), "int32")},
            "column 'a' is struct<b: int64>, feature 'a' is declared int32; nested columns are not read",
        ),
        ({"a": [[[1]], [[2]]]}, {"a": ((1,), "int32")}, "nested columns are not read: flatten them"),
        ({"a": [[1, 2], [3]]}, {"a": ((2,), "int32")}, "column 'a': not every list has 2 values"),
        ({"a": [1, 2**40]}, {"a": ((), "int32")}, "holds 1099511627776, out of the range of int32"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_types_that_do_not_fit_are_one_line(columns, features, message, form, tmp_path):
    root = save(tmp_path / "t", form, columns)
    config = Table(files=(str(root / "1*"),), features=features, eval_files=("x",))
    with pytest.raises(ValueError) as caught:
        config.open("train").take(np.arange(2))
    assert message in " ".join(str(caught.value).split()) and "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["parquet", "arrow", "csv"])
def test_missing_values_are_counted_and_replaced_or_bad_records(form, tmp_path):
    a = [None if i % 100 == 7 else i for i in range(300)]
    columns = {"a": a, "b": list(range(300))}
    root = tmp_path / "t"
    if form == "csv":
        root.mkdir()
        text = "".join(f"{'' if x is None else x},{i}\n" for i, x in enumerate(a))
        (root / "t.csv").write_text("a,b\n" + text)
    else:
        save(root, form, columns)
    features = {"a": ((), "float32"), "b": ((), "int32")}
    config = Table(
        files=(str(root),), features=features, eval_files=("x",), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(
        ValueError, match=r"values are missing in a \(3 of 300\); take --data.missing nan"
    ):
        config.open("train")
    for missing, want in (("nan", np.nan), ("zero", 0)):
        got = dataclasses.replace(config, missing=missing).open("train").take(np.arange(300))["a"]
        np.testing.assert_array_equal(got, [want if x is None else x for x in a])
    passing = dataclasses.replace(config, skip_bad=3)
    source, skips = passing.open("train"), passing.skips("training")
    _, good = skips.take(source, np.arange(300))
    np.testing.assert_array_equal(good, [x is not None for x in a])
    assert "feature 'a' is missing in row 7" in skips.reasons[7]
    whole = {"a": ((), "int32")}
    with pytest.raises(ValueError, match="feature a holds whole numbers, which have no NaN"):
        dataclasses.replace(config, features=whole, missing="nan").open("train")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.xlsx").write_text("")
    (tmp_path / "a.csv").write_text("a\n1\n")
    (tmp_path / "a.parquet").write_text("PAR1")
    features = {"a": ((), "int32")}
    open_ = lambda *names: Table(
        files=tuple(str(tmp_path / n) for n in names), features=features, eval_files=("x",)
    ).open("train")
    for names, message in {
        ("a.xlsx",): "is no table; what works: .parquet, .arrow",
        ("gone*",): "no file of .parquet, .arrow",
        ("a.csv", "a.parquet"): "matches files of several formats: csv, parquet; give one",
        ("a.parquet",): "is no Parquet file that can be read",
    }.items():
        with pytest.raises(ValueError) as caught:
            open_(*names)
        assert message in str(caught.value)
