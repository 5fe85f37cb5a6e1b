"""Augmentation: each op against a slow oracle, every draw a function of the stream position only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd.data import Arrays, Augment, augment, loader

ALL = Augment(crop=2, flip=True, mixup=0.4)


def config(how=ALL, shape=(6, 5, 3), dtype="uint8", num=37, features=None):
    rng = np.random.default_rng(num)
    arrays = {
        "image": rng.integers(0, 256, (num, *shape)).astype(dtype),
        "label": np.arange(num, dtype=np.int32),
    }
    features = features or {"image": (shape, dtype), "label": ((), "int32")}
    give = lambda: arrays
    return Arrays(train=give, eval=give, batch_size=8, features=features, augment=how)


def stream(data, *, seed=3, **kwargs):
    """The augmented batches, as one array for each feature."""
    source = data.open("train")
    batches = list(
        loader.train_batches(
            source, seed=seed, transform=augment.transform(data, source, seed), **kwargs
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
    how, (h, w, _) = data.augment, data.features["image"][0]
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
        if how.crop:
            y, x = (int(draw(first + i) * (2 * how.crop + 1)) for i in range(2))
            padded = np.pad(image, ((how.crop,) * 2, (how.crop,) * 2, (0, 0)))
            image = padded[y : y + h, x : x + w]
        return np.fliplr(image) if how.flip and draw(first + 2) < 0.5 else image

    image = moved(arrays["image"][example], 0)
    if not how.mixup:
        return {"image": image}
    other = int(draw(4) * len(arrays["label"]))
    return {
        "image": (image / 255, moved(arrays["image"][other], 5) / 255),
        "label_b": arrays["label"][other],
    }


@pytest.mark.parametrize(
    "how", [Augment(crop=2), Augment(flip=True), Augment(crop=1, flip=True), ALL]
)
def test_each_example_equals_the_slow_oracle(how):
    data = config(how)
    got = stream(data, batch_size=8, stop=12)
    moved = 0
    for position, example in enumerate(got["example_id"]):
        want = slow(data, 3, position, example)
        image = want["image"]
        if how.mixup:
            share = float(got["mix"][position])
            image = share * image[0] + (1 - share) * image[1]
            assert got["label_b"][position] == want["label_b"]
        np.testing.assert_allclose(got["image"][position], image, rtol=1e-5, atol=1e-6)
        moved += (got["image"][position] != data.train()["image"][example]).any()
    assert moved > 30
    np.testing.assert_array_equal(got["label"], got["example_id"])  # labels here are the ids


def test_nothing_is_done_unless_asked():
    data = config(Augment())
    assert augment.transform(data, data.open("train"), 0) is None
    got = stream(data, batch_size=8, stop=9)
    np.testing.assert_array_equal(got["image"], data.train()["image"][got["example_id"]])


# ---- the draws


def test_draws_are_uniform_and_independent():
    positions = np.arange(100_000)
    draws = np.stack([augment.uniform(seed, i, positions) for seed in (0, 1) for i in range(3)])
    assert draws.min() >= 0 and draws.max() < 1
    for u in draws:
        counts = np.histogram(u, 50, (0, 1))[0]
        assert np.square(counts - 2000).sum() / 2000 < 95  # chi-squared, 49 degrees: 1e-4
    off = np.corrcoef(np.concatenate([draws, np.roll(draws, 1, axis=1)])) - np.eye(12)
    assert abs(off).max() < 0.02
    np.testing.assert_array_equal(augment.uniform(0, 1, positions[5:9]), draws[1][5:9])


def test_flips_half_of_the_time_and_each_epoch_anew():
    data = config(Augment(flip=True), num=500)
    got = stream(data, batch_size=500, stop=6)
    flipped = (got["image"] != data.train()["image"][got["example_id"]]).any((1, 2, 3))
    assert flipped.mean() == pytest.approx(0.5, abs=0.04)
    each = np.zeros(500, int)
    np.add.at(each, got["example_id"], flipped)
    assert np.bincount(each, minlength=7).argmax() == 3 and each.min() < 2 and each.max() > 4


def test_crops_reach_every_offset_alike():
    data = config(Augment(crop=1), shape=(3, 3, 1), num=900)
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
    got = stream(config(Augment(mixup=alpha), shape=(1, 1, 1)), batch_size=1000, stop=20)
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
    how = Augment(
        crop=data.draw(st.integers(0, 2)),
        flip=data.draw(st.booleans()),
        mixup=data.draw(st.sampled_from([0.0, 0.3])),
    )
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
    a, b = (stream(config(Augment(mixup=1.0)), seed=s, batch_size=8, stop=4) for s in (0, 1))
    assert not np.isin(a["mix"], b["mix"]).any()


@pytest.mark.parametrize("how", [Augment(), Augment(crop=1, flip=True), ALL])
@pytest.mark.parametrize("dtype", ["uint8", "float32", "float64"])
def test_the_abstract_batch_is_that_of_the_loader(how, dtype):
    data = config(how, dtype=dtype)
    source = data.open("train")
    change = augment.transform(data, source, 0)
    (batch,) = loader.train_batches(source, batch_size=8, seed=0, stop=1, transform=change)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == data.abstract_batch(8)


def test_evaluation_is_never_augmented():
    data = config(ALL)
    (batch,) = loader.eval_batches(data.open("eval"), batch_size=37)
    assert set(batch) == {"image", "label", "example_id", "weight"}
    np.testing.assert_array_equal(batch["image"], data.eval()["image"])


# ---- mistakes

LABEL = {"label": ((), "int32")}
MISTAKES = [
    (Augment(crop=-1), None, "data.augment.crop=-1 must not be negative"),
    (Augment(mixup=-0.1), None, "data.augment.mixup=-0.1 must not be negative"),
    (Augment(crop=5), None, "data.augment.crop=5 must be less than the image's 6 x 5"),
    (Augment(flip=True), LABEL, r"shape \[H, W, C\]; the features are label int32\[\]"),
    (
        Augment(flip=True),
        {"a": ((2, 2, 1), "uint8"), "b": ((2, 2, 1), "uint8")},
        r"needs one image.*a uint8\[2, 2, 1\], b uint8\[2, 2, 1\]",
    ),
    (Augment(mixup=1.0), {"a": ((2, 2, 1), "uint8")}, "data.augment.mixup needs a label"),
    (
        Augment(mixup=1.0),
        {"a": ((2, 2, 1), "uint8"), "mix": ((), "float32"), **LABEL},
        "the feature name 'mix' is the loader's own",
    ),
]


@pytest.mark.parametrize("how,features,message", MISTAKES)
def test_mistakes(how, features, message):
    with pytest.raises(ValueError, match=message):
        config(how, features=features)
