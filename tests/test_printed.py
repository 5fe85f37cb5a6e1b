"""Every command that README.md and docs/ print, as printed; tests/printed.py says what is substituted."""

from __future__ import annotations

import collections
import importlib.util
from pathlib import Path

import pytest

from spmd.cli import main
from tests import printed


@pytest.fixture(autouse=True, scope="module")
def started(devices):
    """JAX with its eight devices, before an experiment asks for fewer."""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The working directory of a reader of each page: what one command trains, the next ones read."""

    class Directories(dict[str, Path]):
        def __missing__(self, page: str) -> Path:
            self[page] = tmp_path_factory.mktemp(Path(page).stem)
            printed.prepare(page, self[page])
            return self[page]

    return Directories()


@pytest.fixture(scope="module")
def ran():
    """The commands that were run, by page."""
    return collections.defaultdict(set)


def cases():
    """(page, command), each command once, on the first page that prints it."""
    first = {line: page for page in reversed(printed.PAGES) for line in printed.run_py(page)}
    for page in printed.PAGES:
        for line in [x for x in dict.fromkeys(printed.run_py(page)) if first[x] == page]:
            tier = printed.tier(page, line)
            marks = [getattr(pytest.mark, tier)] if tier else []
            yield pytest.param(page, line, marks=marks, id=f"{Path(page).stem}: {line[:100]}")


@pytest.mark.parametrize("page, line", list(cases()))
def test_as_printed(page, line, directories, ran, run_cli, monkeypatch, capsys):
    needed = printed.IMPORTS.get(page)
    if needed and importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs requirements/peers.txt, or {needed}")
    monkeypatch.chdir(directories[page])

    def run(line: str) -> None:
        if line in ran[page]:
            return
        for other in printed.needs(page, line):
            run(other)
        wanted, said = printed.ENDS.get(line, (0, ""))
        words = printed.words(line)
        if words[0] == "launch" or line.startswith(printed.FRESH):
            done = run_cli(*words, cwd=directories[page])
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code = _main(words)
            out, err = capsys.readouterr()
        assert code == wanted and said in err, f"{line}\n{out}\n{err}"
        assert out or wanted, line
        ran[page].add(line)

    run(line)


def _main(words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as end:
        return int(end.code or 0)


def test_every_other_command_has_a_reason_not_to_be_run():
    for page in printed.PAGES:
        for line in printed.commands(page):
            if not line.startswith(printed.RUN):
                assert line.startswith(tuple(printed.NOT_RUN)), f"{page}: {line}"


def test_what_is_substituted_is_printed():
    """No entry of tests/printed.py outlives its command."""
    lines = [line for page in printed.PAGES for line in printed.commands(page)]
    run = [line.removeprefix(printed.RUN) for line in lines]
    for entry in printed.NOT_RUN:
        assert any(line.startswith(entry) for line in lines), entry
    for entry in (*printed.DRY, *printed.ENDS, *printed.SLOW, *printed.LONG):
        assert any(line.startswith(entry) for line in run), entry
    assert len(run) > 45
