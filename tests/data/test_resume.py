"""Every format and transform, stopped and resumed on 2, 1 and 4 processes: the same examples, bit for bit."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from spmd.data import TFDS, loader, registry
from spmd.data.combined import Combined
from spmd.data.huggingface import HuggingFace
from spmd.data.images import Images
from spmd.data.tables import Table
from spmd.data.tar import Tar
from tests.command import REPOSITORY

NUM, BATCH, STEPS = 44, 8, 14  # more than two epochs
ENCODED = {"image": ((), "bytes"), "label": ((), "int32")}
HOW = registry.parse(
    "decode,random_resized_crop:16:0.3,flip,crop:2,color_jitter,randaugment,random_erasing,normalize,cutmix"
)
EVAL = registry.parse("decode,central_crop:16,normalize")
MIXED = registry.parse(
    "decode,resize:20,central_crop:12:0.8,crop_or_pad:14:11,random_crop:12,flip,mixup:0.4"
)

PAIRED = registry.parse(
    "decode,random_resized_crop:16:0.3:image+mask,crop:2:image+mask,flip:image+mask,random_erasing:1:image"
)


def jpeg(i):
    rng, file = np.random.default_rng(i), io.BytesIO()
    pixels = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((40 + i % 7, 30 + i % 5)).save(file, "JPEG")
    return file.getvalue()


def mask(i):
    """A mask of classes for the image."""
    file, rng = io.BytesIO(), np.random.default_rng(i)
    Image.fromarray(rng.integers(0, 3, (30 + i % 5, 40 + i % 7)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def rows():
    return {"image": [jpeg(i) for i in range(NUM)], "label": np.arange(NUM) % 3}


def of_folder(root, **more):
    for i in range(NUM):
        (root / f"c{i % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"c{i % 3}/{i}.jpg").write_bytes(jpeg(i))
    return Images(path=str(root), **more)


def of_pairs(root, **more):
    """Images and masks, which move together."""
    for i in range(NUM):
        for kind, data in (("image", jpeg(i)), ("mask", mask(i))):
            (root / kind).mkdir(parents=True, exist_ok=True)
            (root / f"{kind}/{i}.png").write_bytes(data)
    eval_transforms = registry.parse("decode,resize:16:16:image+mask")
    more |= {"transforms": PAIRED, "eval_transforms": eval_transforms}
    return Images(path=str(root), target="mask", **more)


def of_index(root, **more):
    of_folder(root, **more)
    lines = [f"c{i % 3}/{i}.jpg,{i % 3},{i / 2}" for i in range(NUM)]
    (root / "index.csv").write_text("image,label,age\n" + "\n".join(lines) + "\n")
    return Images(path=str(root / "index.csv"), columns=("age",), **more)


def of_table(root, form, **more):
    root.mkdir()
    table = pa.table(rows())
    if form == "parquet":
        pq.write_table(table, root / "t.parquet", row_group_size=5)
    else:
        with pa.ipc.new_file(str(root / "t.arrow"), table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    files = (str(root / f"t.{form}"),)
    return Table(files=files, features=ENCODED, window=12, cache_dir=str(root / "c"), **more)


def of_text_table(root, form, **more):
    root.mkdir()
    lines = [{"label": i, "x": i / 2} for i in range(NUM)]
    text = "\n".join(map(json.dumps, lines))
    if form == "csv":
        text = "label,x\n" + "\n".join(f"{row['label']},{row['x']}" for row in lines)
    (root / f"t.{form}").write_text(text + "\n")
    features = {"label": ((), "int32"), "x": ((), "float32")}
    more |= {"transforms": (), "eval_transforms": ()}
    files = (str(root / f"t.{form}"),)
    return Table(files=files, features=features, cache_dir=str(root / "c"), **more)


def of_tar(root, **more):
    root.mkdir()
    for part in range(3):
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            for i in range(part, NUM, 3):
                for name, data in ((f"{i}.jpg", jpeg(i)), (f"{i}.cls", str(i % 3).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    members = {"image": "jpg", "label": "cls"}
    files = (str(root / "*.tar"),)
    return Tar(files=files, features=ENCODED, members=members, cache_dir=str(root / "c"), **more)


def of_saved(root, **more):
    root.mkdir()
    table = pa.table(rows())
    with pa.ipc.new_stream(str(root / "data-0.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=9)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    return HuggingFace(path=str(root), features=ENCODED, **more)


def of_tfds(root, **more):
    return TFDS(name="digits", train_split=f"train[:{NUM}]", features=ENCODED, **more)


def of_mixture(root, **more):
    """Images of a folder and of Parquet, two to one."""
    parts = (of_folder(root / "f", **more), of_table(root / "t", "parquet", **more))
    return Combined(parts=parts, weights=(2, 1), batch_size=BATCH)


FORMATS = {
    "folder": of_folder,
    "index": of_index,
    "pairs": of_pairs,
    "parquet": lambda root, **more: of_table(root, "parquet", **more),
    "arrow": lambda root, **more: of_table(root, "arrow", **more),
    "csv": lambda root, **more: of_text_table(root, "csv", **more),
    "jsonl": lambda root, **more: of_text_table(root, "jsonl", **more),
    "tar": of_tar,
    "huggingface": of_saved,
    "tfds": of_tfds,
    "mixture": of_mixture,
}


def batches(config, start, stop, of=(0, 1)):
    """The rows of one of several processes, which opens the data anew."""
    source = config.found().open("train")
    return list(
        loader.train_batches(
            source,
            batch_size=BATCH,
            seed=5,
            start=start,
            stop=stop,
            rows=np.arange(of[0], BATCH, of[1]),
            transform=config.pipeline("train", source, 5),
        )
    )


def test_every_transform_is_among_them():
    of_texts = {"mask_tokens", "drop_tokens"}  # tests/tasks/test_texts.py
    assert {t.name for t in (*HOW, *MIXED, *PAIRED)} == registry.TRANSFORMS.keys() - of_texts


@pytest.mark.parametrize("how", ["crops", "blends"])
@pytest.mark.parametrize("form", FORMATS)
def test_batches_are_those_of_one_process_that_never_stopped(form, how, tmp_path):
    transforms = HOW if how == "crops" else MIXED
    evaluation = EVAL if how == "crops" else MIXED[:3]
    root = tmp_path / "data"
    config = FORMATS[form](
        root, batch_size=BATCH, transforms=transforms, eval_transforms=evaluation
    )
    whole = batches(config, 0, STEPS)
    images = [b["image"] for b in whole] if "csv" not in form and "jsonl" not in form else []
    assert all(np.isfinite(x).all() and x.std() > 0 for x in images)
    step = 0
    for num, stop in ((2, 4), (1, 9), (4, STEPS)):
        processes = [batches(config, step, stop, (k, num)) for k in range(num)]
        for i, want in enumerate(whole[step:stop]):
            for name, x in want.items():
                got = np.empty_like(x)
                for k in range(num):
                    got[k::num] = processes[k][i][name]
                np.testing.assert_array_equal(got, x, err_msg=f"{name} of step {step + i}")
        step = stop


READ = """
import sys, resource
import numpy as np
from spmd.data import loader, registry
from spmd.data.images import Images
from spmd.data.tables import Table

def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024

if sys.argv[1] == "parquet":
    features = {"x": ((16,), "float32")}
    names = {"x": tuple(f"c{i}" for i in range(16))}
    data = Table(files=(sys.argv[2],), features=features, columns=names, window=2**15, batch_size=512)
else:
    how = registry.parse("decode,resize:32")
    data = Images(path=sys.argv[2], transforms=how, eval_transforms=how, batch_size=8).found()
source = data.open("train")
steps = len(source) // data.batch_size
def read(stop):
    transform = data.pipeline("train", source, 0)
    rows = 0
    options = {"batch_size": data.batch_size, "seed": 0, "stop": stop, "transform": transform}
    for batch in loader.train_batches(source, **options):
        rows += len(batch["weight"])
    return rows
read(3)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
print(read(steps), peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.gate
@pytest.mark.parametrize("form", ["parquet", "folder"])
def test_memory_stays_below_a_tenth_of_what_is_read(form, tmp_path):
    if form == "parquet":
        rng, size = np.random.default_rng(0), 4_000_000
        values = rng.normal(size=100).astype(np.float32)
        columns = {f"c{i}": values[rng.integers(0, 100, size)] for i in range(16)}
        decoded = size * 16 * 4 / 2**20  # MiB
        pq.write_table(pa.table(columns), tmp_path / "t.parquet", row_group_size=2**14)
        path = tmp_path / "t.parquet"
    else:
        decoded = 90 * 1500 * 1200 * 3 / 2**20
        for i in range(90):
            (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
            Image.new("RGB", (1500, 1200), (i, 0, 0)).save(tmp_path / f"c{i % 2}/{i}.png")
        path = tmp_path
    done = subprocess.run(
        [sys.executable, "-c", READ, form, str(path)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    rows, more = map(float, done.stdout.split())
    assert rows > (3_000_000 if form == "parquet" else 70)
    assert more < decoded / 10, (more, decoded)


def test_a_mixture_of_images_and_parquet_keeps_its_weights_and_orders(tmp_path):
    how = {"transforms": MIXED, "eval_transforms": MIXED[:3], "batch_size": BATCH}
    config = of_mixture(tmp_path / "data", **how).found()
    assert config.parts[0].classes == ("c0", "c1", "c2") and config.num_classes == 3
    recorded = {"parts.0.classes": ["x", "y"]}
    assert config.parts[0] != of_mixture(tmp_path / "d", **how).found(recorded).parts[0]
    source = config.open("train")
    assert source.name_of(0).startswith("part 0, c0/") and "part 1" in source.name_of(
        len(source) - 1
    )
    sizes = [len(s) for s in source.sources]
    examples = source.order(5)[np.arange(3 * sizes[1])]
    part = np.searchsorted(np.cumsum(sizes), examples, side="right")
    np.testing.assert_allclose(np.cumsum(part == 0), np.arange(1, len(part) + 1) * 2 / 3, atol=1)
    of_parquet = examples[part == 1] - sizes[0]
    np.testing.assert_array_equal(np.sort(of_parquet), np.arange(sizes[1]))  # one epoch
    groups = of_parquet[:9] // 5  # the first window: rows of few groups, whole
    assert len(set(groups)) <= 4
