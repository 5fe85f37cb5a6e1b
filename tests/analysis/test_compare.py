"""run.py compare: one budget, bytes of the compiled step, seconds of the network model; runs are kept."""

from __future__ import annotations

import csv
import io
import json
import re
import signal

import pytest

import spmd
from spmd.analysis import compare
from spmd.analysis.plan import compile, network
from spmd.cli import main
from spmd.hardware import hlo, targets
from tests.command import until

WORDS = ["--model.hidden", "16", "--train.steps", "6", "--log.every", "2", "--log.no-tensorboard"]
EIGHT = ["--simulate", "8", "--mesh.replica", "2", "--mesh.data", "4"]
ENTRIES = ["auto", "allreduce", "auto:mesh.replica=1:mesh.data=1:mesh.fsdp=8"]
P = 4 * (64 * 16 + 16 + 16 * 10 + 10)  # bytes of the parameters
SCALARS = 64  # at most, of weights and metrics


@pytest.fixture(scope="module")
def done(tmp_path_factory, devices):
    """(words, what compare returned, its directory)."""
    place = tmp_path_factory.mktemp("compare") / "runs"
    words = [*WORDS, *EIGHT, "--run.dir", str(place)]
    network_of = "replica=wan,infiniband"
    return words, spmd.load("digits", words).compare(ENTRIES, network=network_of, compute=1), place


def read(place):
    return [*csv.DictReader(io.StringIO((place / "compare.csv").read_text()))]


def test_each_strategy_trains_with_one_budget(done):
    _, made, place = done
    rows = [row for row in read(place) if row["train/loss"]]
    assert [(r["strategy"], r["step"]) for r in rows] == [(e, s) for e in ENTRIES for s in "246"]
    losses = {e: [float(r["train/loss"]) for r in rows if r["strategy"] == e] for e in ENTRIES}
    for entry in ENTRIES[1:]:  # all are synchronous: the same seed, data and steps
        assert losses[entry] == pytest.approx(losses["auto"], rel=1e-4)
    configs = [json.loads(f.read_text())["config"] for f in sorted(place.glob("*/config.json"))]
    assert {c["strategy"]["class"] for c in configs} == {"Auto", "AllReduce"} and len(configs) == 3
    assert (place / "compare.png").read_bytes()[:4] == b"\x89PNG" and made.complete


def test_bytes_are_those_of_the_step_that_trains(done):
    words, made, place = done
    last = {r["strategy"]: r for r in read(place) if r["step"] == "6"}
    wide = [e for e in ENTRIES if "fsdp" not in e]
    for entry in wide:  # 2 (N-1)/N P, over both axes at once
        sent = float(last[entry]["sent_bytes"]) / 6
        assert 0 <= sent - 2 * 7 / 8 * P <= SCALARS
        assert last[entry]["sent_bytes[replica x data]"] == last[entry]["sent_bytes"]
    for result in made.results:
        options = [] if result.entry in wide else ["--mesh.replica", "1", "--mesh.data", "1"]
        options += [] if result.entry in wide else ["--mesh.fsdp", "8"]
        name = result.entry.partition(":")[0]
        program = spmd.load("digits", [*words, "--strategy", name, *options]).build()
        read_again = compile.compile_step(program, targets.parse("cpu:8")).program
        by_axes: dict[str, float] = {}
        for (axes, _), total in hlo.ledger(read_again).items():
            by_axes[" x ".join(axes)] = by_axes.get(" x ".join(axes), 0) + total.wire_bytes
        assert result.charge.sent == by_axes
        for axes, sent in by_axes.items():
            row = last[result.entry]
            assert float(row[f"sent_bytes[{axes}]"]) == pytest.approx(6 * sent)


def test_seconds_are_computation_and_the_network_model(done):
    _, made, place = done
    rows = {r["strategy"]: r for r in read(place) if r["step"] == "6"}
    levels = network.by_name("replica=wan,infiniband", {"replica": 2, "data": 4})
    whole = network.seconds(network.join(levels, ("replica", "data")), "all-reduce", P)
    spent = float(rows["allreduce"]["seconds"]) / 6 - 1
    assert spent == pytest.approx(whole)  # the gradients as one all-reduce; scalars left out
    assert 2 * network.HOP["WAN"] < whole < 3 * network.HOP["WAN"]
    assert float(rows[ENTRIES[2]]["seconds"]) / 6 - 1 < 1e-3  # over InfiniBand alone
    table = str(made)
    assert "1 s of computation (given)" in table and "replica x data" in table


@pytest.mark.gate
def test_finished_runs_are_taken_as_they_are(done, capsys):
    words, _, place = done
    before = {f: f.stat().st_mtime_ns for f in place.glob("*/metrics.jsonl")}
    line = ["--strategies", ",".join(ENTRIES[:2]), "--network", "nvlink"]
    assert main(["compare", "--experiment", "digits", *words, *line]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"step = [\d.]+ m?u?s of computation \(measured on one device", shown)
    assert shown.count("is finished: 6 steps") == 2 and "step 2/6" not in shown
    assert "communication on nvlink" in shown
    assert {f: f.stat().st_mtime_ns for f in place.glob("*/metrics.jsonl")} == before
    assert {r["strategy"] for r in read(place)} == {*ENTRIES[:2]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["--train.steps", "5"], "holds a run of 6 steps, and this comparison takes 5"),
        (["--mesh.replica", "4", "--mesh.data", "2"], "finished run with another mesh"),
        (["--seed", "1"], "holds a run of another identity"),
    ],
)
def test_runs_of_another_budget_are_refused_before_any_step(done, capsys, change, says):
    words, _, place = done
    before = sorted(place.rglob("*"))
    line = ["--strategies", "auto,allreduce", *change]
    assert main(["compare", "--experiment", "digits", *words, *line]) == 2
    assert says in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


@pytest.mark.gate
def test_a_strategy_that_diverges_is_shown_and_the_others_go_on(devices, tmp_path, capsys):
    line = ["--strategies", "auto:optimizer.learning_rate=1e30,allreduce", "--compute", "1"]
    words = [*WORDS, "--simulate", "1", "--run.dir", str(tmp_path / "runs")]
    assert main(["compare", "--experiment", "digits", *words, *line]) == 1
    shown = capsys.readouterr().out
    assert "diverged" in shown and "loss or gradient is not finite at step" in shown
    assert "[2/2] allreduce" in shown and "step 6  eval/accuracy" in shown


@pytest.mark.slow
def test_ctrl_c_leaves_a_comparison_that_goes_on(devices, start_cli, tmp_path, capsys):
    words = [*WORDS[:2], *WORDS[4:], "--checkpoint.every", "100000", "--simulate", "2"]
    words += ["--strategies", "auto,allreduce", "--run.dir", str(tmp_path / "runs")]
    line = ["compare", "--experiment", "digits", *words, "--train.steps"]
    process = start_cli(*line, "1000000")
    metrics = tmp_path / "runs" / "auto" / "metrics.jsonl"
    until(lambda: len(metrics.read_text().splitlines()) > 5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command resumes it" in said, said
    step = int(said.partition("at step ")[2].partition(",")[0])
    assert main([*line, str(step + 2), "--compute", "1", "--log.every", "1000"]) == 0
    shown = capsys.readouterr().out
    assert f"resuming at step {step} of {step + 2}" in shown and "[2/2] allreduce" in shown
    assert read(tmp_path / "runs")


# ---- mistakes

MISTAKES = {
    "none": ("", "which strategies?"),
    "unknown": ("auto,allreduse", "unknown strategy 'allreduse'. Did you mean 'allreduce'?"),
    "option": ("auto:zerro=1", "auto has no option 'zerro'. Did you mean 'zero'?"),
    "value": ("auto:zero=two", "--strategies auto:zero=two: "),
    "no value": ("auto:zero", "option 'zero' needs a value"),
    "flag": ("auto:sequence_parallel=maybe", "sequence_parallel=true or"),
    "budget": ("auto:seed=1", "auto has no option 'seed'"),
    "twice": ("auto,auto", "has auto twice"),
    "network": ("auto --network 10gb", "unknown network '10gb'. Did you mean '10gbe'?"),
    "axis": ("auto --network replika=wan,home", "no mesh axis. Did you mean 'replica'?"),
    "axis without": ("auto --network replica=wan", "has no entry for mesh.data=2; add data=NAME"),
    "compute": ("auto --compute -1", "compute=-1.0 must not be negative"),
    "mesh": (
        "auto,local:replicas=1:period=1:mesh.data=1:mesh.replica=2",
        "divide over mesh.replica=2",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_message_and_nothing_is_written(case, devices, tmp_path, capsys):
    given, says = MISTAKES[case]
    place = tmp_path / "runs"
    words = [*WORDS, "--simulate", "2", "--run.dir", str(place), "--strategies", *given.split(" ")]
    assert main(["compare", "--experiment", "digits", *words]) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.startswith("error: ") and "[1/" not in shown.out
    assert not place.exists()


def test_options_of_an_entry():
    exp = spmd.load("digits").experiment
    made = compare.parse_entries(
        exp, ["auto:zero=1:sequence_parallel", "auto:sequence-parallel=false"]
    )
    first, second = (e.strategy for e in made.values())
    assert (first.zero, first.sequence_parallel) == (1, True)
    assert (second.zero, second.sequence_parallel) == (3, False)
    assert exp.strategy.sequence_parallel is False  # the experiment's own is left alone


def test_a_run_is_no_place_for_a_comparison(done, capsys):
    words, _, place = done
    line = ["--strategies", "auto", "--run.dir", str(place / "auto")]
    assert main(["compare", "--experiment", "digits", *words, *line]) == 2
    assert "holds a run; a comparison is a directory of several" in capsys.readouterr().err


# ---- the network model


def test_named_networks_have_sources_and_order():
    networks = network.NETWORKS
    rates = [networks[n].bandwidth for n in ("nvlink", "ici", "infiniband", "10gbe", "wan", "home")]
    assert rates == sorted(rates, reverse=True)
    assert all(each.source and each.hop > 0 for each in networks.values())


def test_a_permute_sends_all_its_bytes_to_one_other_device():
    levels = network.by_name("10gbe", {"data": 8})
    crossed = network.join(levels, ("data",))
    rate, hop = crossed[0].bandwidth, network.HOP["10 GbE"]
    assert network.seconds(crossed, "collective-permute", 1e6) == pytest.approx(1e6 / rate + hop)
    # a ring of them moves what an all-gather moves
    ring = 7 * network.seconds(crossed, "collective-permute", 1e6 / 8)
    assert ring == pytest.approx(network.seconds(crossed, "all-gather", 1e6) + (7 - 3) * hop)
