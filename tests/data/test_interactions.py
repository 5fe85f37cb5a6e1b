"""Logs of users and items: formats, vocabularies, splits, histories, negatives."""

from __future__ import annotations

import collections

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from spmd.data.interactions import Generated, HistoryLog, Negatives, PairLog, RatingLog
from spmd.data.interactions.categories import CategoryLog
from spmd.data.interactions.splitting import TEST, TRAIN, VALIDATION, Lists, by_ratio, by_time
from spmd.data.interactions.vocabulary import Vocabulary
from spmd.data.transform import Draws
from spmd.models.dlrm import DLRM

ROWS = [
    (196, 242, 3.0, 50),
    (7, 242, 4.5, 20),
    (196, 5, 1.0, 10),
    (7, 9, 2.0, 30),
    (196, 9, 5.0, 40),
]
SMALL = Generated(users=30, items=40, events=900)


@pytest.fixture
def formats(tmp_path):
    """The same log in each format."""
    lines = {"u.data": "\t", "ratings.dat": "::", "log.csv": ",", "log.txt": " "}
    for name, separator in lines.items():
        rows = [separator.join(map(str, row)) for row in ROWS]
        if name.endswith(".csv"):
            rows.insert(0, "timestamp,user,item,rating")
            rows[1:] = [f"{t},{u},{i},{r}" for u, i, r, t in ROWS]
        (tmp_path / name).write_text("\n".join(rows) + "\n")
    user, item, rating, time = zip(*ROWS, strict=True)
    table = {"user": user, "item": item, "rating": rating, "timestamp": time}
    parquet.write_table(pa.table(table), tmp_path / "log.parquet")
    return [tmp_path / name for name in (*lines, "log.parquet")]


def test_all_formats_give_the_same_events(formats):
    for path in formats:
        data = RatingLog(files=(str(path),)).found()
        assert data.user_ids == ("7", "196") and data.item_ids == ("5", "9", "242")
        assert dict(data.sizes) == {"users": 3, "items": 4}
        log = data.log
        np.testing.assert_array_equal(log.user_E, [1, 0, 1, 0, 1])
        np.testing.assert_array_equal(log.item_E, [2, 2, 0, 1, 1])
        np.testing.assert_array_equal(log.rating_E, [3, 4.5, 1, 2, 5])
        np.testing.assert_array_equal(log.time_E, [50, 20, 10, 30, 40])


def test_a_vocabulary_is_recorded_and_unknown_ids_share_a_row(formats, tmp_path):
    data = RatingLog(files=(str(formats[0]),)).found()
    recorded = {"user_ids": list(data.user_ids), "item_ids": list(data.item_ids)}
    other = tmp_path / "later.data"
    other.write_text("196\t242\t3\t60\n196\t1000\t3\t61\n8\t9\t3\t62\n")
    later = RatingLog(files=(str(other),)).found(recorded).log
    np.testing.assert_array_equal(later.item_E, [2, 3, 1])  # 1000 is unknown
    np.testing.assert_array_equal(later.user_E, [1, 1, 2])  # and so is 8
    frequent = RatingLog(files=(str(formats[0]),), least=2).found()
    assert frequent.item_ids == ("9", "242")
    text = Vocabulary.build(np.array(["b", "a", "b"]))
    assert Vocabulary.restore(text.record()).index(["b", "z", "a"]).tolist() == [1, 2, 0]
    numbers = Vocabulary.restore(("3", "20"))
    assert numbers.index(np.array(["20", "x", "03"])).tolist() == [1, 2, 2]
    with pytest.raises(ValueError, match=r"trained on files: name them, --data\.files"):
        RatingLog().found(recorded)


def test_the_ratio_split_is_by_user_and_a_function_of_the_seed():
    user_E = np.repeat(np.arange(4), [20, 9, 1, 106])
    part_E = by_ratio(user_E, (0.8, 0.1, 0.1), 3)
    counts = [collections.Counter(part_E[user_E == u].tolist()) for u in range(4)]
    # Rounded down, but one event where there is less than one.
    assert [c[VALIDATION] for c in counts] == [2, 1, 0, 10] == [c[TEST] for c in counts]
    np.testing.assert_array_equal(part_E, by_ratio(user_E, (0.8, 0.1, 0.1), 3))
    assert (part_E != by_ratio(user_E, (0.8, 0.1, 0.1), 4)).any()


def test_the_last_events_by_time_are_held_out():
    user_E = np.array([0, 1, 0, 1, 0, 1, 0, 2])
    time_E = np.array([5, 1, 9, 3, 7, 3, 1, 0])
    part_E = by_time(user_E, time_E)
    np.testing.assert_array_equal(
        part_E, [TRAIN, TRAIN, TEST, VALIDATION, VALIDATION, TEST, TRAIN, TRAIN]
    )
    lists = Lists.build(user_E, np.arange(8), time_E, 4)
    assert [lists[u].tolist() for u in range(4)] == [[6, 0, 4, 2], [1, 3, 5], [7], []]
    last = lists.last(np.array([0, 3, 1]), 3, np.array([2, 0, 3]))
    np.testing.assert_array_equal(last, [[-1, 6, 0], [-1, -1, -1], [1, 3, 5]])


def test_histories_precede_their_targets():
    data = HistoryLog(generated=SMALL, length=6, stride=4)
    log, train, held = data.log, data.open("train"), data.open("eval")
    batch = train.take(np.arange(len(train)))
    both = np.concatenate([batch["history"], batch["targets"][:, -1:]], axis=1)
    np.testing.assert_array_equal(batch["targets"], np.where(batch["history"] < 0, -1, both[:, 1:]))
    # Every item but the first of a user is a target.
    targets = collections.Counter(batch["targets"][batch["targets"] >= 0].tolist())
    first = [log.before("train")[u][0] for u in range(SMALL.users)]
    wanted = np.bincount(log.item_E[log.part_E == TRAIN], minlength=41)
    wanted -= np.bincount(first, minlength=41)
    assert all(targets[i] >= n for i, n in enumerate(wanted))
    evaluated = held.take(np.arange(len(held)))
    np.testing.assert_array_equal((evaluated["targets"] >= 0).sum(1), 1)
    validation = [log.of("validation")[u][0] for u in range(SMALL.users)]
    np.testing.assert_array_equal(evaluated["targets"][:, -1], validation)
    # The test sees the validation item last.
    query = data.queries(np.arange(SMALL.users), "test")["history"]
    np.testing.assert_array_equal(query[:, -1], validation)


def test_pairs_leave_their_own_item_out_of_the_history():
    data = PairLog(generated=SMALL, history=12)
    log, source = data.log, data.open("train")
    batch = source.take(np.arange(len(source)))
    assert not (batch["history"] == batch["item"][:, None]).any()
    for user, item, history in zip(
        *(batch[k][::50] for k in ("user", "item", "history")), strict=True
    ):
        others = [i for i in log.before("train")[user] if i != item][-12:]
        np.testing.assert_array_equal(history[history >= 0], others)
    assert batch["share"].sum() == pytest.approx(
        (np.bincount(batch["item"]) ** 2).sum() / len(source), rel=1e-5
    )


def test_negatives_are_a_function_of_seed_and_position():
    draw, item = Negatives(count=5, items=40), np.arange(4000, dtype=np.int32) % 40
    at = lambda seed, positions: draw({"item": item[positions]}, Draws(seed, 9, positions))[
        "negatives"
    ]
    every = at(1, np.arange(4000))
    some = np.array([17, 3999, 2])
    np.testing.assert_array_equal(at(1, some), every[some])
    assert (at(2, some) != every[some]).any()
    assert not (every == item[:, None]).any() and every.min() == 0 and every.max() == 39
    counts = np.bincount(every.ravel(), minlength=40)
    assert abs(counts / counts.mean() - 1).max() < 0.25
    declared = PairLog(generated=SMALL, negatives=5).transformed_features("train")
    assert declared["negatives"] == ((5,), "int32")


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        ("1\t2\t3\n1\t3\t3\n", {}, "ordered by time, and the log has no column 'timestamp'"),
        ("user,film\n1,2\n", {}, "has no column 'item'"),
        ("who,what,when\n1,2,3\n", {}, "names no columns 'user' and 'item'"),
        ("user,item\n1,2\n,3\n", {}, "column 'user' has 1 empty values"),
        ("user,item,rating\n1,2,good\n", {}, "column 'rating' is string"),
        ("user,item\n1.5,2\n", {}, "column 'user' is double, and ids are whole numbers or text"),
    ],
)
def test_mistakes_in_a_log(tmp_path, text, words, message):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        HistoryLog(files=(str(path),), split="ratio", **words).found().open("train")


def test_categorical_columns_have_a_row_for_unknown_values(tmp_path):
    """Vocabularies of the training rows; what evaluation alone has, and what is missing, is unknown."""
    train = {"price": [1.0, 2.0, 3.0, 4.0], "label": [0, 1, 0, 1]}
    train |= {"brand": ["x", "b", None, "x"], "shop": [7, 7, 3, 12]}
    held = {"price": [5.0], "label": [1], "brand": ["new"], "shop": [12]}
    parquet.write_table(pa.table(train), tmp_path / "train.parquet")
    parquet.write_table(pa.table(held), tmp_path / "eval.parquet")
    names = {"numbers": ("price",), "categories": ("brand", "shop")}
    files = (str(tmp_path / "train.parquet"),)
    data = CategoryLog(files=files, eval_files=(str(tmp_path / "eval.parquet"),), **names)
    data = data.found()
    assert data.vocabularies == (("b", "x"), ("3", "7", "12")) and data.rows == (3, 4)
    batch = data.open("train").take(np.arange(4))
    assert batch["brand"].tolist() == [1, 0, 2, 1] and batch["shop"].tolist() == [1, 1, 0, 2]
    batch = data.open("eval").take(np.arange(1))
    assert batch["brand"].tolist() == [2] and batch["shop"].tolist() == [2]
    assert batch["numbers"].tolist() == [[5.0]] and batch["label"].tolist() == [1]
    recorded = {"vocabularies": [["a", "x"], ["7"]]}
    later = CategoryLog(files=files, **names).found(recorded)
    assert later.vocabularies == (("a", "x"), ("7",))
    with pytest.raises(ValueError, match=r"model\.ids=9 9, .*: --model\.ids 3 4"):
        data.check_model(DLRM(ids=(9, 9), features=("brand", "shop"), numbers=1))
    frequent = CategoryLog(files=files, eval_files=files, least=2, **names).found()
    assert frequent.vocabularies == (("x",), ("7",))
    parts = [
        CategoryLog(files=files * 50, **names).found().open(split) for split in ("train", "eval")
    ]
    assert len(parts[0]) + len(parts[1]) == 200 and 10 <= len(parts[1]) <= 32
    with pytest.raises(ValueError, match=r"no column 'bran'\. Did you mean 'brand'"):
        CategoryLog(files=files, numbers=("price",), categories=("bran",)).found()
