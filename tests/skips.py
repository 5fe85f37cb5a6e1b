"""Skipped tests are listed by reason; in the gate (CI=true) one that nobody allowed is a failure."""

from __future__ import annotations

import collections
import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ALLOWED = Path(__file__).parent / "allowed_skips.txt"


def conditions() -> dict[str, bool]:
    """The sections of the file, and whether each holds in this environment."""
    return {
        "always": True,
        "where there are no system packages": bool(os.environ.get("SPMD_NO_SYSTEM_PACKAGES")),
        "without requirements/peers.txt": importlib.util.find_spec("torch") is None,
    }


def allowed(text: str, holds: Mapping[str, bool]) -> list[str]:
    """How the reasons begin that may skip a test; ValueError for a section that nobody knows."""
    found, section = [], ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("["):
            section = line.strip("[]")
            if section not in holds:
                raise ValueError(
                    f"{ALLOWED.name}: unknown section {section!r}; known: {', '.join(holds)}"
                )
        elif not line.startswith("#") and holds[section]:
            found.append(line)
    return found


def forbidden(reasons: Iterable[str], begins: list[str]) -> list[str]:
    """The reasons that begin with none of those allowed."""
    return [reason for reason in reasons if not reason.startswith(tuple(begins))]


class Skips:
    """A plugin of the process that reports (not of xdist's workers)."""

    def __init__(self) -> None:
        self.reasons: dict[str, list[str]] = collections.defaultdict(list)
        self.bad: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            self._record(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._record(report)

    def _record(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # (file, line, "Skipped: why")
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.reasons[why.removeprefix("Skipped: ")].append(report.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if os.environ.get("CI") != "true":
            return
        self.bad = forbidden(self.reasons, allowed(ALLOWED.read_text(), conditions()))
        if self.bad and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.reasons:
            return
        terminalreporter.section("skipped, by reason")
        for reason, tests in sorted(self.reasons.items()):
            mark = f"  NOT ALLOWED by {ALLOWED.name}" if reason in self.bad else ""
            more = f" and {len(tests) - 1} more" if len(tests) > 1 else ""
            terminalreporter.line(f"{reason}{mark}: {tests[0]}{more}")
