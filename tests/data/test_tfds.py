"""The embedded digits, and the cache of decoded arrays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spmd.data import TFDS

FEATURES = {"image": ((8, 8, 1), "uint8"), "label": ((), "int32")}
ROOT = Path(__file__).parent.parent.parent


def digits(**kwargs):
    return TFDS(**({"name": "digits", "features": FEATURES} | kwargs))


def caches(root: Path):
    return sorted((root / "decoded").glob("digits-*"))


def test_the_digits_are_all_there():
    config = digits()
    train, test = config.open("train"), config.open("eval")
    assert (len(train), len(test)) == (1438, 359)
    everything = [s.take(np.arange(len(s))) for s in (train, test)]
    images = np.concatenate([e["image"] for e in everything])
    labels = np.concatenate([e["label"] for e in everything])
    assert images.shape == (1797, 8, 8, 1)
    assert (images.min(), images.max()) == (0, 255)
    # the counts that scikit-learn documents for its digits
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_slices():
    whole = digits().open("train").take(np.arange(300))["image"]
    part = digits(train_split="train[100:200]").open("train")
    assert len(part) == 100
    np.testing.assert_array_equal(part.take(np.arange(100))["image"], whole[100:200])
    assert len(digits(train_split="train[:10%]").open("train")) == 144
    assert len(digits(train_split="train[-10%:]").open("train")) == 144


def test_the_cache_is_built_once_and_mended(tmp_path):
    config = digits(cache_dir=str(tmp_path))
    want = config.open("train").take(np.arange(50))
    (cache,) = caches(tmp_path)
    image = cache / "image.npy"
    stamp = image.stat().st_mtime_ns
    config.open("train")
    assert image.stat().st_mtime_ns == stamp
    for damage in (
        lambda: image.write_bytes(image.read_bytes()[:1000]),
        lambda: (cache / "complete.json").unlink(),
        lambda: (cache / "complete.json").write_text("{"),
    ):
        damage()
        got = config.open("train").take(np.arange(50))
        for name, value in want.items():
            np.testing.assert_array_equal(got[name], value)
    assert len(caches(tmp_path)) == 1
    digits(cache_dir=str(tmp_path), features={"label": ((), "int64")}).open("train")
    assert len(caches(tmp_path)) == 2  # other features, another cache


def test_a_cached_set_is_opened_without_tfds(tmp_path):
    digits(cache_dir=str(tmp_path)).open("train")
    code = (
        "import json, sys; from spmd.data import TFDS;"
        f" TFDS(name='digits', cache_dir={str(tmp_path)!r}, features="
        "{'image': ((8, 8, 1), 'uint8'), 'label': ((), 'int32')}).open('train');"
        " print(json.dumps([m for m in ('tensorflow', 'tensorflow_datasets', 'PIL', 'jax')"
        " if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == [], done.stderr


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "../evil"}, "not a TFDS name"),
        ({"name": "mnist"}, "python run.py data prepare"),
        ({"dir": "nowhere"}, "is no directory"),
        ({"train_split": "trian"}, "Did you mean 'train'"),
        ({"train_split": "train[5"}, "start:stop"),
        ({"train_split": "train[5:5]"}, "no examples"),
        ({"features": {"imag": ((8, 8, 1), "uint8")}}, "Did you mean 'image'"),
        ({"features": {"image": ((9, 8, 1), "uint8")}}, r"declares uint8\[9, 8, 1\]"),
        ({"features": {"label": ((), "float32")}}, "declares float32"),
    ],
)
def test_mistakes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        digits(**kwargs).open("train")


def test_a_cache_that_cannot_be_written(tmp_path):
    digits(cache_dir=str(tmp_path)).open("eval")
    (tmp_path / "decoded").rename(tmp_path / "aside")
    (tmp_path / "decoded").write_text("a file")
    with pytest.raises(ValueError, match="cannot write the cache"):
        digits(cache_dir=str(tmp_path)).open("eval")


def test_data_commands(run_cli):
    shown = run_cli("data", "show", "--experiment", "digits")
    assert shown.returncode == 0, shown.stderr
    assert "train: 1438 examples" in shown.stdout and "uint8[8, 8, 1]" in shown.stdout
    prepared = run_cli("data", "prepare", "--experiment", "digits", "--data.dir", "sets")
    assert prepared.returncode == 0, prepared.stderr
    refused = run_cli("data", "prepare", "--experiment", "mnist", "--data.dir", "sets")
    assert refused.returncode == 2 and "needs TensorFlow once" in refused.stderr
