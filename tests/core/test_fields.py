"""Identity of configurations: what a run directory holds fixed, also over an upgrade."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from etils import epath

from spmd.core import fields
from spmd.core.fields import free
from spmd.data import registry
from spmd.experiment.registry import find, from_file
from spmd.train import rundir


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    rate: float = 0.5
    threads: int = free(2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other:
    rate: float = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: Inner
    chosen: Any = Other()
    made: Other = dataclasses.field(default_factory=lambda: Other(rate=3.0))
    widths: tuple[int, ...] = (1, 2)


def test_defaults_are_those_of_the_classes():
    config = Config(model=Inner(size=3, rate=0.7), chosen=Inner(size=1), widths=(9,))
    assert fields.defaults(config) == {
        "model.rate": 0.5,
        "chosen.rate": 0.5,  # of the class that is chosen now, not of the default one
        "made.class": "Other",
        "made.rate": 3.0,  # the field's own default goes before the class's
        "widths": [1, 2],
    }
    assert fields.defaults(config).keys() <= fields.identity(config).keys()


def directory(tmp_path, identity):
    (tmp_path / "config.json").write_text(json.dumps({"identity": identity}))
    return epath.Path(tmp_path)


def test_a_field_that_a_run_did_not_know_had_its_default(tmp_path):
    config = Config(model=Inner(size=3))
    old = {k: v for k, v in fields.identity(config).items() if k in ("class", "model.size")}
    path = directory(tmp_path, old | {"model.class": "Inner", "chosen.class": "Other"})
    same = lambda now: rundir.check_identity(path, fields.identity(now), fields.defaults(now))
    same(config)
    for changed, line in (
        ({"widths": (1, 3)}, r"widths: \[1, 2\] -> \[1, 3\]"),
        ({"model": Inner(size=3, rate=0.1)}, r"model.rate: 0.5 -> 0.1"),
        ({"model": Inner(size=4)}, r"model.size: 3 -> 4"),
        ({"chosen": Inner(size=1)}, r"chosen.size: \(absent\) -> 1"),
    ):
        with pytest.raises(ValueError, match=line):
            same(dataclasses.replace(config, **changed))


def test_a_field_that_is_gone_is_a_difference(tmp_path):
    config = Config(model=Inner(size=3))
    path = directory(tmp_path, fields.identity(config) | {"model.bias": True})
    with pytest.raises(ValueError, match=r"model.bias: True -> \(absent\)"):
        rundir.check_identity(path, fields.identity(config), fields.defaults(config))


def test_a_digits_run_from_before_the_average_goes_on(tmp_path):
    exp = from_file(find("digits"))
    old = {k: v for k, v in exp.identity().items() if k != "optimizer.ema"}
    path = directory(tmp_path, old)
    rundir.check_identity(path, exp.identity(), fields.defaults(exp))
    averaged = dataclasses.replace(exp, optimizer=dataclasses.replace(exp.optimizer, ema=0.9))
    with pytest.raises(ValueError, match=r"optimizer.ema: 0.0 -> 0.9"):
        rundir.check_identity(path, averaged.identity(), fields.defaults(averaged))


def test_a_run_with_data_augment_continues_with_the_same_transforms(tmp_path):
    exp = from_file(find("digits"))
    rest = {k: v for k, v in exp.identity().items() if k != "data.transforms"}
    old = {"data.augment.class": "Augment"} | {
        f"data.augment.{k}": v for k, v in {"crop": 1, "flip": True, "mixup": 0.2}.items()
    }
    path = directory(tmp_path, rest | old)
    with_words = lambda words: dataclasses.replace(
        exp, data=dataclasses.replace(exp.data, transforms=registry.parse(words))
    )
    check = lambda now: rundir.check_identity(path, now.identity(), fields.defaults(now))
    assert check(with_words("crop:1,flip,mixup:0.2")) == {}
    with pytest.raises(ValueError, match=r"data.transforms.2.alpha: 0.2 -> 0.3"):
        check(with_words("crop:1,flip,mixup:0.3"))
    off = {"data.augment.crop": 0, "data.augment.flip": False, "data.augment.mixup": 0.0}
    path = directory(tmp_path, rest | old | off)
    assert check(exp) == {}


@pytest.mark.parametrize("before", ["", "flip", "crop:1,flip"])
@pytest.mark.parametrize("now", ["", "crop:2", "crop:2,flip", "flip,mixup:0.5"])
def test_tuples_of_classes_are_restored(before, now):
    classes = {cls.__name__: cls for cls in registry.TRANSFORMS.values()}
    now = registry.parse(now)
    assert fields.restore(registry.parse(before), fields.plain(now), classes) == now
    if len(now) > len(registry.parse(before)):
        with pytest.raises(ValueError, match="is not in this list here"):
            fields.restore(registry.parse(before), fields.plain(now))
