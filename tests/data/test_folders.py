"""A user's own images: folders of classes, pairs, indices; their splits, classes and fingerprints."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import spmd
from spmd.data import content, files, folders
from spmd.data.images import Images
from spmd.data.resizing import CentralCrop, Decode, Resize

HOW = (Decode(), Resize(8))
PAIR = (Decode(), Resize(8, 8, ("image", "mask")))


def images(path, **more):
    how = PAIR if more.get("target") == "mask" else HOW
    more = {"transforms": how, "eval_transforms": how, "batch_size": 4} | more
    return Images(path=str(path), **more)


def draw(file, value=0, size=(9, 7)):
    """An image whose pixels say which it is."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 2 * value, 0)).save(file)


def classes_at(root, counts, start=0):
    for c, num in counts.items():
        for i in range(num):
            draw(root / c / f"{i}.png", start + i)


def values(source):
    """{name: (label, first red)} of all examples."""
    batch = source.take(np.arange(len(source)))
    from spmd.data.decode import decode, read_header

    reds = [int(decode(read_header(x, 3))[0, 0, 0]) for x in batch["image"]]
    return {source.name_of(i): (int(batch["label"][i]), red) for i, red in enumerate(reds)}


def test_folders_of_classes_are_split_by_the_hash_of_their_names(tmp_path):
    classes_at(tmp_path, {"cat": 40, "dog": 60, "Ant": 20})
    config = images(tmp_path, eval_fraction=0.2).found()
    assert config.classes == ("Ant", "cat", "dog")
    train, held = (values(config.open(split)) for split in ("train", "eval"))
    assert not train.keys() & held.keys() and len(train) + len(held) == 120
    assert 12 <= len(held) <= 38
    for name, (label, red) in (train | held).items():
        c, number = name.split("/")
        assert (config.classes[label], red) == (c, int(number.split(".")[0]))
    # New files and another place move no old one.
    classes_at(tmp_path, {"bee": 30})
    (tmp_path.parent / "moved").symlink_to(tmp_path)
    grown = values(images(tmp_path.parent / "moved", eval_fraction=0.2).open("eval"))
    assert {k for k in grown if not k.startswith("bee/")} == held.keys()


@pytest.mark.parametrize("evaluation", ["eval", "val", "test"])
def test_a_folder_may_bring_its_splits(evaluation, tmp_path):
    classes_at(tmp_path / "train", {"a": 3, "b": 2})
    classes_at(tmp_path / evaluation, {"b": 4}, start=50)
    config = images(tmp_path)
    assert [len(config.open(split)) for split in ("train", "eval")] == [5, 4]
    assert set(values(config.open("eval")).values()) == {(1, 50 + i) for i in range(4)}
    everything = config.open_all().rows.name  # for a prediction
    assert len(everything) == 9 and f"{evaluation}/b/0.png" in everything


def test_numbers_as_classes_are_sorted_as_numbers(tmp_path):
    classes_at(tmp_path, {"10": 2, "9": 2, "-1": 2})
    assert images(tmp_path).found().classes == ("-1", "9", "10")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_an_index_has_columns_and_groups(form, tmp_path):
    rows = [
        {"file": f"img/{i}.png", "kind": "ab"[i % 2], "patient": i // 5, "age": i / 2}
        for i in range(100)
    ]
    for i in range(100):
        draw(tmp_path / f"img/{i}.png", i)
    path = tmp_path / f"index.{form}"
    if form == "csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif form == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    names = {"image_column": "file", "label_column": "kind", "columns": ("age",)}
    config = images(path, group_by="patient", eval_fraction=0.3, **names).found()
    assert config.classes == ("a", "b")
    held = {}
    for split in ("train", "eval"):
        source = config.open(split)
        batch = source.take(np.arange(len(source)))
        for i, (age, label) in enumerate(zip(batch["age"], batch["label"], strict=True)):
            number = int(2 * age)
            assert source.name_of(i) == f"img/{number}.png" and label == number % 2
            held.setdefault(number // 5, set()).add(split)
        assert batch["age"].dtype == np.float32
    assert len(held) == 20 and all(len(splits) == 1 for splits in held.values())
    assert {s for splits in held.values() for s in splits} == {"train", "eval"}


def test_a_column_may_hold_numbers_of_which_a_pattern_makes_files(tmp_path):
    for i in range(4):
        draw(tmp_path / f"image/{i:03}.png", i)
        (tmp_path / "mask").mkdir(exist_ok=True)
        Image.new("L", (9, 7), i).save(tmp_path / f"mask/{i:03}.png")
    lines = ["frame,track,steer", *(f"{i:03},{i // 2:02},{i / 4}" for i in range(4))]
    (tmp_path / "actions.csv").write_text("\n".join(lines) + "\n")
    named = {"image_column": "frame", "image_pattern": "image/{}.png"}
    path = tmp_path / "actions.csv"
    source = images(path, target="columns", columns=("steer",), **named).open_all()
    np.testing.assert_array_equal(
        source.take(np.arange(4))["steer"], np.float32([0, 0.25, 0.5, 0.75])
    )
    assert source.name_of(3) == "image/003.png" and source.rows.path[3].endswith("image/003.png")
    masks = {"mask_column": "frame", "mask_pattern": "mask/{}.png", "group_by": "track"}
    held = [
        images(path, target="mask", eval_fraction=0.76, **named, **masks).open(s)
        for s in ("train", "eval")
    ]
    assert [x.rows.group for x in held] == [["00", "00"], ["01", "01"]]
    assert [p[-8:] for p in held[1].rows.mask] == ["/002.png", "/003.png"]


def test_pairs_are_matched_by_name(tmp_path):
    for i in range(6):
        draw(tmp_path / f"image/{i}.jpg", 8 * i)
        (tmp_path / "mask").mkdir(exist_ok=True)
        Image.new("L", (9, 7), i).save(tmp_path / f"mask/{i}.png")
    source = images(tmp_path, target="mask", eval_fraction=0.5).open_all()
    from spmd.data.decode import decode, read_header

    batch = images(tmp_path, target="mask").open("train").take(np.arange(3))
    assert all(decode(read_header(x, 0)).shape == (7, 9) for x in batch["mask"])
    # A prediction needs no masks: they are blank, of the image's size.
    blank = source.take(np.arange(6))["mask"]
    assert all((decode(read_header(x, 0)) == 0).all() for x in blank) and len(blank) == 6


def test_the_fingerprint_is_of_names_bytes_and_labels_and_not_of_the_place(tmp_path):
    def describe(root, **more):
        config = images(root, **more)
        return content.describe(config, {"train": lambda: config.open("train")})["train"]

    for place in ("one", "two"):
        classes_at(tmp_path / place, {"a": 30, "b": 30})
    first = describe(tmp_path / "one")
    assert describe(tmp_path / "two") == first
    name = next(e.name for e in first)
    draw(tmp_path / "two" / name, 200)
    lines = content.describe_difference(first, describe(tmp_path / "two"))
    assert lines and name in lines[0]
    (tmp_path / "one" / name).rename(
        tmp_path / "one" / ("b/x.png" if name[0] == "a" else "a/x.png")
    )
    assert describe(tmp_path / "one") != first


def test_a_large_set_is_known_by_its_names_sizes_and_a_sample(tmp_path, monkeypatch):
    classes_at(tmp_path, {"a": 30, "b": 30})
    monkeypatch.setattr(folders, "_NAMED", 10)
    monkeypatch.setattr(folders, "_SAMPLED", 5)
    config = images(tmp_path, eval_fraction=0.01)
    describe = lambda: folders.describe(config.open("train"))
    first = describe()
    assert len(first) == 7
    draw(tmp_path / "b/new.png")
    assert describe()[0] != first[0]


@pytest.mark.gate
def test_from_a_folder_to_predictions_of_its_classes(tmp_path, run_main):
    rng = np.random.default_rng(0)
    for c, shade in {"dark": 40, "light": 215}.items():
        for i in range(40):
            (tmp_path / "mine" / c).mkdir(parents=True, exist_ok=True)
            pixels = np.clip(rng.normal(shade, 20, (12, 10, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "mine" / c / f"{i}.jpg")
    words = ["--experiment", "image_folder", "--run.dir", tmp_path / "run", "--simulate", "1"]
    words += ["--data.batch-size", "16", "--model.features", "4"]
    words += ["--data.transforms", "decode,random_resized_crop:8,flip"]
    words += ["--data.eval-transforms", "decode,central_crop:8:1.0"]
    train = [*words, "--optimizer.learning-rate", "0.05"]
    done = run_main(*train, "--data.path", tmp_path / "mine", "--train.steps", "20")
    assert done.returncode == 0, done.stderr
    identity = json.loads((tmp_path / "run/config.json").read_text())["identity"]
    assert identity["data.classes"] == ["dark", "light"] and identity["model.classes"] == 2
    # Other files, without folders of classes: those of the run have its names.
    for i, shade in enumerate((30, 220, 35, 200)):
        draw(tmp_path / f"other/{i}.png", 0)
        Image.new("RGB", (11, 13), (shade,) * 3).save(tmp_path / f"other/{i}.png")
    out = tmp_path / "out.jsonl"
    done = run_main("predict", *train, "--data.path", tmp_path / "other", "--out", out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"{i}.png" for i in range(4)]
    assert [row["class"] for row in rows] == ["dark", "light", "dark", "light"]
    for row in rows:
        best = max(row["probabilities"])
        assert row["probability"] == best and sum(row["probabilities"]) == pytest.approx(
            1, abs=1e-6
        )
    # The run goes on with its classes, and says which files changed.
    draw(tmp_path / "mine/dark/0.jpg", 3)
    done = run_main(*train, "--data.path", tmp_path / "mine", "--train.steps", "22")
    assert done.returncode == 2 and "dark/0.jpg" in done.stderr


@pytest.mark.parametrize(
    "model, pixels", [("resnet", 128), ("vit", 128), ("resnet50", 224), ("vit_b16", 224)]
)
def test_the_model_is_chosen_with_its_resolution(model, pixels):
    exp = spmd.load("image_folder", ["--model", model, "--model.dtype", "bfloat16"]).experiment
    assert type(exp.model).__name__ == ("ViT" if "vit" in model else "ResNet")
    assert exp.model.dtype == "bfloat16" and exp.model.classes == 0
    assert exp.data.eval_transforms[1] == CentralCrop(pixels, 1.0)
    batch = exp.unread(1).build(source=()).abstract_batch()
    assert batch["image"].shape == (64, pixels, pixels, 3)


def test_a_folder_is_listed_once_for_classes_and_splits(tmp_path, monkeypatch):
    classes_at(tmp_path, {"a": 20, "b": 20})
    calls, below = [], files.below
    monkeypatch.setattr(files, "below", lambda *args: calls.append(args) or below(*args))
    config = images(tmp_path)
    for num in (1, 2):  # a later start sees new files
        found = config.found()
        assert sum(len(found.open(split)) for split in ("train", "eval")) == 39 + num
        assert len(calls) == num and found == dataclasses.replace(config, classes=("a", "b"))
        assert found.found() is found
        draw(tmp_path / "a/new.png")


def test_a_plan_needs_no_images():
    exp = spmd.load("image_folder").experiment
    program = exp.unread(1).build(source=())
    assert program.abstract_batch()["image"].shape == (64, 64, 64, 3)
    assert CentralCrop(64, 1.0) in exp.data.eval_transforms
