"""The embedded digits, and the cache of decoded arrays."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spmd.cli import main
from spmd.data import TFDS, Arrays, decoded, tfds
from spmd.data.sources import ArraySource

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


def test_the_pixels_are_those_of_the_npz():
    """TFDS shuffles by key and decodes in threads: as a multiset the rows are the builder's."""
    with np.load(ROOT / "spmd/data/builders/digits.npz", allow_pickle=False) as raw:
        pixels = np.round(raw["images"] * (255 / 16)).astype(np.uint8).reshape(-1, 64)
        labels, test = raw["labels"], np.arange(len(raw["labels"])) % 5 == 4
    rows = lambda images, labels: sorted(
        (int(y), x.tobytes()) for x, y in zip(images, labels, strict=True)
    )
    for split, chosen in (("train", ~test), ("eval", test)):
        source = digits().open(split)
        got = source.take(np.arange(len(source)))
        assert rows(got["image"], got["label"]) == rows(pixels[chosen], labels[chosen])


def test_slices():
    whole = digits().open("train").take(np.arange(300))["image"]
    part = digits(train_split="train[100:200]").open("train")
    assert len(part) == 100
    np.testing.assert_array_equal(part.take(np.arange(100))["image"], whole[100:200])
    assert len(digits(train_split="train[:10%]").open("train")) == 144
    assert len(digits(train_split="train[-10%:]").open("train")) == 144
    tail = digits(train_split="train[-38:]").open("train")
    assert len(tail) == 38
    parts = [len(digits(train_split=f"train[{cut}]").open("train")) for cut in (":33%", "33%:")]
    assert sum(parts) == 1438


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


def test_the_digits_are_prepared_without_tensorflow(tmp_path):
    code = (
        f"import sys; from spmd.data import TFDS; TFDS(name='digits', cache_dir={str(tmp_path)!r},"
        " features={'image': ((8, 8, 1), 'uint8')}).open('eval');"
        " print('tensorflow_datasets' in sys.modules, 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True False\n", "")


@pytest.mark.multiprocess
def test_processes_may_prepare_and_decode_at_once(tmp_path):
    code = (
        f"from spmd.data import TFDS; print(len(TFDS(name='digits', cache_dir={str(tmp_path)!r},"
        " features={'label': ((), 'int32')}).open('train')))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, "1438\n"), err
    assert len(list((tmp_path / "decoded").iterdir())) == 1  # nothing half-written stays
    assert [p.name for p in (tmp_path / "tfds/digits").iterdir()] == ["1.0.0"]


MISTAKES = {
    "parent": ({"name": "../evil"}, "not a TFDS name"),
    "parent config": ({"name": "digits/.."}, "not a TFDS name"),
    "newline": ({"name": "digits\n"}, "not a TFDS name"),
    "capital": ({"name": "Mnist!"}, "not a TFDS name"),
    "not prepared": ({"name": "mnist"}, "python run.py data prepare"),
    "near name": ({"name": "digit"}, "Did you mean 'digits'"),
    "version": ({"name": "digits:9.9.9"}, "no version 9.9.9 of the embedded set.*name 1.0.0"),
    "dir": ({"dir": "nowhere"}, "is no directory"),
    "split": ({"train_split": "trian"}, r"Did you mean 'train'\? It has: train \(1438 examples\)"),
    "slice": ({"train_split": "train[5"}, "start:stop"),
    "empty": ({"train_split": "train[5:5]"}, "no examples"),
    "behind the end": ({"train_split": "train[2000:]"}, "2000 is beyond .* has 1438 examples"),
    "before the start": ({"train_split": "train[-1439:]"}, "-1439 is beyond .* has 1438 examples"),
    "percent": ({"train_split": "train[:150%]"}, "150% is beyond the split, which has 100%"),
    "negative percent": ({"train_split": "train[-101%:]"}, "-101% is beyond the split"),
    "feature": ({"features": {"imag": ((8, 8, 1), "uint8")}}, "Did you mean 'image'"),
    "no features": ({"features": {}}, "data.features is empty"),
    "shape": ({"features": {"image": ((9, 8, 1), "uint8")}}, r"declares uint8\[9, 8, 1\]"),
    "dtype": ({"features": {"label": ((), "float32")}}, "declares float32"),
    "no dtype": ({"features": {"label": ((), "unit8")}}, "declares unit8"),
    "reserved": ({"features": {"weight": ((), "float32")}}, "the loader's own"),
    "batch": ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
    "threads": ({"threads": 0}, "data.threads=0 must be at least 1"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    kwargs, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message):
        digits(**kwargs).open("train")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write .*tfds.*--data.cache-dir"):  # to prepare in
        digits(cache_dir=str(tmp_path / "file")).open("eval")
    digits(cache_dir=str(tmp_path)).open("eval")
    (tmp_path / "decoded").rename(tmp_path / "aside")
    (tmp_path / "decoded").write_text("a file")
    with pytest.raises(ValueError, match=r"cannot write .*decoded.*--data.cache-dir"):
        digits(cache_dir=str(tmp_path)).open("eval")


def test_a_set_stored_for_tensorflow_is_refused(tmp_path):
    digits(cache_dir=str(tmp_path)).open("eval")
    info = tmp_path / "tfds/digits/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="stored as tfrecord"):
        digits(cache_dir=str(tmp_path)).open("eval")


def test_the_newest_version_is_read(tmp_path):
    digits(cache_dir=str(tmp_path)).open("eval")
    sets = tmp_path / "tfds/digits"
    for version in ("0.9.0", "0.10.0"):
        shutil.copytree(sets / "1.0.0", sets / version)
    shutil.rmtree(sets / "1.0.0")
    found = lambda name: tfds.prepared_dir(digits(name=name, cache_dir=str(tmp_path)))
    assert found("digits") == sets / "0.10.0"
    assert found("digits:0.9.0") == sets / "0.9.0"
    assert found("digits:1.0.0") is None
    shutil.copytree(sets, tmp_path / "stock/other")
    given = {"dir": str(tmp_path / "stock"), "cache_dir": str(tmp_path)}
    with pytest.raises(
        ValueError, match=r"version 1\.0\.0 is not prepared.*there: 0\.9\.0, 0\.10\.0"
    ):
        tfds.find(digits(name="other:1.0.0", **given))
    for sub in ("small", "large"):
        shutil.copytree(sets / "0.9.0", tmp_path / "stock/sized" / sub / "1.0.0")
    with pytest.raises(ValueError, match=r"several configs .*large, small; name one: sized/large"):
        tfds.find(digits(name="sized", **given))
    assert tfds.find(digits(name="sized/small", **given)).parent.name == "small"


def test_arrays_of_the_experiment():
    arrays = {"x": np.zeros((5, 2), np.float32), "unused": np.zeros(5)}
    give = lambda **more: Arrays(
        train=lambda: arrays, eval=lambda: arrays, features={"x": ((2,), "float32"), **more}
    )
    assert set(give().open("train").take(np.arange(3))) == {"x"}
    with pytest.raises(ValueError, match="no feature 'y'"):
        give(y=((), "int32")).open("eval")
    with pytest.raises(ValueError, match="differ in length"):
        ArraySource({"x": np.zeros(3), "y": np.zeros(4)})
    with pytest.raises(ValueError, match="no features"):
        ArraySource({})


class Reader:
    """A TFDS data source, as far as decoding reads it."""

    def __init__(self, examples):
        self.examples = examples

    def __getitems__(self, at):
        return [self.examples[i] for i in at]


def test_values_are_decoded_exactly_or_refused(tmp_path):
    def decode(values, shape, dtype):
        features = {"x": (shape, dtype)}
        reader = Reader([{"x": v} for v in values])
        decoded._Decoder(features, reader, len(values), tmp_path, "example").run(lambda done: None)
        return np.load(tmp_path / "x.npy")

    numbers = np.arange(1000, dtype=np.int64)
    np.testing.assert_array_equal(decode(numbers, (), "int32"), numbers)
    gaps = np.array([1, np.nan, 3], np.float32)
    np.testing.assert_array_equal(decode(gaps, (), "float32"), gaps)
    with pytest.raises(ValueError, match="does not fit int32"):
        decode(np.array([1, 2**40]), (), "int32")
    with pytest.raises(ValueError, match="in every example"):  # [1] would broadcast into [2]
        decode([np.zeros(1), np.zeros(1)], (2,), "float64")


def test_data_commands(run_main, tmp_path):
    shown = run_main("data", "show", "--experiment", "digits")
    assert shown.returncode == 0, shown.stderr
    assert "train: 1438 examples" in shown.stdout and "uint8[8, 8, 1]" in shown.stdout
    prepared = run_main("data", "prepare", "--experiment", "digits", "--data.dir", "sets")
    assert prepared.returncode == 0, prepared.stderr
    assert (tmp_path / "sets/digits/1.0.0/dataset_info.json").is_file()
    (tmp_path / "file").write_text("mine")
    refused = run_main("data", "prepare", "--experiment", "digits", "--data.dir", "file")
    assert refused.returncode == 2 and "cannot write the directory file" in refused.stderr
    assert "Traceback" not in refused.stderr
    refused = run_main("data", "prepare", "--experiment", "mnist", "--data.dir", "sets")
    assert refused.returncode == 2 and "needs TensorFlow once" in refused.stderr


def test_a_stock_set_that_is_prepared_already_needs_no_tensorflow(tmp_path, monkeypatch, capsys):
    """Wherever the directory is named: by the option, by the variable, through a link, for writing or not."""
    tfds.prepare(digits(), str(tmp_path / "made"))
    (tmp_path / "sets/mnist").mkdir(parents=True)
    shutil.copytree(tmp_path / "made/digits/1.0.0", tmp_path / "sets/mnist/3.0.1")
    (tmp_path / "link").symlink_to("sets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it fails
    before = sorted(tmp_path.rglob("*"))
    prepare = ["data", "prepare", "--experiment", "mnist"]
    for root in ("sets", str(tmp_path / "sets/"), "link", "sets/../link"):
        for name in ("mnist", "mnist:3.0.1"):
            assert main([*prepare, "--data.name", name, "--data.dir", root]) == 0
            monkeypatch.setenv("TFDS_DATA_DIR", root)
            assert main([*prepare, "--data.name", name]) == 0
            shown = capsys.readouterr()
            assert shown.out.count(f"{name} is prepared already, in ") == 2 and not shown.err
    assert sorted(tmp_path.rglob("*")) == before
