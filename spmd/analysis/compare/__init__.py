"""Compare strategies: each trains with the same budget, and is charged for the bytes that its step sends.

Every run has a directory of its own inside that of the comparison: a finished run is reused, an unfinished
one resumes. All mistakes that can be found are reported before the first step of the first run.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from spmd import strategies
from spmd.core.fields import check, closest, defaults, located_names
from spmd.core.storage import json_text
from spmd.experiment import overrides

if TYPE_CHECKING:
    from etils import epath

    from spmd.analysis.compare.report import Comparison, StrategyResult
    from spmd.experiment.base import Experiment

T = TypeVar("T")

ONE_PROCESS = "compare trains in one process; there, use --simulate 8"
SECTIONS = ("mesh", "optimizer")  # an entry may set fields of these beside its strategy


def run(
    exp: Experiment,
    entries: Sequence[str],
    *,
    network: str = "10gbe",
    compute: float = 0.0,
    say: Callable[[str], None] = print,
) -> Comparison:
    """Trains each entry and compares them.

    Args:
        exp: the experiment; its mesh and optimizer may be overridden by an entry.
        given: entries `local` or `local:period=50:mesh.replica=8`.
        network: names of plan.network.NETWORKS: `10gbe`, or `replica=wan,data=nvlink`.
        compute: seconds of a step's computation on a device; 0 measures it on this machine.
        say: receives a line per run.

    Raises:
        ValueError: a mistake, reported before anything is trained.
        Stopped: interrupted; the next call resumes.
    """
    from spmd.analysis.compare import cost
    from spmd.analysis.compare.report import Comparison
    from spmd.train import rundir

    variants = parse_entries(exp, entries)
    directory = rundir.locate(exp.run.dir, f"{exp.name}-compare")
    check(
        not (directory / "config.json").exists(),
        f"{directory} holds a run; a comparison is a directory of several: choose another --run.dir",
    )
    variants = {entry: _in_directory(directory, entry, each) for entry, each in variants.items()}
    check(compute >= 0, f"compute={compute} must not be negative; 0 measures it on this machine")
    check(not exp.setup(), ONE_PROCESS)
    source = exp.data.open_checked("train")
    charges, num_steps = {}, 0
    for entry, each in variants.items():
        program = _name_errors(entry, lambda each=each: each.build(source=source))
        num_steps = program.num_steps
        _name_errors(entry, lambda each=each, num=num_steps: _check_free(each, num))
        charges[entry] = cost.charge(each, program)
        _name_errors(entry, lambda entry=entry: charges[entry].seconds(network))
    results = []
    for i, (entry, each) in enumerate(variants.items(), 1):
        say(f"[{i}/{len(variants)}] {entry}")
        results.append(_train(entry, each, charges[entry]))
    comparison = Comparison(
        name=exp.name,
        directory=str(directory),
        network=network,
        num_devices=charges[next(iter(charges))].num_devices,
        num_steps=num_steps,
        compute=compute or cost.measure_compute(exp, source),
        measured=not compute,
        results=results,
    )
    comparison.write()
    return comparison


def _train(entry: str, exp: Experiment, charge: Any) -> StrategyResult:
    """Trains, resumes or reuses the run of an entry. A run that diverged is kept, with the reason."""
    from etils import epath

    from spmd.analysis.compare.report import StrategyResult
    from spmd.train import metrics, rundir
    from spmd.train.log import NonFinite

    failed = ""
    try:
        path = epath.Path(exp.train_run().dir)
    except NonFinite as error:
        failed, path = str(error).partition(";")[0], rundir.locate(exp.run.dir, exp.name)
    lines: dict[int, dict[str, float]] = {}
    for line in metrics.read_lines(path):
        lines.setdefault(int(line["step"]), {}).update(line)
    return StrategyResult(entry, str(path), [lines[step] for step in sorted(lines)], charge, failed)


def _check_free(exp: Experiment, num_steps: int) -> None:
    """ValueError if the run directory holds a run that is not this entry's."""
    from spmd.train import rundir

    path = rundir.locate(exp.run.dir, exp.name)
    if exp.run.fresh or not (path / "config.json").exists():
        return
    rundir.check_identity(path, exp.identity(), defaults(exp), located_names(exp))
    done = rundir.summary(path)
    if done:
        was = json.loads((path / "config.json").read_text())["config"]
        now = json.loads(json_text(exp.config()))
        other = [name for name in ("mesh", "simulate") if was.get(name) != now[name]]
        check(
            not other,
            f"{path} holds a finished run with another {' and '.join(other)}: use another --run.dir, or"
            " --run.fresh to move the old runs aside",
        )
    check(
        not done or done["steps"] <= num_steps,
        f"{path} holds a run of {(done or {}).get('steps')} steps, and this comparison takes {num_steps}: use"
        " another --run.dir, or --run.fresh to move the old runs aside",
    )


def _name_errors(entry: str, call: Callable[[], T]) -> T:
    """Calls `call`; adds the name of the entry to its ValueError."""
    try:
        return call()
    except ValueError as error:
        raise ValueError(f"--strategies {entry}: {error}") from error


# ---- entries


def parse_entries(exp: Experiment, texts: Sequence[str]) -> dict[str, Experiment]:
    """Entry -> experiment. ValueError for unknown names and options."""
    entries = [entry.strip() for entry in texts if entry.strip()]
    names = ", ".join(strategies.STRATEGIES)
    check(
        bool(entries),
        "compare: which strategies? Type --strategies auto,allreduce, or with options"
        f" allreduce,local:period=50; known: {names}",
    )
    duplicates = [entry for entry in entries if entries.count(entry) > 1]
    check(
        not duplicates,
        f"--strategies has {duplicates[0] if duplicates else ''} twice; give it once",
    )
    return {
        entry: _name_errors(entry, lambda entry=entry: _variant(exp, entry)) for entry in entries
    }


def _variant(exp: Experiment, entry: str) -> Experiment:
    name, *options = entry.split(":")
    cls = strategies.named(name)
    words = ["--strategy", name]
    for option in options:
        words += _word(cls, option)
    return overrides.override(exp, words)[0]


def _word(cls: type[Any], option: str) -> list[str]:
    """Command-line words for an option of an entry: `period=50`, `mesh.replica=8`, `nesterov`."""
    key, equals, value = option.partition("=")
    fields = {f.name: f.default for f in dataclasses.fields(cls)}
    first = key.replace("-", "_").partition(".")[0]
    names = [*fields, *(f"{section}." for section in SECTIONS)]
    check(
        first in fields or (first in SECTIONS and "." in key),
        f"strategy {cls.name} has no option {key!r}.{closest(key, names)} It has"
        f" {', '.join(fields) or 'none'}; an entry may also set fields of {' and '.join(SECTIONS)}:"
        f" {cls.name}:mesh.replica=8",
    )
    path = f"strategy.{key}" if first in fields else key
    if isinstance(fields.get(key.replace("-", "_")), bool):
        check(
            value.lower() in ("", "true", "false"),
            f"{option!r} must be {key}, {key}=true or {key}=false",
        )
        if value.lower() == "false":
            head, _, last = path.rpartition(".")
            path = f"{head}.no-{last}"
        return [f"--{path}"]
    check(bool(equals and value), f"option {option!r} needs a value: {key}=VALUE")
    return [f"--{path}", value]


def _in_directory(directory: epath.Path, entry: str, exp: Experiment) -> Experiment:
    """The experiment with its run directory inside `directory`, named after the entry."""
    name = re.sub(r"[^\w.=+-]", "_", entry)
    return dataclasses.replace(exp, run=dataclasses.replace(exp.run, dir=str(directory / name)))
