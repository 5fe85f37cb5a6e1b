"""Tar files, saved data sets of Hugging Face, TFDS records: random access, splits, mistakes."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from spmd.data import TFDS
from spmd.data.huggingface import HuggingFace
from spmd.data.resizing import Decode, Resize
from spmd.data.tar import Tar

FEATURES = {"image": ((), "bytes"), "label": ((), "int32")}
HOW = {"transforms": (Decode(), Resize(8)), "eval_transforms": (Decode(), Resize(8))}


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


# ---- tar


def tar_file(path, examples):
    """A tar file of {member: bytes}."""
    with tarfile.open(path, "w") as tar:
        for name, data in examples.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def shards(root, num=60, per_shard=25):
    for first in range(0, num, per_shard):
        members = {}
        for i in range(first, min(first + per_shard, num)):
            members[f"dir/{i:04d}.{'jpg' if i % 2 else 'png'}"] = png(i)
            members[f"dir/{i:04d}.cls"] = str(i % 10).encode()
            members[f"dir/{i:04d}.meta.json"] = json.dumps({"at": [i / 2, 1]}).encode()
        tar_file(root / f"shard-{first}.tar", members)


def tar(root, *names, features=None, members=None, **more):
    features = features or {**FEATURES, "at": ((2,), "float32")}
    members = members or {"image": "jpg,png", "label": "cls", "at": "meta.json:at"}
    names = names or ("*.tar",)
    paths = tuple(str(root / n) for n in names)
    more = {"cache_dir": str(root / "cache")} | HOW | more
    return Tar(files=paths, features=features, members=members, **more)


def test_tar_members_are_read_by_random_access(tmp_path, monkeypatch):
    shards(tmp_path)
    seen = []
    for split in ("train", "eval"):
        source = tar(tmp_path, eval_fraction=0.3).open(split)
        rows = np.random.default_rng(0).permutation(len(source))
        batch = source.take(rows)
        for i, image, label, at in zip(
            rows, batch["image"], batch["label"], batch["at"], strict=True
        ):
            number = int(source.name_of(i)[-4:])
            assert (image, label) == (png(number), number % 10)
            np.testing.assert_array_equal(at, [number / 2, 1])
            seen.append(number)
        assert batch["label"].dtype == np.int32 and batch["at"].dtype == np.float32
    assert sorted(seen) == list(range(60))
    # The index is built once.
    monkeypatch.setattr(tarfile, "open", None)
    assert len(tar(tmp_path, eval_fraction=0.3).open("eval")) > 5


def test_unpaired_members_of_a_tar_are_named_or_left_out(tmp_path):
    shards(tmp_path, 30)
    tar_file(tmp_path / "z.tar", {"a.png": png(1), "b.cls": b"3", "c.png": png(2), "c.cls": b"2"})
    small = {"features": FEATURES, "members": {"image": "png", "label": "cls"}}
    with pytest.raises(ValueError, match=r"z.tar: 'a' has no member for label \(it has: png\)"):
        tar(tmp_path, "z.tar", **small, eval_files=("x",)).open("train")
    source = tar(tmp_path, "z.tar", **small, eval_files=("x",), skip_bad=2).open("train")
    assert len(source) == 1 and len(source.skipped) == 2
    assert source.take(np.arange(1))["label"].tolist() == [2]


def test_damaged_and_compressed_tar_files_are_named(tmp_path):
    shards(tmp_path, 25)
    whole = (tmp_path / "shard-0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: 24 * 1024 + 300])
    (tmp_path / "text.tar").write_text("hello" * 400)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    for name, message in {
        "cut.tar": "cut.tar is",
        "text.tar": "text.tar is damaged, or no tar file",
        "a.tar.gz": "a compressed one has no random access",
        "gone.tar": "no file of .tar matches",
    }.items():
        with pytest.raises(ValueError, match=message):
            tar(tmp_path, name).open("train")
    other = tar(
        tmp_path, "shard-0.tar", features=FEATURES, members={"image": "gif", "label": "cls"}
    )
    with pytest.raises(ValueError, match=r"no example has members for all features \(image: gif"):
        other.open("train")
    members = {"image": "jpg,png", "label": "meta.json:at"}
    source = tar(tmp_path, "shard-0.tar", features=FEATURES, members=members).open("train")
    with pytest.raises(ValueError, match="'label' is float64"):
        source.take(np.arange(2))


# ---- Hugging Face


def saved(directory, rows, names=("cat", "dog")):
    """A data set as `datasets` 5.2 saves it, in two files."""
    directory.mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64()), ("w", pa.float64())])
    files = []
    for part in range(2):
        mine = rows[part::2]
        table = pa.table(
            {
                "image": [{"bytes": png(i), "path": None} for i in mine],
                "label": [i % 2 for i in mine],
                "w": [i / 4 for i in mine],
            },
            schema,
        )
        name = f"data-0000{part}-of-00002.arrow"
        with pa.ipc.new_stream(str(directory / name), schema) as writer:
            writer.write_table(table, max_chunksize=7)
        files.append({"filename": name})
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    (directory / "dataset_info.json").write_text(json.dumps({"features": features}))
    (directory / "state.json").write_text(json.dumps({"_data_files": files, "_split": None}))


def check_images(source, expected):
    batch = source.take(np.arange(len(source))[::-1])
    got = list(zip(batch["image"], batch["label"].tolist(), batch["w"].tolist(), strict=True))
    assert sorted(got) == sorted((png(i), i % 2, i / 4) for i in expected)


@pytest.mark.parametrize("held", ["test", "validation", ""])
def test_saved_data_sets_are_mapped(held, tmp_path):
    features = {**FEATURES, "w": ((), "float32")}
    saved(tmp_path / "d/train", range(40))
    if held:
        saved(tmp_path / "d" / held, range(50, 61))
        splits = {"splits": ["train", held]}
        (tmp_path / "d/dataset_dict.json").write_text(json.dumps(splits))
    root = tmp_path / "d" if held else tmp_path / "d/train"
    config = HuggingFace(path=str(root), features=features, eval_fraction=0.25, **HOW)
    assert config.found().classes == ("cat", "dog")
    train, evaluation = config.open("train"), config.open("eval")
    if held:
        check_images(train, range(40))
        check_images(evaluation, range(50, 61))
    else:
        order = [*range(0, 40, 2), *range(1, 40, 2)]
        check_images(evaluation, order[3::4])
        check_images(train, [i for n, i in enumerate(order) if n % 4 != 3])


def test_other_directories_are_no_saved_data_sets(tmp_path):
    config = HuggingFace(path=str(tmp_path), features=FEATURES, **HOW)
    with pytest.raises(ValueError, match="was not written by save_to_disk"):
        config.open("train")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["trian"]}')
    with pytest.raises(ValueError, match="Did you mean 'trian'"):
        config.open("train")


# ---- TFDS


def test_tfds_records_stay_encoded_until_a_transform_decodes_them():
    how = (Decode(1), Resize(8))
    config = TFDS(
        name="digits",
        train_split="train[100:300]",
        features=FEATURES,
        transforms=how,
        eval_transforms=how,
    )
    source, rows = config.open("train"), np.array([3, 199, 0])
    batch = source.take(rows)
    assert len(source) == 200 and all(x.startswith(b"\x89PNG") for x in batch["image"])
    decoded = TFDS(
        name="digits",
        train_split="train[100:300]",
        features={"image": ((8, 8, 1), "uint8"), "label": ((), "int32")},
    ).open("train")
    got = config.pipeline("train", source, 0)(
        {"image": np.array(batch["image"], object), "label": batch["label"]}, np.arange(3)
    )
    for name, x in decoded.take(rows).items():
        np.testing.assert_array_equal(got[name], x)
    content = config.content("train", lambda: source)
    assert content == config.content("train", lambda: decoded)  # of the files
