"""A picture of a batch: its images in a grid, masks laid over them in colours, labels below."""

# N examples, H height, W width, C channels

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spmd.core.fields import check

COLUMNS, GAP, TEXT = 8, 4, 12  # pixels
LEAST = 64  # smaller images are enlarged
WRITTEN = 112  # so are those with names below them
# Colours of the classes of a mask from 1 on (Okabe and Ito's, which the colour-blind tell apart).
COLOURS = np.array(
    [
        *([230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66]),
        *([0, 114, 178], [213, 94, 0], [204, 121, 167]),
    ]
)


def image_feature(batch: Mapping[str, Any]) -> str:
    """The feature of a batch that holds images, [N, H, W, 1, 3 or 4]; "" where there is none."""
    for name, x in batch.items():
        if x.ndim == 4 and x.shape[-1] in (1, 3, 4):
            return name
    return ""


def draw(batch: Mapping[str, Any], file: Path, classes: Sequence[str] = ()) -> None:
    """Write a grid of the images of a batch.

    Args:
      batch: {feature: [N, ...]} after its transforms.
      file: the new PNG.
      classes: names of the labels.

    Raises:
      ValueError: the batch has no images.
    """
    from PIL import Image, ImageDraw

    name = image_feature(batch)
    shown = ", ".join(f"{k} {x.dtype}{list(x.shape[1:])}" for k, x in batch.items())
    check(bool(name), f"there are no images to draw, [H, W, 1, 3 or 4]; the features are {shown}")
    pixels = to_rgb(batch[name])
    masks = [x for x in batch.values() if x.shape == pixels.shape[:3] and x.dtype.kind in "iu"]
    for mask in masks:
        pixels = overlay(pixels, mask)
    times = -(-LEAST // min(pixels.shape[1:3]))
    pixels = pixels.repeat(times, axis=1).repeat(times, axis=2)
    num, height, width = pixels.shape[:3]
    columns = min(COLUMNS, num)
    rows = -(-num // columns)
    cell = (width + GAP, height + GAP + TEXT)
    sheet = Image.new("RGB", (columns * cell[0] + GAP, rows * cell[1] + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    labels = batch.get("label")
    for i in range(num):
        x, y = GAP + i % columns * cell[0], GAP + i // columns * cell[1]
        sheet.paste(Image.fromarray(pixels[i]), (x, y))
        if labels is not None and labels.ndim == 1:
            number = int(labels[i])
            text = classes[number] if 0 <= number < len(classes) else str(number)
            pen.text((x, y + height), text[: max(width // 6, 1)], fill="black")
    sheet.save(file)


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Images to look at.

    Args:
      images: [N, H, W, C], uint8 or floating; values beyond [0, 1] are scaled to their range.

    Returns:
      uint8 [N, H, W, 3].
    """
    if images.dtype != np.uint8:
        values = np.asarray(images, np.float32)
        low, high = min(float(values.min()), 0.0), max(float(values.max()), 1.0)
        images = np.rint((values - low) / (high - low) * 255).astype(np.uint8)
    return images.repeat(3, axis=3) if images.shape[3] == 1 else images[..., :3]


def overlay(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Masks over images.

    Args:
      pixels: uint8 [N, H, W, 3].
      mask: classes [N, H, W]; 0 is left as it is, values below 0 are darkened.

    Returns:
      uint8 [N, H, W, 3].
    """
    colour = COLOURS[(np.maximum(mask, 1) - 1) % len(COLOURS)]
    colour = np.where((mask < 0)[..., None], 0, colour)
    blended = (pixels.astype(np.int64) + colour) // 2
    return np.where((mask != 0)[..., None], blended, pixels).astype(np.uint8)


def draw_panels(
    panels: Sequence[np.ndarray],
    captions: Sequence[Sequence[tuple[str, str]]],
    titles: Sequence[str] = (),
) -> bytes:
    """A picture of examples: for each its panels side by side, lines of text below.

    Args:
      panels: each uint8 [N, H, W, 3].
      captions: N times lines (text, colour).
      titles: of the panels, written over those of the first example; empty writes none.

    Returns:
      The PNG.
    """
    from PIL import Image, ImageDraw

    times = -(-WRITTEN // min(panels[0].shape[1:3]))
    strips = np.concatenate([x.repeat(times, 1).repeat(times, 2) for x in panels], axis=2)
    num, height, width = strips.shape[:3]
    columns = max(min(COLUMNS // len(panels), num), 1)
    lines = max(len(caption) for caption in captions)
    head = TEXT if titles else 0
    cell = (width + GAP, height + GAP + TEXT * lines)
    size = (columns * cell[0] + GAP, head + -(-num // columns) * cell[1] + GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        pen.text((GAP + i * width // len(panels), 0), title, fill="black")
    for i, caption in enumerate(captions):
        x, y = GAP + i % columns * cell[0], head + GAP + i // columns * cell[1]
        sheet.paste(Image.fromarray(strips[i]), (x, y))
        for line, (text, colour) in enumerate(caption):
            pen.text((x, y + height + line * TEXT), text[: max(width // 6, 1)], fill=colour)
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()
