"""run.py plan: its views, the search, budgets, and the page that they make."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser

import pytest

import spmd
from spmd.analysis.plan import layout, planner, report
from spmd.analysis.plan.layout import Layout
from spmd.analysis.plan.search import Candidate
from spmd.cli import main
from spmd.experiment import budget
from spmd.hardware import hlo, targets
from tests.marks import slow_but

LLAMA = ("--experiment", "llama3_8b", "--model.attention", "splash")
FSDP = ("--mesh.data", "1", "--mesh.fsdp", "-1")


def plan(*words):
    return main(["plan", *words])


def load(name, *words):
    return spmd.load(name, words).experiment


def test_a_plan_without_compiling(capsys, tmp_path):
    file = tmp_path / "plan.json"
    words = (*LLAMA, "--target", "v5p:4x4x4", *FSDP, "--no-compile")
    assert plan(*words, "--json", str(file)) == 0
    shown = capsys.readouterr().out
    assert "it fits: a device has 95.0 GiB" in shown and "matmuls take" in shown
    found = json.loads(file.read_text())
    assert found["fits"] and found["compiled"] is None and found["devices"] == 64
    made = found["estimate"]
    assert made["step_seconds"] == pytest.approx(sum(made["seconds"].values()))
    assert found["memory"]["parameters"] == pytest.approx(8_030_261_248 * 4 / 64, rel=1e-3)
    assert 0.3 < made["mfu"] < 0.85


N = 8
EXACT = 2 * (N - 1) / N
REPLICAS = ["--mesh.data", "1", "--mesh.replica", "8"]
INT8 = ["--strategy.compress.kind", "int8", "--strategy.compress.block", "64"]
MERGES = {  # (strategy, what a device sends of the bytes of the parameters)
    "local": (["local", "--strategy.period", "20", *REPLICAS], EXACT / 20),
    "local_int8": (["local", "--strategy.period", "20", *REPLICAS, *INT8], EXACT * 17 / 64 / 20),
    "server": (["server"], EXACT),
    "int8": (["allreduce", *INT8], EXACT * 17 / 64),
    "fsdp": (["allreduce", "--mesh.data", "2", "--mesh.fsdp", "4"], 1 / 4),
}


@pytest.mark.parametrize("case", slow_but((), MERGES, gate=("local",)))
def test_other_strategies_are_planned_from_their_program(case, capsys):
    """State to the byte, merges by axis, and a step's time with them."""
    words, part = MERGES[case]
    given = ("--experiment", "digits", "--model.hidden", "256", "256", "--target", f"h100:{N}")
    assert plan(*given, "--strategy", *words, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    held, compiled = found["memory"], found["compiled"]
    state = sum(held[name] for name in ("parameters", "optimizer", "model_state", "strategy"))
    assert state == sum(compiled["state"].values())
    assert compiled["memory"]["arguments"] - state == pytest.approx(held["batch"], abs=64)
    merged = [c for c in found["collectives"] if c["payload"] == "merges"]
    params = 256 * (64 + 1 + 256 + 1 + 10) + 10
    assert sum(c["wire_bytes"] for c in merged) == pytest.approx(4 * params * part, rel=0.03)
    spent = found["estimate"]["networks"]
    assert any(name.startswith("merges over") and "NVLink" in name for name in spent)
    assert plan(*given, "--strategy", *words) == 0
    shown = capsys.readouterr().out
    assert f", strategy {words[0]}, " in shown and re.search("merges over .*NVLink", shown)


def test_what_does_not_fit_says_so(capsys):
    words = ("--target", "v5e:4x4", "--mesh.data", "1", "--mesh.fsdp", "16")
    assert plan(*LLAMA, *words, "--no-compile", "--show", "memory") == 1
    assert "it does NOT fit: a device has 16.0 GiB" in capsys.readouterr().out


def test_a_search_ranks_what_fits_and_says_why_not(capsys, tmp_path):
    page = tmp_path / "search.html"
    assert plan(*LLAMA, "--target", "v5p:4x4x4", "--search", "--html", str(page)) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\d+ layouts on v5p:4x4x4: \d+ fit", shown)
    assert "rejected: needs more memory" in shown and "does not divide the 32 heads" in shown
    assert page.read_text().count("<circle") > 100


def test_a_search_says_what_a_pipeline_is_worth():
    def candidate(sizes, seconds, bubble=0.0, reason=""):
        layout = Layout(sizes, accumulate=8)
        parts = {"matmuls": seconds, "bubble": bubble}
        return Candidate(layout, known._replace(layout=layout, seconds=parts), reason)

    known = planner.plan(load("llama3_8b", *FSDP), "v5p:4x4x4", compiled=False).estimate
    assert known

    fsdp, piped = candidate({"fsdp": 64}, 4), candidate({"data": 16, "stage": 4}, 4, 1)
    said = report.pipelines([fsdp, piped])
    assert said.startswith(
        "A pipeline loses to FSDP: the best one (data=16 stage=4 accumulate=8 1f1b"
    )
    assert "takes 5 s per step, 25% more than 4 s (fsdp=64" in said
    assert said.endswith("its stages wait 20% of the time.")
    assert report.pipelines([candidate({"fsdp": 64}, 8), piped]).startswith("A pipeline wins over")
    assert report.pipelines([fsdp, piped._replace(reason="too large")]) == "No pipeline fits."
    assert report.pipelines([piped]).startswith("Only pipelines fit: the best is data=16 stage=4")
    assert report.pipelines([fsdp]) == ""


def test_the_words_of_a_search_plan_the_same():
    exp = load("llama3_8b", *LLAMA[2:])
    first = planner.search(exp, "v5p:4x4x4")[0]
    words = [*LLAMA[2:], *first.layout.words()]
    again = planner.plan(load("llama3_8b", *words), "v5p:4x4x4", compiled=False)
    assert again.layout == first.layout and again.estimate == first.estimate
    again = layout.apply(first.layout, exp)
    assert layout.from_experiment(again, 64) == first.layout


@pytest.mark.gate
@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu")
def test_the_best_of_a_search_are_ranked_by_the_compiler(capsys):
    tiny = ("--model.layers", "2", "--model.embed", "128", "--model.mlp", "256", "--model.scan")
    words = ("--experiment", "lm_stdlib", *tiny, "--target", "v5e:2x2", "--search")
    assert plan(*words, "--best", "2", "--json", "-") == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    compiled = [each for each in found if each["compiled"]]
    assert len(compiled) == 2 and shown.err.count("compiled in") == 2
    assert all(each["peak"] != each["estimate"]["memory"]["peak"] for each in compiled)
    fits = [each["estimate"]["step_seconds"] for each in found if not each["reason"]]
    assert fits == sorted(fits)
    assert plan(*words, "--best", "2") == 0  # from the cache
    assert "* memory and collectives by the target's compiler" in capsys.readouterr().out


def test_scaling(capsys):
    names = ("v5p:2x2x2", "v5p:4x4x4")
    assert plan(*LLAMA, "--show", "scaling", "--targets", *names) == 0
    shown = capsys.readouterr().out
    assert shown.count("weak ") == shown.count("strong ") == 2
    assert "fsdp: bound by communication with fewer tokens on a device than" in shown


@pytest.fixture(scope="module")
def compiled():
    """digits, its step compiled for 8 simulated devices in a process of its own."""
    words = ["--mesh.data", "2", "--mesh.fsdp", "4"]
    return planner.plan(load("digits", *words), "cpu:8")


def test_a_compiled_plan_names_axes_and_lines(compiled):
    assert compiled.compiled.how == "estimated"
    text = report.comms_view(compiled)
    assert "data x fsdp" in text and "spmd/models/mlp.py:" in text
    assert "no speed is known for cpu:8" in report.summary(compiled)


def test_a_budget_names_the_collective_and_its_line(compiled):
    program = compiled.compiled.program
    total = sum(c.count * c.wire_bytes for c in program.collectives if "data" in c.axes)
    holds = spmd.CommsBudget(forbid=("all-to-all",), max_bytes={"data": f"{int(total) + 1} B"})
    assert budget.find_violations(holds, program) == []
    exceeded = spmd.CommsBudget(forbid=("all-reduce",), max_bytes={"data": "1 KB", "tensor": "1 B"})
    forbidden, over = budget.find_violations(exceeded, program)
    assert forbidden.startswith("all-reduce is forbidden, the step has")
    assert "spmd/models/mlp.py:" in forbidden
    assert f"may send 1,000 bytes in a step (1 KB), it sends {int(total):,}" in over


def test_check_ends_with_1_when_the_budget_is_broken(run_main):
    words = ("--simulate", "2", "--check", "--budget.forbid")
    done = run_main("plan", "--experiment", "digits", *words, "all-reduce")
    assert done.returncode == 1 and "all-reduce is forbidden" in done.stdout, done.stderr
    done = run_main("plan", "--experiment", "digits", *words, "all-to-all")
    assert done.returncode == 0 and "the budget holds" in done.stdout, done.stderr


def test_equal_collectives_are_shown_as_one():
    made = hlo.Collective("all-reduce", ("data",), 2, 8, 3, "f32", "a", "spmd/a.py:1", False)
    other = hlo.Collective("all-reduce", ("data",), 2, 64, 1, "f32", "b", "spmd/a.py:2", False)
    joined = hlo.merge_alike([made, other, made])
    assert [(c.bytes, c.count) for c in joined] == [(64, 1), (8, 6)]


@pytest.mark.parametrize(
    ("text", "size"), [("50 MB", 50_000_000), ("1.5 GiB", 3 * 2**29), ("7", 7), ("2KB", 2000)]
)
def test_sizes(text, size):
    assert budget.parse_bytes(text) == size


class Page(HTMLParser):
    """Open tags, and what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.seen = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "rect", "circle", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(compiled, tmp_path):
    from spmd.analysis.plan import html

    file = tmp_path / "plan.html"
    html.write(compiled, str(file))
    page = Page()
    page.feed(file.read_text())
    assert page.open == [] and page.fetched == [] and page.seen.count("svg") == 2
    assert "http" not in file.read_text()
    known = planner.plan(load("llama3_8b", *FSDP), "h100:64", compiled=False)
    html.write(known, str(file))
    assert file.read_text().count("<svg") == 3 and "a H100" in file.read_text()
    assert targets.parse("h100:64") == known.target
