"""What would run: dry runs read by bash, shellcheck and a YAML parser; the JobSet field by field."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from spmd.launch.base import Command, Job
from spmd.launch.gke import Gke, to_yaml
from spmd.launch.slurm import Slurm, directive_path

REPOSITORY = Path(__file__).resolve().parents[2]
D = "--experiment digits "
BUCKET = D + "--run.dir gs://bucket/digits "
TPU = "--image eu.pkg.dev/p/r/spmd:1 --accelerator tpu-v5-lite-podslice --topology 4x8 "
GPU = "--image eu.pkg.dev/p/r/spmd:1 --accelerator nvidia-h100-80gb "
VM = "--zone us-east5-a --accelerator v5p-32 "

DRY = {  # command line -> what its dry run must say
    "local": (f"local {D} --processes 4 --devices-per-process 2", "SPMD_NUM_PROCESSES=4"),
    "local, quoted": (f"local {D} --train.steps 5 --log.every 7", "--log.every 7"),
    "slurm": (f"slurm {D} --nodes 4 --gpus-per-node 8 --time 4:00:00", "#SBATCH --nodes=4"),
    "slurm, more": (
        f"slurm {D} -- --qos=high --nice",
        "sbatch --parsable --qos=high --nice <<'END'",
    ),
    "tpu-vm": (f"tpu-vm {BUCKET}{VM} --spot", "--runtime-version v2-alpha-tpuv5 --spot"),
    "tpu-vm, more": (f"tpu-vm {BUCKET}{VM} -- --network=mine", "--network=mine --zone"),
    "tpu-vm stop": (f"tpu-vm stop {BUCKET}{VM} --delete", "delete digits --force --quiet"),
    "tpu-vm logs": (f"tpu-vm logs {BUCKET}{VM}", "ssh digits --worker=0"),
    "gke": (f"gke {BUCKET}{TPU} --queue team", "kueue.x-k8s.io/queue-name: team"),
    "gke, GPUs": (f"gke {BUCKET}{GPU} --nodes 2", 'value: "digits-workers-0-0.digits:8476"'),
    "gke stop": (f"gke stop {BUCKET}", "kubectl delete jobset digits --namespace=default"),
    "gke logs": (f"gke logs {BUCKET} --follow", "--tail=-1 --follow --namespace=default"),
}


@pytest.mark.parametrize("case", DRY)
def test_a_dry_run_is_a_script(case, run_main, bash_reads, tmp_path):
    line, expected = DRY[case]
    options, dashes, extra = line.partition("-- ") if " -- " in line else (line, "", "")
    done = run_main("launch", *options.split(), "--dry-run", *dashes.split(), *extra.split())
    assert (done.returncode, done.stderr) == (0, "")
    assert expected in done.stdout
    bash_reads(done.stdout)
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


HOSTILE = ("--data.dir", "a b; touch pwned $(touch pwned) `touch pwned` 'x\" \\ \nEND\n#")


def test_words_stay_words(tmp_path, monkeypatch, shellcheck):
    """Whatever stands in a field reaches run.py as one argument."""
    import subprocess

    monkeypatch.chdir(tmp_path)
    job = Job(name="digits", experiment="digits", fields=HOSTILE)
    script = Slurm(python="python3", nodes=2).script(job)
    shellcheck(script)
    shown = tmp_path / "srun"  # in place of Slurm's: runs the task once
    shown.write_text('#!/bin/bash\nexec "${@:2}"\n')
    python = tmp_path / "python3"
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > words\n')
    for file in (shown, python):
        file.chmod(0o755)
    job.dir.mkdir(parents=True)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "1"}
    done = subprocess.run(["bash"], input=script, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "words").read_text().split("\0")[:-1]
    assert words == [str(REPOSITORY / "run.py"), "train", "--experiment", "digits", *HOSTILE]
    assert not (tmp_path / "pwned").exists()
    assert shlex.split(Command(("x", *HOSTILE)).shell())[1:] == list(HOSTILE)
    manifest = yaml.safe_load(to_yaml(gke("tpu", *HOSTILE)))
    assert container(manifest)["args"][3:] == list(HOSTILE)


@pytest.mark.parametrize("nodes, gpus", [(1, 0), (2, 8)])
def test_the_slurm_script(nodes, gpus, shellcheck):
    options = Slurm(nodes=nodes, gpus_per_node=gpus, time="1-12", restarts=3, python="python")
    script = options.script(Job(name="digits", experiment="digits"))
    shellcheck(script)
    directives = re.findall(r"^#SBATCH (.*)$", script, re.M)
    assert directives[0] == "--requeue"
    assert f"--nodes={nodes}" in directives and "--signal=TERM@120" in directives
    assert (f"--gpus-per-node={gpus}" in directives) == bool(gpus)
    assert "--open-mode=append" in directives and "--time=1-12" in directives
    assert "count < 3" in script


def test_directories_in_directives():
    assert directive_path(Path("/a/b-1.x")) == "/a/b-1.x"
    assert directive_path(Path("/a b/slurm-%j.log")) == '"/a b/slurm-%j.log"'
    for bad in ("/a%j/b", '/a"b', "/a\nb", "/a\\b"):
        with pytest.raises(ValueError, match="which sbatch misreads"):
            directive_path(Path(bad))


# ---- the JobSet, against the fields of its API (jobset.x-k8s.io/v1alpha2, batch/v1, core/v1)

IMAGE = "eu.pkg.dev/p/r/spmd:1"
PLACES = {
    "tpu": Gke(
        image=IMAGE, accelerator="tpu-v5-lite-podslice", topology="4x8", slices=2, queue="q"
    ),
    "gpu": Gke(image=IMAGE, accelerator="nvidia-h100-80gb", nodes=4, service_account="trainer"),
    "one": Gke(image=IMAGE, accelerator="nvidia-l4", gpus_per_node=1, secret="wandb"),
}
TEXT = {str: str}
FIELD_REF = {"fieldRef": {"fieldPath": str}}
SCHEMA = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str, "labels": TEXT, "annotations": TEXT},
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name": str, "action": "FailJobSet", "onJobFailureReasons": [str]}],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "completionMode": "Indexed",
                        "backoffLimit": int,
                        "podFailurePolicy": {
                            "rules": [
                                {
                                    "action": "FailJob",
                                    "onExitCodes": {
                                        "containerName": str,
                                        "operator": "In",
                                        "values": [int],
                                    },
                                }
                            ]
                        },
                        "template": {
                            "spec": {
                                "restartPolicy": "Never",  # podFailurePolicy asks for it
                                "terminationGracePeriodSeconds": int,
                                "serviceAccountName": str,
                                "nodeSelector": TEXT,
                                "volumes": [{"name": str, "emptyDir": {"medium": "Memory"}}],
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "args": [str],
                                        "ports": [{"containerPort": int}],
                                        "env": [
                                            {"name": str, "value": str, "valueFrom": FIELD_REF}
                                        ],
                                        "envFrom": [{"secretRef": {"name": str}}],
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                        "resources": {"requests": {str: int}, "limits": {str: int}},
                                    }
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def conforms(value, schema, where="") -> None:
    if isinstance(schema, type):
        assert type(value) is schema, where
    elif isinstance(schema, str):
        assert value == schema, where
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, where
        for i, item in enumerate(value):
            conforms(item, schema[0], f"{where}[{i}]")
    elif str in schema:
        for key, item in value.items():
            conforms(item, schema[str], f"{where}.{key}")
    else:
        assert isinstance(value, dict) and value.keys() <= schema.keys(), f"{where}: {value}"
        for key, item in value.items():
            conforms(item, schema[key], f"{where}.{key}")


def gke(place: str, *fields: str) -> dict:
    return PLACES[place].manifest(Job(name="digits", experiment="digits", fields=fields))


def container(manifest: dict) -> dict:
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("place", PLACES)
def test_the_jobset_has_the_fields_of_its_api(place):
    manifest = gke(place)
    text = to_yaml(manifest)
    assert yaml.safe_load(text) == json.loads(json.dumps(manifest)), text
    conforms(yaml.safe_load(text), SCHEMA)


def test_a_pod_for_each_node_of_each_slice():
    jobs = gke("tpu")["spec"]["replicatedJobs"][0]
    work = jobs["template"]["spec"]
    assert (jobs["replicas"], work["parallelism"], work["completions"]) == (2, 8, 8)
    assert work["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert container(gke("tpu"))["resources"]["limits"] == {"google.com/tpu": 4}
    assert gke("tpu")["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}
    (start,) = container(gke("tpu"))["env"]  # JAX finds TPUs by itself
    assert start["name"] == "SPMD_RUN_TOKEN" and start["value"]


def test_gpu_pods_find_each_other_by_the_name_of_the_first():
    manifest = gke("gpu")
    env = {e["name"]: e.get("value") for e in container(manifest)["env"]}
    subdomain = manifest["spec"]["network"]["subdomain"]
    jobs = manifest["spec"]["replicatedJobs"][0]["name"]
    assert env["SPMD_COORDINATOR"] == f"digits-{jobs}-0-0.{subdomain}:8476"
    assert env["SPMD_NUM_PROCESSES"] == "4"
    assert list(env).index("POD_IP") < list(env).index("SPMD_COORDINATOR_BIND")  # it refers to it
    assert [e["name"] for e in container(gke("one"))["env"]] == ["SPMD_RUN_TOKEN"]
    assert container(gke("one"))["envFrom"] == [{"secretRef": {"name": "wandb"}}]


def test_only_final_exit_codes_end_a_jobset():
    spec = gke("tpu")["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1, 2, 130]
    assert rule["onExitCodes"]["containerName"] == container(gke("tpu"))["name"]
    assert spec["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert job["backoffLimit"] == 0


@pytest.mark.parametrize(
    "value",
    [
        "yes",
        "No",
        "null",
        "1",
        "1e3",
        "0x1f",
        "a: b",
        "- a",
        "#",
        "",
        " a",
        "a\nb",
        "é",
        "'",
        "~",
        "=",
        "y",
    ],
)
def test_yaml_strings_stay_strings(value):
    tree = {"a": value, "list": [value, {"b": [value], value: 1}, [], {}], "empty": {}, "n": None}
    assert yaml.safe_load(to_yaml(tree)) == tree


# ---- the image


def test_the_dockerfile_copies_what_exists():
    text = (REPOSITORY / "Dockerfile").read_text()
    steps = [line.split(None, 1) for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    copied = [source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]]
    assert {"run.py", "spmd/", "experiments/", "requirements.txt", "requirements/"} == set(copied)
    ignore = (REPOSITORY / ".dockerignore").read_text().splitlines()
    for source in copied:
        assert (REPOSITORY / source).exists()
        assert f"!{source.rstrip('/')}" in ignore, f"{source} is not sent to the builder"
    assert next(word for word, _ in steps) == "FROM" and ["USER", "1000"] in steps
    (entry,) = [json.loads(rest) for word, rest in steps if word == "ENTRYPOINT"]
    assert entry == ["python", "run.py"]
    arguments = re.findall(r"--build-arg REQUIREMENTS=(\S+)", text)
    assert arguments and all((REPOSITORY / file).exists() for file in arguments)
