"""Contestants that take turns: each a process that trains without end and idles between its turns.

A round lets them run one after another, and ratios are taken within rounds, since machines drift. Start-up,
compilation, evaluation and checkpoints are left out; reading, shuffling, metrics and logging are in.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENDLESS = 10**7  # steps
Speeds = dict[str, list[float]]
Facts = dict[str, dict[str, float]]
Run = Callable[["Gate", Path, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """run: called as run(gate, directory, options). per_step: what is counted, in one step. steps: timed in
    a turn. report: steps between its calls of the gate, the first of which only warm up in each turn.
    """

    title: str
    run: Run
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    per_step: int
    steps: int
    report: int = 50  # the default of --log.every

    @property
    def is_torch(self) -> bool:
        """Whether it needs PyTorch."""
        return self.run.__name__ == "pytorch"


class Gate:
    """A contestant's side: called with the steps done so far, it times a turn, reports it, and idles until
    the parent lets it go on.

    facts: asked at the end of each turn; goes to the parent with the speed.
    """

    def __init__(self, contestant: Contestant, quick: bool):
        self._report, self._per_step = contestant.report, contestant.per_step
        self._steps = contestant.report if quick else contestant.steps
        self._timed_from = self._report  # threads wake up, caches fill
        self._began: tuple[int, float] | None = None
        self._replies = os.fdopen(os.dup(1), "w")  # whatever else is printed goes elsewhere
        self.facts: Callable[[], dict[str, float]] = dict

    def __call__(self, step: int) -> None:
        now = time.perf_counter()
        if self._began is None:
            if step >= self._timed_from:
                self._began = step, now
        elif step >= self._began[0] + self._steps:
            speed = (step - self._began[0]) * self._per_step / (now - self._began[1])
            print(json.dumps({"speed": speed} | self.facts()), file=self._replies, flush=True)
            if not sys.stdin.readline():
                sys.exit()
            self._began, self._timed_from = None, step + self._report


def train(gate: Gate, experiment: Any) -> None:
    """An experiment through its public door; the lines that the loop prints call the gate."""

    class Lines(io.StringIO):
        def write(self, text: str) -> int:
            if found := re.match(r"step (\d+)/", text):
                gate(int(found[1]))
            return len(text)

    with contextlib.redirect_stdout(Lines()):
        experiment.train_run()


def endless(directory: str, report: int) -> list[str]:
    """Words of a run that does nothing but train."""
    never = str(ENDLESS)
    words = ["--train.steps", never, "--eval.every", never, "--checkpoint.every", never]
    return [*words, "--run.dir", directory, "--log.every", str(report)]


class Child:
    """The process of a contestant, idle but for its turns. facts: what it last said beside its speed."""

    def __init__(self, name: str, scratch: Path, words: list[str], env: dict[str, str]):
        self.name, self._log = name, scratch / f"{name}.log"
        self.facts: dict[str, float] = {}
        command = [sys.executable, sys.argv[0], "--child", name, "--scratch", str(scratch), *words]
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | env,
            )

    def wait(self) -> float:
        """Speed of the turn under way (the first is only its warm-up)."""
        assert self._process.stdout
        if not (line := self._process.stdout.readline()):
            raise SystemExit(
                f"contestant {self.name} failed with status {self._process.wait()}:\n"
                + "\n".join(self._log.read_text().splitlines()[-15:])
            )
        self.facts = json.loads(line)
        return self.facts.pop("speed")

    def run(self) -> float:
        """Lets it take one turn; its speed."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.wait()

    def end(self) -> None:
        """Asks it to leave and sees it gone."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """A script's contestants and what it asks of them.

    unit: what is counted, by the second. ratios: (contestant, peer, least ratio or None). quick: who takes
    part in --quick. prepare: writes the data that all share, prepare(data_dir, directory).
    """

    about: str | None
    unit: str
    contestants: dict[str, Contestant]
    ratios: tuple[tuple[str, str, float | None], ...]
    quick: tuple[str, ...]
    prepare: Callable[[str, Path], None]
    data_dir: str
    env: dict[str, str] = dataclasses.field(default_factory=lambda: {"JAX_PLATFORMS": "cpu"})

    def main(self) -> None:
        """The script: prints one table."""
        args = self.parse()
        if args.child:
            self.child(args)
            return
        speeds, _, compared = self.play(args)
        if args.json:
            numbers = {self.unit: speeds, "ratios": compared}
            Path(args.json).write_text(json.dumps(numbers, indent=1))

    def child(self, args: argparse.Namespace) -> None:
        """Run a contestant in its process."""
        one = self.contestants[args.child]
        places = {"run_dir": str(args.scratch / args.child), "data_dir": args.data_dir}
        one.run(Gate(one, args.quick), args.scratch, one.options | places)

    def play(self, args: argparse.Namespace) -> tuple[Speeds, Facts, list[dict[str, Any]]]:
        """(speeds, last facts, ratios) of all; prints the table."""
        names = list(args.only or (self.quick if args.quick else self.contestants))
        if not importlib.util.find_spec("torch"):
            names = [name for name in names if not self.contestants[name].is_torch]
            print("without PyTorch; to measure it too: pip install -r requirements/peers.txt")
        with tempfile.TemporaryDirectory() as scratch:
            self.prepare(args.data_dir, Path(scratch))
            words = ["--data-dir", args.data_dir] + (["--quick"] if args.quick else [])
            rounds = 1 if args.quick else args.rounds
            speeds, facts = measure(names, Path(scratch), rounds, words, self.env)
        compared = ratios(speeds, self.ratios)
        self.show(speeds, compared)
        return speeds, facts, compared

    def parse(self) -> argparse.Namespace:
        """The command line."""
        parser = argparse.ArgumentParser(
            description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--data-dir", default="", help=self.data_dir)
        parser.add_argument("--rounds", type=int, default=5)
        parser.add_argument("--json", default="", help="write the numbers there too")
        parser.add_argument(
            "--quick", action="store_true", help="one short round of a few: does it run?"
        )
        parser.add_argument(
            "--only", nargs="*", choices=self.contestants, help="only these contestants"
        )
        parser.add_argument("--child", choices=self.contestants, help=argparse.SUPPRESS)
        parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
        args = parser.parse_args()
        if args.rounds < 1:
            parser.error(f"--rounds {args.rounds} must be at least 1")
        return args

    def show(self, speeds: Speeds, compared: list[dict[str, Any]]) -> None:
        """The table."""
        title = lambda name: self.contestants[name].title
        print(f"{self.unit:<52}{'median':>10}{'min':>10}{'max':>10}")
        for name, each in speeds.items():
            low, high = min(each), max(each)
            print(f"{title(name):<52}{statistics.median(each):>10,.0f}{low:>10,.0f}{high:>10,.0f}")
        print(f"\n{'ratio, within rounds':<86}{'median':>8}{'min':>7}{'max':>7}  figure")
        for r in compared:
            text = f"{title(r['contestant'])} / {title(r['peer'])}"
            figure = "" if r["figure"] is None else f"  >= {r['figure']}"
            missed = "" if r["figure"] is None or r["median"] >= r["figure"] else "  missed"
            print(f"{text:<86}{r['median']:>8.2f}{r['min']:>7.2f}{r['max']:>7.2f}{figure}{missed}")


def measure(
    names: list[str], scratch: Path, rounds: int, words: list[str], env: dict[str, str]
) -> tuple[Speeds, Facts]:
    """(speed in each round, last facts) by contestant; every other round goes backwards, which cancels a
    drift.
    """
    children: list[Child] = []
    try:
        for name in names:
            children.append(Child(name, scratch, words, env))
        for child in children:
            child.wait()
        speeds: Speeds = {name: [] for name in names}
        for turn in range(rounds):
            for child in children[:: -1 if turn % 2 else 1]:
                speeds[child.name].append(child.run())
        return speeds, {child.name: child.facts for child in children}
    finally:
        for child in children:
            child.end()


def ratios(
    speeds: Speeds, wanted: tuple[tuple[str, str, float | None], ...]
) -> list[dict[str, Any]]:
    """Ratios within rounds: median, least, largest, and the figure to reach."""
    found = []
    for name, peer, figure in wanted:
        if name in speeds and peer in speeds:
            each = [a / b for a, b in zip(speeds[name], speeds[peer], strict=True)]
            summary = {"median": statistics.median(each), "min": min(each), "max": max(each)}
            found.append({"contestant": name, "peer": peer, "figure": figure} | summary)
    return found
