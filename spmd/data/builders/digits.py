"""The 1,797 handwritten digits of the UCI test set, 8 x 8 pixels.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning
Repository, 1998 (doi 10.24432/C50P49), CC BY 4.0; digits.npz holds the copy that scikit-learn ships
(BSD-3-Clause), values 0..16 as uint8. Every fifth example is the test split.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

CITATION = """@misc{alpaydin1998optical,
  title={Optical Recognition of Handwritten Digits},
  author={Alpaydin, E. and Kaynak, C.},
  year={1998}, howpublished={UCI Machine Learning Repository}, doi={10.24432/C50P49}}"""


class Digits(tfds.core.GeneratorBasedBuilder):
    """Images uint8 [8, 8, 1] scaled to 0..255, labels 0..9."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(8, 8, 1)),
                "label": tfds.features.ClassLabel(num_classes=10),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            features=features,
            supervised_keys=("image", "label"),
            citation=CITATION,
            description="Handwritten digits, 8 x 8 (UCI, the set that scikit-learn ships).",
            homepage="https://archive.ics.uci.edu/dataset/80",
            license="CC BY 4.0",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        with np.load(pathlib.Path(__file__).with_name("digits.npz"), allow_pickle=False) as data:
            images, labels = data["images"], data["labels"]
        test = np.arange(len(labels)) % 5 == 4
        return {
            "train": self._generate_examples(images[~test], labels[~test]),
            "test": self._generate_examples(images[test], labels[test]),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator[Any]:
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            pixels = np.round(image * (255 / 16)).astype(np.uint8)
            yield i, {"image": Image.fromarray(pixels, mode=None), "label": int(label)}
