"""Transforms: each op against a slow oracle, every draw a function of the stream position only."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spmd
from spmd.data import Arrays, augment, loader, registry, transform
from spmd.data.augment import Crop, Flip, Mixup
from spmd.data.transform import Transform
from tests.command import REPOSITORY

ALL = (Crop(2), Flip(), Mixup(0.4))


def config(how=ALL, shape=(6, 5, 3), dtype="uint8", num=37, features=None):
    rng = np.random.default_rng(num)
    arrays = {
        "image": rng.integers(0, 256, (num, *shape)).astype(dtype),
        "label": np.arange(num, dtype=np.int32),
    }
    features = features or {"image": (shape, dtype), "label": ((), "int32")}
    give = lambda: arrays
    return Arrays(train=give, eval=give, batch_size=8, features=features, transforms=how)


def stream(data, *, seed=3, **kwargs):
    """The augmented batches, as one array for each feature."""
    source = data.open("train")
    batches = list(
        loader.train_batches(
            source, seed=seed, transform=data.pipeline("train", source, seed), **kwargs
        )
    )
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}


# ---- the ops, example by example


@pytest.mark.parametrize("shape", [(6, 5, 3), (4, 7, 1)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_crop_is_numpys_pad_and_slice(shape, dtype):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50, *shape)).astype(dtype)
    y, x = rng.integers(0, 7, (2, 50))
    (h, w, _), got = shape, augment.crop(images, 3, y, x)
    for i, image in enumerate(images):
        padded = np.pad(image, ((3, 3), (3, 3), (0, 0)))
        np.testing.assert_array_equal(got[i], padded[y[i] : y[i] + h, x[i] : x[i] + w])
    assert got.dtype == dtype


def test_flip_mirrors_columns():
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 4, 2)).astype(np.uint8)
    before, which = images.copy(), np.arange(20) % 3 == 0
    got = augment.flip(images, which)
    for i in range(20):
        np.testing.assert_array_equal(got[i], np.fliplr(before[i]) if which[i] else before[i])
    np.testing.assert_array_equal(images, before)  # the source's own memory


def slow(data, seed, position, example):
    """One augmented example from the draws, by Python arithmetic."""
    how, (h, w, _) = {t.name: t for t in data.transforms}, data.features["image"][0]
    arrays = data.train()

    def draw(index):
        mask = 2**64 - 1

        def mix(v):
            v = ((v ^ (v >> 30)) * 0xBF58476D1CE4E5B9) & mask
            v = ((v ^ (v >> 27)) * 0x94D049BB133111EB) & mask
            return v ^ (v >> 31)

        gamma = 0x9E3779B97F4A7C15
        key = mix((mix((seed + gamma) & mask) + (index + 1) * gamma) & mask)
        return (mix((key + (position + 1) * gamma) & mask) >> 11) / 2**53

    def moved(image, first):
        if "crop" in how:
            p = how["crop"].pixels
            y, x = (int(draw(first + i) * (2 * p + 1)) for i in range(2))
            image = np.pad(image, ((p, p), (p, p), (0, 0)))[y : y + h, x : x + w]
        return np.fliplr(image) if "flip" in how and draw(first + 2) < 0.5 else image

    image = moved(arrays["image"][example], 0)
    if "mixup" not in how:
        return {"image": image}
    other = int(draw(4) * len(arrays["label"]))
    return {
        "image": (image / 255, moved(arrays["image"][other], 5) / 255),
        "label_b": arrays["label"][other],
    }


@pytest.mark.parametrize("how", [(Crop(2),), (Flip(),), (Crop(1), Flip()), ALL])
def test_each_example_equals_the_slow_oracle(how):
    data = config(how)
    got = stream(data, batch_size=8, stop=12)
    moved = 0
    for position, example in enumerate(got["example_id"]):
        want = slow(data, 3, position, example)
        image = want["image"]
        if "label_b" in want:
            share = float(got["mix"][position])
            image = share * image[0] + (1 - share) * image[1]
            assert got["label_b"][position] == want["label_b"]
        np.testing.assert_allclose(got["image"][position], image, rtol=1e-5, atol=1e-6)
        moved += (got["image"][position] != data.train()["image"][example]).any()
    assert moved > 30
    np.testing.assert_array_equal(got["label"], got["example_id"])  # labels here are the ids


def test_nothing_is_done_unless_asked():
    data = config(())
    assert data.pipeline("train", data.open("train"), 0) is None
    got = stream(data, batch_size=8, stop=9)
    np.testing.assert_array_equal(got["image"], data.train()["image"][got["example_id"]])


# ---- the draws


def test_draws_are_uniform_and_independent():
    positions = np.arange(100_000)
    draws = np.stack([transform.uniform(seed, i, positions) for seed in (0, 1) for i in range(3)])
    assert draws.min() >= 0 and draws.max() < 1
    for u in draws:
        counts = np.histogram(u, 50, (0, 1))[0]
        assert np.square(counts - 2000).sum() / 2000 < 95  # chi-squared, 49 degrees: 1e-4
    off = np.corrcoef(np.concatenate([draws, np.roll(draws, 1, axis=1)])) - np.eye(12)
    assert abs(off).max() < 0.02
    np.testing.assert_array_equal(transform.uniform(0, 1, positions[5:9]), draws[1][5:9])


def test_flips_half_of_the_time_and_each_epoch_anew():
    data = config((Flip(),), num=500)
    got = stream(data, batch_size=500, stop=6)
    flipped = (got["image"] != data.train()["image"][got["example_id"]]).any((1, 2, 3))
    assert flipped.mean() == pytest.approx(0.5, abs=0.04)
    each = np.zeros(500, int)
    np.add.at(each, got["example_id"], flipped)
    assert np.bincount(each, minlength=7).argmax() == 3 and each.min() < 2 and each.max() > 4


def test_crops_reach_every_offset_alike():
    data = config((Crop(1),), shape=(3, 3, 1), num=900)
    got = stream(data, batch_size=900, stop=1)
    arrays = data.train()["image"][got["example_id"]]
    found = np.zeros((3, 3), int)
    for image, before in zip(got["image"], arrays, strict=True):
        padded = np.pad(before, ((1, 1), (1, 1), (0, 0)))
        at = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if (padded[y : y + 3, x : x + 3] == image).all()
        ]
        found[at[0]] += 1
    assert found.sum() == 900 and found.min() > 70 and found.max() < 135


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_shares_follow_beta(alpha):
    got = stream(config((Mixup(alpha),), shape=(1, 1, 1)), batch_size=1000, stop=20)
    share = got["mix"].astype(np.float64)
    assert share.mean() == pytest.approx(0.5, abs=0.012)
    assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)
    fourth = np.mean((share - share.mean()) ** 4) / share.var() ** 2
    assert fourth == pytest.approx(3 - 6 / (2 * alpha + 3), rel=0.04)  # Beta's kurtosis
    partners = np.bincount(got["label_b"], minlength=37)  # every example is a partner alike
    assert partners.min() > 400 and partners.max() < 680
    assert abs(np.corrcoef(got["label"], got["label_b"])[0, 1]) < 0.03


# ---- the stream


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_cut_of_the_stream_is_augmented_alike(data):
    """Resume position, steps per dispatch, rows of a process and threads do not show."""
    batch_size, num = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    start, count = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 5))
    steps, threads = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    rows = np.array(sorted(data.draw(st.sets(st.integers(0, batch_size - 1), min_size=1))))
    how = tuple(t for t in (Crop(2), Flip(), Zoom(), Mixup(0.3)) if data.draw(st.booleans()))
    c = config(how, num=num)
    whole = stream(c, batch_size=batch_size, stop=start + count, threads=1)
    got = stream(
        c,
        batch_size=batch_size,
        start=start,
        stop=start + count,
        rows=rows,
        threads=threads,
        **({"steps_per_dispatch": steps} if count % steps == 0 else {}),
    )
    for name, value in whole.items():
        shape = value.shape[1:]
        want = value.reshape(start + count, batch_size, *shape)[start:, rows]
        np.testing.assert_array_equal(got[name].reshape(want.shape), want, err_msg=name)


def test_seeds_differ():
    a, b = (stream(config((Mixup(1.0),)), seed=s, batch_size=8, stop=4) for s in (0, 1))
    assert not np.isin(a["mix"], b["mix"]).any()


@pytest.mark.parametrize("how", [(), (Crop(1), Flip()), ALL])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_the_abstract_batch_is_that_of_the_loader(how, dtype):
    data = config(how, dtype=dtype)
    source = data.open("train")
    change = data.pipeline("train", source, 0)
    (batch,) = loader.train_batches(source, batch_size=8, seed=0, stop=1, transform=change)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == data.abstract_batch(8)


def test_evaluation_is_never_augmented():
    data = config(ALL)
    (batch,) = loader.eval_batches(data.open("eval"), batch_size=37)
    assert set(batch) == {"image", "label", "example_id", "weight"}
    np.testing.assert_array_equal(batch["image"], data.eval()["image"])


# ---- pixels as version 0.1.0 gave them

RECORDED = {
    "crop:2": "be1e531c1cd58be0",
    "flip": "9d5d982da51d1deb",
    "crop:1,flip": "3d21392d808e92c6",
    "mixup:0.4": "0b91caac31f7ffde",
    "flip,mixup:1": "0fb4bfd6e79ab78e",
    "crop:2,flip,mixup:0.4": "7516aaf3d7fd75be",
}


@pytest.mark.parametrize("words,recorded", RECORDED.items())
def test_pixels_and_draws_are_as_recorded(words, recorded):
    got = stream(config(registry.parse(words)), batch_size=8, stop=12)
    digest = hashlib.sha256()
    for name, x in sorted(got.items()):
        digest.update(f"{name}{x.dtype}{x.shape}".encode() + x.tobytes())
    assert digest.hexdigest()[:16] == recorded


# ---- transforms of other kinds


@dataclasses.dataclass(frozen=True)
class Zoom(Transform):
    """Brightness by a random factor: a transform of a user's, without numbers for its draws."""

    by: float = 2.0

    def __call__(self, batch, draws):
        factor = (1 + self.by * draws.uniform()[:, None, None, None]).astype(np.float32)
        image = batch["image"]
        return batch | {"image": (image * factor).astype(image.dtype)}


@dataclasses.dataclass(frozen=True)
class Half(Transform):
    """The upper half of the image."""

    def features(self, features):
        (h, *rest), dtype = features["image"]
        return {**features, "image": ((h // 2, *rest), dtype)}

    def __call__(self, batch, draws):
        return {**batch, "image": batch["image"][:, : batch["image"].shape[1] // 2]}


@dataclasses.dataclass(frozen=True)
class Pair(Transform):
    """The labels of two partners, and numbers."""

    partners: ClassVar[int] = 2

    def features(self, features):
        return {"labels": ((2,), "int32"), "u": ((3,), "float64"), "image": features["image"]}

    def __call__(self, batch, draws):
        pair = np.stack([other["label"] for other, _ in draws.partners], axis=1)
        u = np.stack([draws.uniform() for _ in range(3)], axis=1)
        return {"labels": pair, "u": u, "image": draws.partners[1].batch["image"]}


def test_a_users_transform_has_partners_and_draws_of_its_own():
    data = config((Pair(), Flip()), num=50)
    got = stream(data, batch_size=50, stop=40)
    for column in got["labels"].T:
        assert np.bincount(column, minlength=50).min() > 15  # over the whole source
    numbers = np.concatenate([got["u"].T, got["labels"].T / 50])
    assert abs(np.corrcoef(numbers) - np.eye(5)).max() < 0.08
    first = data.train()["image"][got["labels"][:, 1]]
    flipped = (got["image"] != first).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(got["image"][flipped], first[flipped][:, :, ::-1])
    assert 0.45 < flipped.mean() < 0.55
    assert data.abstract_batch(4)["labels"] == ((4, 2), "int32")


def test_partners_pass_through_the_transforms_before():
    got = stream(config((Zoom(0.0), Pair())), batch_size=8, stop=9)
    images = config(()).train()["image"]
    np.testing.assert_array_equal(got["image"], images[got["labels"][:, 1]])
    moved = stream(config((Crop(2), Pair())), batch_size=8, stop=9)
    np.testing.assert_array_equal(
        stream(config((Pair(),)), batch_size=8, stop=9)["image"],
        images[stream(config((Pair(),)), batch_size=8, stop=9)["labels"][:, 1]],
    )
    assert (moved["image"] != images[moved["labels"][:, 1]]).any()


def test_one_class_twice_draws_twice():
    once, twice = (stream(config(t), batch_size=8, stop=12) for t in ((Flip(),), (Flip(), Flip())))
    images = config(()).train()["image"]
    a, b = ((x["image"] != images[x["example_id"]]).any(axis=(1, 2, 3)) for x in (once, twice))
    assert 0.3 < a.mean() < 0.7 and 0.3 < b.mean() < 0.7 and (a != b).any()


def masked(how, mask=(6, 5)):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 6, 5, 3)).astype(np.uint8)
    arrays = {"image": image, "mask": image[..., 0].astype(np.int32).reshape(20, *mask)}
    features = {"image": ((6, 5, 3), "uint8"), "mask": (mask, "int32")}
    give = lambda: arrays
    return Arrays(train=give, eval=give, batch_size=8, features=features, transforms=how)


@pytest.mark.parametrize("mask", [(6, 5), (6, 5, 1)])
@pytest.mark.parametrize("words", ["crop:2:image+mask", "flip:mask+image"])
def test_image_and_mask_move_together(words, mask):
    got = stream(masked(registry.parse(words), mask), batch_size=8, stop=9)
    np.testing.assert_array_equal(got["image"][..., 0], got["mask"].reshape(-1, 6, 5))
    before = masked(()).train()["image"][got["example_id"]]
    assert (got["image"] != before).any(axis=(1, 2, 3)).sum() > 20
    only = stream(
        masked(registry.parse(words.replace("mask", "image")), mask), batch_size=8, stop=9
    )
    np.testing.assert_array_equal(only["mask"], masked((), mask).train()["mask"][got["example_id"]])


def test_the_example_of_the_docs():
    text, _ = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs/transforms.md").read_text(), re.S
    )
    scope = {"__name__": __name__}
    exec(text, scope)
    got = stream(config((scope["Brightness"](by=0.5), Flip(("image",)))), batch_size=8, stop=9)
    images = config(()).train()["image"][got["example_id"]]
    ratio = got["image"].sum(axis=(1, 2, 3)) / images.sum(axis=(1, 2, 3))
    assert ratio.min() >= 1 and ratio.max() <= 1.5 and ratio.std() > 0.1


def test_words_and_transforms():
    for words in ("", "crop:1", "crop:1:a+b,flip,mixup:0.2:a", "flip:x,mixup:1.0"):
        assert registry.text_of(registry.parse(words)) == words
    assert registry.parse(" crop:1, flip") == (Crop(1), Flip())
    assert registry.text_of((Zoom(),)) == "Zoom(by=2.0)"


# ---- evaluation


def test_evaluation_transforms_draw_by_the_number_of_the_example():
    data = dataclasses.replace(config(), eval_transforms=(Flip(), Half()))
    source = data.open("eval")
    change = data.pipeline("eval", source, 3)
    whole, *parts = (
        list(loader.eval_batches(source, batch_size=n, transform=change)) for n in (37, 8, 5)
    )
    mirrored = transform.uniform(3, 2, np.arange(37)) < 0.5
    images = data.eval()["image"]
    images = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)[:, :3]
    np.testing.assert_array_equal(whole[0]["image"], images)
    for part in parts:
        for name, x in whole[0].items():
            np.testing.assert_array_equal(np.concatenate([b[name] for b in part])[:37], x)
    assert data.abstract_batch(8, "eval")["image"] == ((8, 3, 5, 3), "uint8")
    assert "mix" in data.abstract_batch(8) and "mix" not in data.abstract_batch(8, "eval")


def test_what_is_evaluated_and_predicted_is_transformed():
    words = ["--model.hidden", "8", "--data.eval-transforms"]
    plain, flipped = (spmd.load("digits", [*words, w]).init() for w in ("", "flip"))
    examples = plain.program.open_evaluation().take(np.arange(40))
    mirrored = transform.uniform(flipped.program.seed, 2, np.arange(40)) < 0.5
    image = examples["image"]
    image = np.where(mirrored[:, None, None, None], image[:, :, ::-1], image)
    np.testing.assert_array_equal(
        flipped.predict({"image": examples["image"]}), plain.predict({"image": image})
    )
    assert flipped.evaluate()["eval/loss"] != plain.evaluate()["eval/loss"]
    other = spmd.load("digits", [*words, "flip", "--data.eval-batch-size", "96"]).init()
    assert other.evaluate()["eval/loss"] == pytest.approx(flipped.evaluate()["eval/loss"], rel=1e-6)


def test_a_size_that_the_model_does_not_take_in_evaluation_is_refused_before_the_run():
    experiment = spmd.load("digits").experiment
    data = dataclasses.replace(experiment.data, eval_transforms=(Half(),))
    with pytest.raises(ValueError, match=r"an example of shape \[4, 8, 1\] has 32 values"):
        dataclasses.replace(experiment, data=data).build()


# ---- mistakes

LABEL = {"label": ((), "int32")}
TWO = {"a": ((2, 2, 1), "uint8"), "b": ((2, 2, 1), "uint8")}
MISTAKES = [
    (lambda: Crop(-1), None, "crop: pixels=-1 must be at least 1"),
    (lambda: Mixup(-0.1), None, "mixup: alpha=-0.1 must be more than 0"),
    (lambda: Crop(5), None, "crop: pixels=5 must be less than the image's 6 x 5"),
    (Flip, LABEL, r"shape \[H, W, C\], or the name of one; the features are label \[\]"),
    (Flip, TWO, r"needs one image.*a \[2, 2, 1\], b \[2, 2, 1\]"),
    (
        Flip,
        {"a": ((2, 2, 1), "uint8"), "m": ((2, 2), "int32")},
        r"move a and not m.*a\+m, or only a",
    ),
    (lambda: Flip(("a", "c")), TWO, "flip: there is no feature 'c'. The features are a"),
    (
        lambda: Flip(("label",)),
        LABEL,
        r"moves features of shape \[H, W, ...\]; those named are label \[\]",
    ),
    (
        lambda: Crop(1, ("a", "m")),
        {"a": ((2, 2, 1), "uint8"), "m": ((2, 3), "int32")},
        r"one height and width; those named are a \[2, 2\], m \[2, 3\]",
    ),
    (lambda: Mixup(1.0), {"a": ((2, 2, 1), "uint8")}, "mixup needs a label"),
    (
        lambda: Mixup(1.0),
        {"a": ((2, 2, 1), "uint8"), "mix": ((), "float32"), **LABEL},
        "the feature name 'mix' is the loader's own",
    ),
    (Flip, {}, "need data.features, "),
]


@pytest.mark.parametrize("make,features,message", MISTAKES)
def test_mistakes(make, features, message):
    with pytest.raises(ValueError, match=message):
        Arrays(
            train=dict,
            eval=dict,
            features=config(()).features if features is None else features,
            transforms=(make(),),
        )


@dataclasses.dataclass(frozen=True)
class Wrong(Transform):
    """Declares something else than it gives."""

    declared: tuple = ()
    output: str = "float32"

    def features(self, features):
        return features | {name: (shape, dtype) for name, shape, dtype in self.declared}

    def __call__(self, batch, draws):
        return batch | {"image": batch["image"].astype(self.output)}


@pytest.mark.parametrize(
    "how,message",
    [
        (
            Wrong(),
            r"Wrong\(.*'image' is declared uint8\[8, 6, 5, 3\] and .* gives float32\[8, 6, 5, 3\]",
        ),
        (
            Wrong((("image", (6, 5), "uint8"),), "uint8"),
            r"'image' is declared uint8\[8, 6, 5\] and the transform gives uint8\[8, 6, 5, 3\]",
        ),
        (
            Wrong((("new", (), "int32"),), "uint8"),
            r"'new' is declared int32\[8\] and .* gives nothing",
        ),
    ],
)
def test_an_output_that_is_not_as_declared(how, message):
    with pytest.raises(ValueError, match=message):
        stream(config((how,)), batch_size=8, stop=1)


def test_a_feature_of_the_loaders_own():
    with pytest.raises(ValueError, match=r"Wrong\(.*the feature name 'weight' is the loader's own"):
        config((Wrong((("weight", (), "float32"),)),))
