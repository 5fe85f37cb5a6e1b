"""Images decoded at the size that is needed: header first, then the box that a transform asks for.

JPEG files without rotation go through simplejpeg where it is installed, all others through pillow: both are
libjpeg-turbo with the same settings, and give the same pixels. Where the box is at least twice the size asked
for, the decoder computes fewer pixels (the inverse DCT of 4, 2 or 1 instead of 8 points).
"""

# H height, W width, C channels

from __future__ import annotations

import functools
import importlib
import io
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:  # imported where an image is decoded: opening decoded data needs none
    from PIL import Image

T = TypeVar("T")
Box = tuple[int, int, int, int]  # top, left, height, width

JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif\x00\x00"
_ORIENTATION = 0x0112
_QUARTER_TURNS = (5, 6, 7, 8)  # orientations that exchange height and width
_TURNS = {  # orientation -> how the stored image is turned upright, by pillow's names
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Encoded(NamedTuple):
    """An image whose header has been read.

    data: the file. height, width: after its EXIF orientation is applied. orientation: 1 is upright. mode: its
    colours, as pillow names them. channels: to decode to; 0 is a mask, whose values are classes. problem: why
    it cannot be decoded, or "".
    """

    data: bytes
    height: int
    width: int
    orientation: int
    mode: str
    channels: int
    problem: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """[H, W, C], of a mask [H, W]."""
        return (self.height, self.width, *([self.channels] if self.channels else []))


@functools.cache
def _simplejpeg() -> Any:
    """The faster decoder, or None."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def has_simplejpeg() -> bool:
    """Whether JPEG images go through simplejpeg."""
    return _simplejpeg() is not None


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """The threads of all decoding in this process, one for each core that it may use."""
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count() or 1
    return ThreadPoolExecutor(cores, thread_name_prefix="decode")


def map_rows(function: Callable[..., T], *columns: Sequence[Any]) -> list[T]:
    """`function` of each row in the pool of decoding threads, in order."""
    rows, at_once = list(zip(*columns, strict=True)), 8
    if len(rows) <= 2:
        return [function(*row) for row in rows]
    parts = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
    return [
        x
        for part in _pool().map(lambda part: [function(*row) for row in part], parts)
        for x in part
    ]


def read_header(data: bytes, channels: int) -> Encoded:
    """The size of an encoded image; a problem where it is none. channels: as in Encoded."""
    if not data:
        return Encoded(b"", 1, 1, 1, "", channels, "the file is empty")
    jpeg, decoder = data.startswith(JPEG), _simplejpeg()
    try:
        if jpeg and decoder is not None and data.find(_EXIF, 0, 2**16) < 0:
            height, width, colours, _ = decoder.decode_jpeg_header(data, strict=False)
            mode = {"Gray": "L", "CMYK": "CMYK", "YCCK": "CMYK"}.get(colours, "RGB")
            return Encoded(data, height, width, 1, mode, channels)
        with _opened(data) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
            orientation = orientation if orientation in _TURNS else 1
            width, height = image.size[::-1] if orientation in _QUARTER_TURNS else image.size
            return Encoded(data, height, width, orientation, image.mode, channels)
    except Exception as error:  # of a decoder, whatever its kind
        return Encoded(b"", 1, 1, 1, "", channels, _reason(error))


def _opened(data: bytes) -> Image.Image:
    from PIL import Image

    with warnings.catch_warnings():  # large images are decoded all the same
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:150]
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no image that pillow reads"
    return f"it cannot be decoded ({text or type(error).__name__})"


_SCRATCH = threading.local()


def _scratch(name: str, size: int) -> np.ndarray:
    """Memory of this thread, uint8 [size], used again: fresh pages cost much of decoding."""
    buffer = getattr(_SCRATCH, name, None)
    if buffer is None or len(buffer) < size:
        buffer = np.empty(size, np.uint8)
        setattr(_SCRATCH, name, buffer)
    return buffer[:size]


class Undecodable(ValueError):
    """An image that cannot be decoded."""


def decode(
    image: Encoded, box: Box | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Pixels of a box, resized.

    Args:
      image: its header.
      box: by default the image.
      size: (height, width) of the result, by default that of the box.

    Returns:
      uint8 [H, W, C]; of a mask int32 [H, W].

    Raises:
      Undecodable: the file is damaged.
    """
    if image.problem:
        raise Undecodable(image.problem)
    box = box or (0, 0, image.height, image.width)
    size = size or box[2:]
    try:
        if not image.channels:
            return _decode_mask(image, box, size)
        scale = _scale(image, box, size)
        decoder = _simplejpeg()
        if decoder is not None and _is_plain(image):
            least = [-(-side // scale) for side in (image.height, image.width)]
            pixels = decoder.decode_jpeg(
                image.data,
                min_height=least[0],
                min_width=least[1],
                buffer=_scratch("pixels", 3 * least[0] * least[1]),
            )
            return resize(*_cut(pixels, box, scale), size)
        with _opened(image.data) as opened:
            if scale > 1:
                opened.draft("RGB", (image.width // scale, image.height // scale))
            pixels = np.asarray(_converted(opened, image))
        return resize(*_cut(pixels.reshape(*pixels.shape[:2], -1), box, scale), size)
    except Exception as error:  # of a decoder, whatever its kind
        raise Undecodable(_reason(error)) from None


def _is_plain(image: Encoded) -> bool:
    """Whether simplejpeg decodes it as pillow does."""
    upright = image.orientation == 1 and image.mode == "RGB"
    return upright and image.channels == 3 and image.data.startswith(JPEG)


def _scale(image: Encoded, box: Box, size: tuple[int, int]) -> int:
    """By how much the decoder may reduce the image: 1, 2, 4 or 8."""
    if image.orientation != 1 or image.mode not in ("RGB", "L") or image.channels == 4:
        return 1
    if not image.data.startswith(JPEG):
        return 1
    scales = [s for s in (8, 4, 2) if box[2] >= s * size[0] and box[3] >= s * size[1]]
    return scales[0] if scales else 1


def _converted(opened: Image.Image, image: Encoded) -> Image.Image:
    """The image upright, in the colours that are asked for."""
    from PIL import Image

    if opened.mode.startswith("I"):  # 16 bits, of which the upper 8 count
        pixels = np.asarray(opened).astype(np.int64) >> 8
        opened = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if opened.mode == "P":
        opened = opened.convert("RGBA" if "transparency" in opened.info else "RGB")
    return _upright(opened.convert(_MODES[image.channels]), image.orientation)


def _upright(opened: Image.Image, orientation: int) -> Image.Image:
    from PIL import Image

    turn = _TURNS.get(orientation)
    return opened.transpose(getattr(Image.Transpose, turn)) if turn else opened


def _cut(
    pixels: np.ndarray, box: Box, scale: int
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """(the pixels around the box, the box within them) of an image that was reduced by `scale`.

    A reduced image has a last row for a part of 8 pixels too: its size is no measure of the scale.
    """
    top, left = box[0] / scale, box[1] / scale
    bottom, right = (box[0] + box[2]) / scale, (box[1] + box[3]) / scale
    y, x = int(top), int(left)
    part = pixels[y : -int(-bottom // 1), x : -int(-right // 1)]
    return part, (top - y, left - x, bottom - y, right - x)


def _decode_mask(image: Encoded, box: Box, size: tuple[int, int]) -> np.ndarray:
    """Classes int32 [H, W]: the values of a grey image, or the indices of one with a palette."""
    with _opened(image.data) as opened:
        if opened.mode not in ("L", "P", "1") and not opened.mode.startswith("I"):
            raise Undecodable(
                f"as a mask it must be grey or have a palette, a class for each pixel, and is {opened.mode}"
            )
        values = np.asarray(_upright(opened, image.orientation)).astype(np.int32)
    top, left, height, width = box
    return resize_nearest(values[top : top + height, left : left + width], size)


def resize_nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, ...] -> [*size, ...], each the value whose centre is nearest."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64)
        for new, old in zip(size, values.shape[:2], strict=True)
    )
    if values.shape[:2] == tuple(size):
        return np.ascontiguousarray(values)
    return values[rows[:, None], columns]


def resize(
    pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int]
) -> np.ndarray:
    """The box (top, left, bottom, right) of [H, W, C] at another size: bilinear, with antialiasing."""
    from PIL import Image

    height, width, channels = pixels.shape
    if (height, width) == tuple(size) and box == (0, 0, height, width):
        return pixels.copy()  # the decoder's memory is used again
    pillow_box, pillow_size = (box[1], box[0], box[3], box[2]), (size[1], size[0])
    if pixels.dtype == np.uint8 and channels in _MODES:
        rows = _scratch("rows", pixels.size).reshape(pixels.shape)
        np.copyto(rows, pixels)
        mode = _MODES[channels]
        picture = Image.frombuffer(mode, (width, height), rows, "raw", mode, 0, 1)
        small = picture.resize(pillow_size, Image.Resampling.BILINEAR, pillow_box)
        return np.frombuffer(small.tobytes(), np.uint8).reshape(*size, channels)
    planes = [
        Image.fromarray(np.ascontiguousarray(pixels[..., c], np.float32)).resize(
            pillow_size, Image.Resampling.BILINEAR, pillow_box
        )
        for c in range(channels)
    ]
    out = np.stack([np.asarray(plane) for plane in planes], axis=-1)
    if np.issubdtype(pixels.dtype, np.integer):
        out = np.rint(out)
    return out.astype(pixels.dtype)
