"""README.md, CONTRIBUTING.md and docs/: the code, the files and the versions that they name exist."""

from __future__ import annotations

import ast
import re

import pytest

from tests.command import REPOSITORY

ROOT_PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
PAGES = [*ROOT_PAGES, *sorted((REPOSITORY / "docs").glob("*.md"))]
NAMED = re.compile(r"`((?:spmd|tests|experiments|benchmarks)/[\w/]+\.py)(?::([\w.]+))?`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def names(tree: ast.Module) -> set[str]:
    """Classes, functions and methods (`Class.method`) of a file."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    for path, name in NAMED.findall(text):
        file = REPOSITORY / path
        assert file.is_file(), f"{path} is no file"
        if name:
            assert name in names(ast.parse(file.read_text())), f"{path} has no {name}"
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), f"{link} is no file"


def test_the_page_of_strategies_names_code_for_every_section():
    rows = (REPOSITORY / "docs" / "strategies.md").read_text().splitlines()
    for section in ("split data", "split model", "initialise", "read", "train", "synchronise"):
        (row,) = (row for row in rows if row.startswith(f"| {section} |"))
        assert any(name for _, name in NAMED.findall(row)), section


def test_the_page_of_strategies_has_every_strategy_and_network():
    from spmd.analysis.plan.network import NETWORKS
    from spmd.strategies import STRATEGIES

    text = (REPOSITORY / "docs" / "strategies.md").read_text()
    assert [name for name in (*STRATEGIES, *NETWORKS) if f"`{name}" not in text] == []


def test_pre_commit_runs_the_locked_ruff():
    (rev,) = re.findall(r"rev: v(\S+)", (REPOSITORY / ".pre-commit-config.yaml").read_text())
    assert f"\nruff=={rev}\n" in (REPOSITORY / "requirements" / "dev.txt").read_text()


def test_the_newest_release_is_this_version():
    import spmd

    released = re.findall(r"^## \[(\d\S*)\] - ", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert released[0] == spmd.__version__
