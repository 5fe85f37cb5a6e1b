"""Bad files through the public commands: one clear line each, or handled and counted."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

# An experiment on images and masks, of a table, or of tar files, by a variable of its text.
EXPERIMENT = """
from spmd import Experiment
from spmd.data import registry
from spmd.data.images import Images
from spmd.data.tables import Table
from spmd.data.tar import Tar
from spmd.models.cnn import CNN
from spmd.models.unet import UNet
from spmd.optim import SGD
from spmd.tasks import Classification, Segmentation
from spmd.train import CheckpointConfig, TrainConfig

PAIR = registry.parse("decode,resize:8:8:image+mask")
ONE = registry.parse("decode,resize:8")
ENCODED = {"image": ((), "bytes"), "label": ((), "int32")}


def config():
    more = {"batch_size": 4, "transforms": ONE, "eval_transforms": ONE}
    pair = more | {"transforms": PAIR, "eval_transforms": PAIR}
    data = {
        "masks": lambda: Images(target="mask", path="mine", **pair),
        "images": lambda: Images(path="mine", **more),
        "index": lambda: Images(path="mine/index.parquet", columns=("age",), **more),
        "table": lambda: Table(files=("mine/*.parquet",), features=ENCODED, cache_dir="c", **more),
        "tar": lambda: Tar(
            files=("mine/*.tar",),
            features=ENCODED,
            members={"image": "png", "label": "cls"},
            cache_dir="c",
            **more,
        ),
    }["KIND"]()
    masks = "KIND" == "masks"
    model = UNet(channels=3, widths=(4, 4), classes=2) if masks else CNN(channels=3, features=(4,), classes=2)
    task = Segmentation() if masks else Classification()
    return Experiment(
        model=model,
        task=task,
        data=data,
        optimizer=SGD(),
        train=TrainConfig(steps=3),
        checkpoint=CheckpointConfig(best=""),
    )
"""


RNG = np.random.default_rng(0)


def encoded(mode="RGB", size=(9, 7), value=None, form="PNG", **more):
    """An image file; without a value its pixels are noise."""
    rng, file = RNG, io.BytesIO()
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, size[::-1]).astype(np.uint16))
    else:
        depth = len(Image.new(mode, (1, 1)).getbands())
        shape = size[::-1] if depth == 1 else (*size[::-1], depth)
        pixels = rng.integers(0, 256, shape) if value is None else np.full(shape, value)
        image = Image.fromarray(pixels.astype(np.uint8), mode)
    image.save(file, form, **more)
    return file.getvalue()


def put(files):
    """Writes {path below mine: bytes}."""

    def write(root):
        for name, data in files.items():
            path = root / "mine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    return write


def pairs(mode="L", **masks):
    """Twelve pairs, of which 0 has another mask."""
    files = {f"image/{i}.png": encoded() for i in range(12)}
    files |= {f"mask/{i}.png": encoded("L", value=i % 2) for i in range(12)}
    return put(files | {"mask/0.png": encoded(mode, **masks)})


def parquet(name, **columns):
    """Parquet of 12 rows beside 12 images."""

    def write(root):
        put({f"{i}.png": encoded() for i in range(12)})(root)
        pq.write_table(pa.table(columns), root / "mine" / name)

    return write


def tar(root):
    (root / "mine").mkdir()
    with tarfile.open(root / "mine/0.tar", "w") as archive:
        for i in range(12):
            members = [(f"{i}.png", encoded()), (f"{i}.cls", b"1")]
            for name, data in members[: 1 if i == 5 else 2]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def mixed(root):
    modes = {"L": "PNG", "RGBA": "PNG", "CMYK": "JPEG", "I;16": "PNG", "P": "PNG"}
    files = {f"{c}/{i}.png": encoded() for i in range(10) for c in "ab"}
    files |= {
        f"a/{mode[0]}.{form.lower()}": encoded(mode, form=form) for mode, form in modes.items()
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    put(files | {"b/turned.jpg": encoded(form="JPEG", exif=exif)})(root)


BOTH = {f"{c}/{i}.png": encoded() for i in range(12) for c in "ab"}
FILES = [f"{i}.png" for i in range(12)]
ROWS = {"image": FILES, "label": ["a", "b"] * 6}
NESTED = [{"x": {"y": 1}}] * 12

NAMED = ROWS | {"image": NESTED}
IN_BYTES = ROWS | {"image": [b"x"] * 12}


def in_splits(root):
    put({f"train/{k}": v for k, v in BOTH.items()} | {"eval/zebra/0.png": encoded()})(root)


def with_an_empty_class(root):
    put(BOTH)(root)
    (root / "mine/c").mkdir()


# {case: (what is written, kind of data, message)}: refused by `check` and by training with one line.
REFUSED = {
    "empty folder": (lambda root: (root / "mine").mkdir(), "images", "mine holds no image (.jpg,"),
    "empty class": (with_an_empty_class, "images", "class without images in"),
    "unknown class": (
        in_splits,
        "images",
        "classes of the evaluation images that are not among the 2 of training: zebra",
    ),
    "missing column": (parquet("index.parquet", **ROWS), "index", "has no column 'age'"),
    "column of texts": (
        parquet("index.parquet", age=["old"] * 12, **ROWS),
        "index",
        "column 'age' holds 'old' in row 1; data.columns are numbers",
    ),
    "nested numbers": (
        parquet("index.parquet", age=NESTED, **ROWS),
        "index",
        "column 'age' (data.columns) is nested in row 1; it must hold text or numbers",
    ),
    "nested files": (
        parquet("index.parquet", age=[1] * 12, **NAMED),
        "index",
        "column 'image' (data.image_column) is nested in row 1",
    ),
    "bytes in an index": (
        parquet("index.parquet", age=[1] * 12, **IN_BYTES),
        "index",
        "column 'image' (data.image_column) is bytes in row 1",
    ),
    "nested table": (
        parquet("t.parquet", image=[encoded()] * 12, label=NESTED),
        "table",
        "column 'label' is struct<x: struct<y: int64>>, feature 'label' is declared int32",
    ),
    "table of texts": (
        parquet("t.parquet", image=[encoded()] * 12, label=["a"] * 12),
        "table",
        "column 'label' is string, feature 'label' is declared int32",
    ),
    "unpaired tar": (tar, "tar", "0.tar: '5' has no member for label (it has: png)"),
}
# {case: (what is written, kind of data, text of `check`, text of the training)}: a record of them is bad.
TORN = BOTH | {"a/torn.jpg": encoded(form="JPEG", size=(90, 70))[:900]}
BAD = {
    "mask of another size": (
        pairs(size=(8, 7), value=1),
        "masks",
        "(0.png) of the eval data: 'mask' is 7 x 8 pixels, beside 7 x 9",
        "(0.png) of the evaluation data: 'mask' is 7 x 8 pixels and 'image' 7 x 9",
    ),
    "mask out of range": (
        pairs(value=9),
        "masks",
        "(0.png) of the eval data: 'mask' holds 9, and the classes of the model (model.classes) are 0 to 1",
        "feature 'mask' is 9 in example 0 of the evaluation data",
    ),
    "mask in colours": (pairs(mode="RGB"), "masks", "(0.png) of the eval data: 'mask'", "(0.png)"),
    "truncated": (
        put(TORN),
        "images",
        "(a/torn.jpg) of the train data: 'image': it cannot be decoded",
        "(a/torn.jpg) of the training data: 'image': it cannot be decoded",
    ),
}


@pytest.fixture
def commands(tmp_path, run_main):
    """`commands(write, kind)`: `data check` and the training of files, each as a function of more words."""

    def prepare(write, kind):
        write(tmp_path)
        (tmp_path / "mine.py").write_text(EXPERIMENT.replace("KIND", kind))
        words = ["--experiment", "mine.py"]
        check = lambda *more: run_main("data", "check", *words, *more)
        return check, lambda *more: run_main(*words, "--simulate", "1", *more)

    return prepare


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_refused(case, commands):
    write, kind, message = REFUSED[case]
    for command in commands(write, kind):
        done = command()
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("case", BAD)
def test_records_that_are_bad_are_named_by_check(case, commands):
    write, kind, message, _ = BAD[case]
    check, _ = commands(write, kind)
    done = check()
    assert done.returncode == 1 and message in done.stdout, done.stdout
    assert done.stdout.count(" 1 bad") == 1 and done.stdout.count(" 0 bad") == 1


@pytest.mark.gate
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[pytest.mark.slow] if c != "mask out of range" else []) for c in BAD],
)
def test_records_that_are_bad_end_a_training(case, commands):
    write, kind, _, message = BAD[case]
    _, train = commands(write, kind)
    done = train()
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.gate
def test_colours_and_rotations_are_read_and_counted(commands):
    check, train = commands(mixed, "images")
    done = check()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "images: RGB 20, rotated 1, CMYK 1, I;16 1, L 1, P 1, RGBA 1; 7 to 9 pixels" in done.stdout
    )
    done = train()
    assert done.returncode == 0 and "done: 3 steps" in done.stdout, done.stderr
