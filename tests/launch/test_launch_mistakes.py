"""A mistake is told before anything is submitted: one message, exit code 2, nothing written or run."""

from __future__ import annotations

import os

import pytest

from spmd.cli import main

D = "--experiment digits "
BUCKET = D + "--run.dir gs://bucket/digits "
GKE = f"gke {BUCKET}--image a/b:1 --accelerator "
VM = f"tpu-vm {BUCKET}--zone us-east5-a "

TABLE = {
    "place": (f"lokal {D}", "Did you mean 'local'"),
    "no_place": (D, "unknown place"),
    "action": (f"local stopp {D}", "Did you mean 'stop'"),
    "experiment": ("slurm --experiment digitz", "Did you mean 'digits'"),
    "no_experiment": ("slurm --nodes 2", "no experiment given"),
    "option": (f"slurm {D}--nodess 2", "--nodes"),
    "field": (f"slurm {D}--train.stepz 5", "--train.steps"),
    "value": (f"slurm {D}--train.steps 0", "train.steps=0 must be at least 1"),
    "name": (f"local {D}--name ../evil", "--name '../evil'"),
    "name_empty_dot": (f"slurm {D}--name .hidden", "the first a letter or digit"),
    "name_cloud": (f"gke {BUCKET}--name Big_Run", "small letters"),
    "processes": (f"local {D}--processes 0", "--processes 0 must be at least 1"),
    "restarts": (f"local {D}--restarts -1", "--restarts -1 must be at least 0"),
    "simulate": (f"local {D}--simulate 2 --devices-per-process 2", "give one of them"),
    "local_extra": (f"local {D}-- --qos=high", "takes nothing after --"),
    "local_logs": (f"local logs {D}", "no job 'digits' was launched here"),
    "local_stop": (f"local stop {D}", "no job 'digits' is running here"),
    "late_dry_run": (f"slurm {D}-- --dry-run", "put it before"),
    "nodes": (f"slurm {D}--nodes 0", "--nodes 0 must be at least 1"),
    "time": (f"slurm {D}--time tomorrow", "--time 'tomorrow'"),
    "partition": (f"slurm {D}--partition a;b", "--partition 'a;b'"),
    "gpus": (f"slurm {D}--gpus-per-node 8 --processes-per-node 3", "does not divide"),
    "slurm_stop": (f"slurm stop {D}", "no job 'digits' was submitted from here"),
    "sbatch": (f"slurm {D}", "there is no sbatch on PATH"),
    "zone": (f"tpu-vm {BUCKET}--accelerator v6e-8", "needs --zone"),
    "accelerator": (VM, "needs --accelerator"),
    "runtime": (f"{VM}--accelerator v9-8 --dry-run", "--runtime"),
    "vm_bucket": (f"tpu-vm {D}--zone z --accelerator v6e-8", "gs://BUCKET/runs/digits"),
    "vm_delete": (f"{VM}--accelerator v6e-8 --delete", "launch tpu-vm stop"),
    "gcloud": (f"{VM}--accelerator v6e-8", "there is no gcloud on PATH"),
    "image": (f"gke {BUCKET}--accelerator nvidia-l4", "needs --image"),
    "gke_accelerator": (f"gke {BUCKET}--image a/b:1", "needs --accelerator"),
    "topology": (f"{GKE}tpu-v6e-slice", "needs --topology"),
    "topology_gpu": (f"{GKE}nvidia-l4 --topology 4x4", "belongs to TPUs"),
    "topology_form": (f"{GKE}tpu-v6e-slice --topology 4by4", "write it as 4x4"),
    "chips": (f"{GKE}tpu-v6e-slice --topology 2x3", "not a multiple of --chips-per-node 4"),
    "gke_bucket": (f"gke {D}--image a/b:1 --accelerator nvidia-l4", "gs://BUCKET"),
    "gke_file": (
        "gke --experiment mine.py --run.dir gs://b/x --image a/b:1 --accelerator nvidia-l4",
        "the image contains experiments/",
    ),
    "kubectl": (f"{GKE}nvidia-l4", "there is no kubectl on PATH"),
}


@pytest.mark.parametrize("case", TABLE)
def test_one_clear_message(case, tmp_path, monkeypatch, capsys):
    line, message = TABLE[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # neither sbatch nor gcloud nor kubectl
    (tmp_path / "mine.py").write_text("from experiments.digits import config as config\n")
    code = main(["launch", *line.split()])
    shown = capsys.readouterr()
    text = " ".join((shown.err + shown.out).split())
    assert code == 2, text
    assert message in text and "Traceback" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"], "nothing is written"


def test_help(run_main):
    """The help needs no experiment; that of a place lists its options."""
    for words in (("launch",), ("launch", "--help")):
        shown = run_main(*words)
        assert shown.returncode == 0 and "tpu-vm" in shown.stdout
    shown = run_main("launch", "slurm", "--help")
    assert shown.returncode == 0 and "--gpus-per-node" in shown.stdout


@pytest.mark.gate
def test_no_environment_variable_is_printed(run_cli):
    """Tokens travel in the environment, so that is never shown."""
    token = {"WANDB_API_KEY": "do-not-print", "HF_TOKEN": "do-not-print"}
    for line in (
        f"local {D}--processes 2",
        f"slurm {D}",
        f"{VM}--accelerator v6e-8",
        f"{GKE}nvidia-l4",
    ):
        done = run_cli("launch", *line.split(), "--dry-run", env=token)
        assert done.returncode == 0 and "do-not-print" not in done.stdout + done.stderr
    assert os.environ.get("WANDB_API_KEY") != "do-not-print"
