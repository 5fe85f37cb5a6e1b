"""Formats on gs://, against an emulated Cloud Storage: the examples are those of the same files on disk."""

from __future__ import annotations

import functools
import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spmd.data import files, registry
from spmd.data.images import Images
from spmd.data.tables import Table
from spmd.data.tar import Tar
from tests.bucket import NEEDS, reached, serving

ENCODED = {"image": ((), "bytes"), "label": ((), "int32")}
HOW = registry.parse("decode,resize:8")


@pytest.fixture
def bucket(monkeypatch):
    files.bucket.cache_clear()
    with serving() as served:
        reached(served, monkeypatch)
        yield served
    files.bucket.cache_clear()


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(root):
    """A folder of images, an index of them, a tar file, Parquet and CSV."""
    for i in range(12):
        (root / f"set/c{i % 2}").mkdir(parents=True, exist_ok=True)
        (root / f"set/c{i % 2}/{i}.png").write_bytes(png(i))
    (root / "set/.hidden").write_text("x")
    lines = [f"c{i % 2}/{i}.png,{i % 2}" for i in range(12)]
    (root / "set/index.csv").write_text("image,label\n" + "\n".join(lines) + "\n")
    with tarfile.open(root / "t.tar", "w") as tar:
        for i in range(12):
            for name, data in ((f"{i}.png", png(i)), (f"{i}.cls", str(i).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    table = pa.table({"image": [png(i) for i in range(12)], "label": list(range(12))})
    pq.write_table(table, root / "t.parquet", row_group_size=5)
    (root / "t.csv").write_text("label\n" + "\n".join(map(str, range(12))) + "\n")


def configs(root, cache):
    more = {"transforms": HOW, "eval_transforms": HOW, "eval_fraction": 0.4}
    kept = {"cache_dir": str(cache)}
    members = {"image": "png", "label": "cls"}
    labels = {"label": ((), "int32")}
    return {
        "folder": Images(path=f"{root}/set", **more),
        "index": Images(path=f"{root}/set/index.csv", **more),
        "tar": Tar(files=(f"{root}/*.tar",), features=ENCODED, members=members, **kept, **more),
        "parquet": Table(files=(f"{root}/t.parquet",), features=ENCODED, **kept, **more),
        "csv": Table(files=(f"{root}/*.csv",), features=labels, eval_fraction=0.4, **kept),
    }


@pytest.mark.gate
@pytest.mark.skipif(bool(NEEDS), reason=f"needs: pip install {' '.join(NEEDS)}")
def test_examples_of_a_bucket_are_those_of_the_files(bucket, tmp_path, monkeypatch):
    write(tmp_path / "disk")
    for path in (tmp_path / "disk").rglob("*"):
        if path.is_file():
            bucket.put(f"mine/{path.relative_to(tmp_path / 'disk')}", path.read_bytes())
    listed = []
    find = files.bucket().find
    monkeypatch.setattr(
        files.bucket(), "find", lambda *args, **more: listed.append(args) or find(*args, **more)
    )
    local = configs(tmp_path / "disk", tmp_path / "cache")
    for name, remote in configs("gs://bucket/mine", tmp_path / "other").items():
        want, got = local[name].found(), remote.found()
        assert getattr(want, "classes", ()) == getattr(got, "classes", ()), name
        for split in ("train", "eval"):
            a, b = want.open(split), got.open(split)
            assert len(a) == len(b), name
            rows = np.arange(len(a))[::-1]
            left, right = a.take(rows), b.take(rows)
            for feature, x in left.items():
                assert list(x) == list(right[feature]), (name, feature)
        source = got.open("train")
        entries = got.content("train", functools.partial(lambda x: x, source))
        assert entries and all(e.digest for e in entries)
    assert len(listed) == 1  # the folder of classes, for its names, both splits and the fingerprint
    with pytest.raises(ValueError, match="there is nothing in the bucket"):
        Images(path="gs://bucket/gone", transforms=HOW, eval_transforms=HOW).found()
