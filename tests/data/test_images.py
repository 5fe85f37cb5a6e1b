"""Encoded images: decoded as pillow does, at the size that is needed, with their masks; bad ones named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from spmd.data import Arrays, decode, loader, registry, resizing
from spmd.data.augment import Flip, Mixup
from spmd.data.color import ColorJitter, Normalize
from spmd.data.decode import read_header
from spmd.data.erasing import CutMix, RandomErasing
from spmd.data.randaugment import RandAugment
from spmd.data.resizing import CentralCrop, CropOrPad, Decode, RandomCrop, RandomResizedCrop, Resize
from spmd.data.skips import Skips

ENCODED = {"image": ((), "bytes"), "label": ((), "int32")}
PAIRS = {"image": ((), "bytes"), "mask": ((), "bytes")}
BOTH = ("image", "mask")


def picture(height=37, width=53, seed=0):
    """Smooth noise, which JPEG keeps: uint8 [H, W, 3]."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels, form="PNG", **options):
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, form, **options)
    return file.getvalue()


def data(images, transforms, features=None, skip_bad=0, **more):
    arrays = {"image": images, "label": np.arange(len(images), dtype=np.int32), **more}
    features = features or ENCODED
    give = lambda: {name: arrays[name] for name in features}
    return Arrays(
        train=give,
        eval=give,
        batch_size=4,
        features=features,
        transforms=transforms,
        eval_transforms=transforms,
        skip_bad=skip_bad,
    )


def batches(config, stop=3, **kwargs):
    source = config.open("train")
    skips = config.skips("training")
    kwargs = {"batch_size": 4, "seed": 3, "stop": stop, "skips": skips} | kwargs
    transform = config.pipeline("train", source, 3, skips)
    parts = list(loader.train_batches(source, transform=transform, **kwargs))
    return {name: np.concatenate([b[name] for b in parts]) for name in parts[0]}


# ---- decoding


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_box_is_what_pillow_gives_of_the_reduced_image(scale):
    pixels = picture(163, 217)
    data_ = encode(pixels, "JPEG", quality=95)
    size = (160 // scale - 1, 208 // scale - 1)
    got = decode.decode(read_header(data_, 3), (1, 5, 160, 208), size)
    # The whole decoded image, cut and resized: the reduced one differs by its filter only.
    whole = Image.open(io.BytesIO(data_)).crop((5, 1, 213, 161))
    want = np.asarray(whole.resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)
    assert got.shape == (*size, 3) and got.dtype == np.uint8
    assert abs(got.astype(int) - want).mean() < (1e-9 if scale == 1 else 3)


@pytest.mark.parametrize("encoded", [True, False])
def test_crop_or_pad_keeps_the_values_of_pixels(encoded):
    pixels, mask = picture(30, 21), np.arange(30 * 21).reshape(30, 21) % 7
    transform = CropOrPad(26, 24, BOTH)
    if encoded:
        files = encode(pixels), encode(mask.astype(np.uint8))
        got = batches(
            data([files[0]] * 4, (Decode(), transform), PAIRS, mask=[files[1]] * 4), stop=1
        )
    else:
        features = {"image": ((30, 21, 3), "uint8"), "mask": ((30, 21), "int32")}
        arrays = [np.stack([x] * 4) for x in (pixels, mask.astype(np.int32))]
        got = batches(data(arrays[0], (transform,), features, mask=arrays[1]), stop=1)
    margins = ((0, 0), (1, 2))
    want = np.pad(pixels[2:28], (*margins, (0, 0)))
    np.testing.assert_array_equal(got["image"], np.stack([want] * 4))
    want = np.pad(mask[2:28], margins, constant_values=-1)  # no class, so that it counts nowhere
    np.testing.assert_array_equal(got["mask"], np.stack([want] * 4))


def test_random_crop_cuts_image_and_mask_at_one_place():
    y, x = np.mgrid[:30, :21]
    pixels = np.stack([y, x, 0 * x], -1).astype(np.uint8)
    config = data(
        [encode(pixels)] * 8, (Decode(), RandomCrop(8, 9, BOTH)), PAIRS,
        mask=[encode((y + x).astype(np.uint8))] * 8,
    )  # fmt: skip
    got = batches(config, stop=4)
    places = {tuple(image[0, 0, :2]) for image in got["image"]}
    assert len(places) > 8 and max(y for y, _ in places) <= 22 and max(x for _, x in places) <= 12
    for image, mask in zip(got["image"], got["mask"], strict=True):
        top, left = image[0, 0, :2].astype(int)
        np.testing.assert_array_equal(image, pixels[top : top + 8, left : left + 9])
        np.testing.assert_array_equal(mask, (y + x)[top : top + 8, left : left + 9])


def test_without_a_size_pixels_are_exact():
    pixels = picture()
    np.testing.assert_array_equal(decode.decode(read_header(encode(pixels), 3)), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation, form):
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data_ = encode(picture(), form, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data_))).convert("RGB"))
    header = read_header(data_, 3)
    assert (header.height, header.width) == upright.shape[:2]
    np.testing.assert_array_equal(decode.decode(header), upright)
    np.testing.assert_array_equal(
        decode.decode(header, (3, 4, 20, 21)), upright[3:23, 4:25]
    )  # a box of the upright image


def test_all_colours_become_the_channels_asked_for():
    rgb = Image.fromarray(picture())
    deep = (np.asarray(rgb.convert("L")).astype(np.uint16) << 8) + 7
    forms = {
        "grey": (encode(rgb.convert("L")), "L"),
        "rgba": (encode(rgb.convert("RGBA")), "RGBA"),
        "palette": (encode(rgb.convert("P")), "P"),
        "cmyk": (encode(rgb.convert("CMYK"), "JPEG", quality=100), "CMYK"),
        "grey jpeg": (encode(rgb.convert("L"), "JPEG", quality=100), "L"),
        "16 bits": (encode(deep), "I;16"),
    }
    want = {1: np.asarray(rgb.convert("L"))[..., None], 3: np.asarray(rgb)}
    for name, (data_, mode) in forms.items():
        for channels in (1, 3, 4):
            header = read_header(data_, channels)
            got = decode.decode(header)
            assert header.mode == mode, name
            assert got.shape == (37, 53, channels) and got.dtype == np.uint8, name
            close = want[1] if "grey" in name or "16" in name else want.get(channels, want[3])
            assert abs(got[..., :3].astype(int) - close).mean() < 16, (name, channels)
    np.testing.assert_array_equal(decode.decode(read_header(forms["16 bits"][0], 1)), want[1])


def test_a_mask_keeps_its_classes():
    classes = np.random.default_rng(0).integers(0, 4, (20, 30)).astype(np.uint8)
    palette = Image.fromarray(classes)
    palette.putpalette([(7 * i) % 256 for i in range(768)])
    assert palette.mode == "P"
    for data_ in (encode(classes), encode(palette), encode(classes.astype(np.uint16))):
        got = decode.decode(read_header(data_, 0))
        np.testing.assert_array_equal(got, classes)
        assert got.dtype == np.int32
    with pytest.raises(decode.Undecodable, match="grey or have a palette"):
        decode.decode(read_header(encode(picture()), 0))
    # Nearest: no class arises that is not there.
    small = decode.decode(read_header(encode(classes * 3), 0), None, (7, 7))
    assert set(np.unique(small)) <= {0, 3, 6, 9}


# ---- the transforms


def test_a_size_must_be_fixed_and_images_decoded():
    images = [encode(picture())]
    with pytest.raises(
        ValueError, match=r"'image' is still encoded after data.transforms \(none\)"
    ):
        data(images, ())
    with pytest.raises(ValueError, match="of different sizes after"):
        data(images, (Decode(),))
    with pytest.raises(ValueError, match="flip: the images of 'image' differ in size; put resize"):
        data(images, (Decode(), Flip()))
    with pytest.raises(ValueError, match="decode takes encoded images"):
        data(images, (Decode(), Resize(8), Decode()))
    with pytest.raises(ValueError, match=r"needs one image, a feature of shape \[H, W, C\]"):
        data(images, (Resize(8),))


def test_encoded_images_of_any_size_are_one_array():
    images = [encode(picture(20 + i, 30 - i, i)) for i in range(9)]
    got = batches(data(images, (Decode(), Resize(12, 10))))
    assert got["image"].shape == (12, 12, 10, 3) and got["image"].dtype == np.uint8
    for image, example in zip(got["image"], got["example_id"], strict=True):
        whole = Image.open(io.BytesIO(images[example]))
        np.testing.assert_array_equal(image, whole.resize((10, 12), Image.Resampling.BILINEAR))


def test_random_crops_are_inside_and_of_the_area_and_proportion():
    sides = np.array([[375, 500]] * 4000 + [[10, 400]] * 10)
    draws = resizing.Draws(0, 0, np.arange(len(sides)))
    boxes = RandomResizedCrop(224).boxes(sides, draws)
    assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sides).all()
    area = boxes[:4000, 2:].prod(1) / (375 * 500)
    proportion = boxes[:4000, 3] / boxes[:4000, 2]
    assert (
        area.min() > 0.07 and area.max() <= 1 and 0.4 < area.mean() < 0.5
    )  # boxes that do not fit are drawn anew
    assert proportion.min() > 0.73 and proportion.max() < 1.36
    # Each row's draws are its own, whatever rows are beside it.
    alone = RandomResizedCrop(224).boxes(sides[7:9], resizing.Draws(0, 0, np.arange(7, 9)))
    np.testing.assert_array_equal(alone, boxes[7:9])
    np.testing.assert_array_equal(CentralCrop(224).boxes(sides[:1], draws), [[23, 86, 328, 328]])


def pair(num=9):
    """Images whose red is that of their mask's class: 40 for each."""
    rng, images, masks = np.random.default_rng(0), [], []
    for i in range(num):
        classes = np.kron(rng.integers(0, 4, (4, 5)), np.ones((8, 8), int)).astype(np.uint8)
        images.append(encode(np.stack([classes * 40, classes * 0 + i, classes * 0], -1)))
        masks.append(encode(classes))
    return images, masks


@pytest.mark.parametrize(
    "how",
    [
        (RandomResizedCrop(24, 0.3, BOTH), Flip(BOTH)),
        (CentralCrop(24, 0.7, BOTH),),
        (Resize(64, 80, BOTH), RandAugment(2, 9, BOTH)),
    ],
)
def test_what_moves_an_image_moves_its_mask(how):
    images, masks = pair()
    got = batches(data(images, (Decode(), *how), PAIRS, mask=masks))
    moved = got["mask"]
    assert moved.shape == got["image"].shape[:3] and moved.dtype == np.int32
    if isinstance(how[-1], RandAugment):
        # Colours change too: in an example each class has one red, its own, where it is labelled.
        for image, mask in zip(got["image"], moved, strict=True):
            for c in range(4):
                red = image[..., 0][mask == c]
                assert red.size == 0 or np.median(abs(red - np.median(red))) <= 12
        assert (moved == -1).any()  # what came in from outside is not labelled
        return
    red = np.rint(got["image"][..., 0] / 40)
    assert (red == moved).mean() > 0.85  # images are interpolated at the borders of classes
    assert len(np.unique(moved)) == 4


def test_a_mask_of_another_size_is_a_bad_record():
    images, masks = pair()
    masks[4] = encode(np.zeros((3, 4), np.uint8))
    how = (Decode(), Resize(8, 8, BOTH))
    with pytest.raises(
        ValueError, match=r"example 4 of the training data: 'mask' is 3 x 4 pixels and 'image'"
    ):
        batches(data(images, how, PAIRS, mask=masks))
    got = batches(data(images, how, PAIRS, skip_bad=1, mask=masks))
    np.testing.assert_array_equal(got["weight"], got["example_id"] != 4)


@pytest.mark.parametrize("kind", ["truncated", "no image", "empty"])
def test_a_corrupt_image_is_named_or_passes_with_weight_zero(kind):
    images = [encode(picture(60, 70, i), "JPEG") for i in range(9)]
    images[2] = {"truncated": images[2][:900], "no image": b"hello", "empty": b""}[kind]
    how = (Decode(), RandomResizedCrop(16), Mixup(0.4))
    with pytest.raises(
        ValueError, match=r"example 2 of the training data: 'image': .*--data.skip-bad"
    ):
        batches(data(images, how))
    got = batches(data(images, how, skip_bad=1), stop=9)
    np.testing.assert_array_equal(got["weight"], got["example_id"] != 2)
    partner_bad = got["label_b"] == 2
    assert partner_bad.any() and (got["mix"][partner_bad] == 1).all()
    skips = Skips("training", 1)
    config = data(images, how, skip_bad=1)
    source = config.open("train")
    list(
        loader.eval_batches(
            source, batch_size=4, skips=skips, transform=config.pipeline("eval", source, 0, skips)
        )
    )
    assert list(skips.reasons) == [2]


def test_draws_do_not_depend_on_processes_dispatch_or_resumption():
    images = [encode(picture(40 + i, 50, i), "JPEG") for i in range(11)]
    how = (
        *(Decode(), RandomResizedCrop(24), Flip(), ColorJitter(), RandAugment()),
        *(RandomErasing(), Normalize(), CutMix()),
    )
    config = data(images, how)
    whole = batches(config, stop=6)
    assert whole["image"].dtype == np.float32
    for name in ("image", "mix", "label_b"):
        late = batches(config, start=2, stop=6)[name]
        np.testing.assert_array_equal(whole[name][8:], late)
        halves = [batches(config, stop=6, rows=np.arange(k, 4, 2))[name] for k in range(2)]
        np.testing.assert_array_equal(whole[name][0::4], halves[0][0::2])
        np.testing.assert_array_equal(whole[name][3::4], halves[1][1::2])


def test_color_jitter_is_its_definition():
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3)).astype(np.uint8)
    got = ColorJitter(0.3, 0.2, 0.1)({"image": images}, resizing.Draws(5, 0, np.arange(4)))["image"]
    draws = resizing.Draws(5, 0, np.arange(4))
    b, c, s = (1 + most * (2 * draws.uniform() - 1) for most in (0.3, 0.2, 0.1))
    weights = np.array([0.299, 0.587, 0.114])
    for i, image in enumerate(images / 255):
        image = np.clip(image * b[i], 0, 1)
        mean = (image @ weights).mean()
        image = np.clip(mean + c[i] * (image - mean), 0, 1)
        own = (image @ weights)[..., None]
        image = np.clip(own + s[i] * (image - own), 0, 1)
        np.testing.assert_allclose(got[i], image * 255, atol=0.51)


def test_erasing_replaces_rectangles_of_half_of_the_images():
    images = np.full((2000, 32, 32, 3), 7, np.uint8)
    got = RandomErasing()({"image": images}, resizing.Draws(0, 0, np.arange(2000)))["image"]
    changed = (got != 7).any(-1)
    share = changed.mean((1, 2))
    assert (share > 0).mean() == pytest.approx(0.5, abs=0.04)
    assert share[share > 0].min() > 0.015 and share.max() < 0.42
    for mask in changed[share > 0][:50]:  # a rectangle: rows and columns, all of them
        assert mask[mask.any(1)][:, mask.any(0)].mean() > 0.99
    assert (images == 7).all()


def test_cutmix_shares_are_those_of_its_rectangles():
    num = 400
    images = np.zeros((num, 20, 30, 1), np.uint8) + np.arange(num)[:, None, None, None] % 250
    arrays = {"image": images.astype(np.uint8), "label": np.arange(num, dtype=np.int32)}
    features = {"image": ((20, 30, 1), "uint8"), "label": ((), "int32")}
    give = lambda: arrays
    config = Arrays(train=give, eval=give, batch_size=8, features=features, transforms=(CutMix(),))
    got = batches(config, stop=20, batch_size=8)
    own = (got["image"] == (got["label"] % 250)[:, None, None, None]).mean((1, 2, 3))
    different = got["label"] % 250 != got["label_b"] % 250
    np.testing.assert_allclose(own[different], got["mix"][different], atol=1e-6)
    assert 0.3 < got["mix"].mean() < 0.75
    with pytest.raises(
        ValueError, match="with mixup the feature name 'label_b' is the loader's own"
    ):
        Arrays(train=give, eval=give, features=features, transforms=(CutMix(), Mixup(1.0)))


def test_randaugment_operations_keep_the_shape_and_grey_images():
    images = np.stack([picture(20, 24, i) for i in range(200)])
    for given in (images, images[..., :1].copy()):
        draws = resizing.Draws(1, 0, np.arange(200))
        got = RandAugment(1, 10)({"image": given}, draws)["image"]
        same = (got == given).all((1, 2, 3)).mean()
        assert got.shape == given.shape and 0 < same < 0.5
        for row in (0, 77):
            alone = RandAugment(1, 10)(
                {"image": given[row : row + 1]}, resizing.Draws(1, 0, np.arange(row, row + 1))
            )
            np.testing.assert_array_equal(alone["image"][0], got[row])


def test_normalize_is_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    got = Normalize()({"image": images}, resizing.Draws(0, 0, np.arange(3)))["image"]
    want = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="std has 2 values and 'image' 3 channels"):
        data([encode(picture())], (Decode(), Resize(8), Normalize((0.5,), (0.5, 0.5))))


@pytest.mark.parametrize(
    "text",
    [
        "decode,random_resized_crop:224,flip,normalize",
        "decode:1,resize:28:30,normalize:0.5:0.25",
        "decode,central_crop:96:1.0:image+mask,color_jitter:0.1:0.2",
        "randaugment:3,random_erasing,cutmix",
    ],
)
def test_words_are_read_and_written(text):
    assert registry.text_of(registry.parse(text)) == text
