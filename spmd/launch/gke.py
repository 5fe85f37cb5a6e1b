"""Kubernetes on Google Cloud: a JobSet on a TPU or GPU node pool, optionally queued by Kueue."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any

from spmd.launch import base
from spmd.launch.base import Command, Job, check, check_plain

PORT = 8476  # the coordinator's
LABEL = "jobset.sigs.k8s.io"
FINAL_CODES = [1, 2, base.INTERRUPTED]  # exit codes of run.py after which a restart is useless


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gke(base.CloudOptions):
    """A JobSet. Words after -- are passed to kubectl, for example -- --context=NAME."""

    image: str = ""
    """Image built from the Dockerfile, for example us-docker.pkg.dev/PROJECT/REPOSITORY/spmd:1."""
    accelerator: str = ""
    """Node label: tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice, nvidia-h100-80gb, ..."""
    topology: str = ""
    """TPUs: topology of a slice, for example 4x4 or 4x4x4."""
    slices: int = 1
    """TPUs: number of slices; mesh.replica spans them."""
    chips_per_node: int = 4
    """TPUs: chips per node."""
    nodes: int = 1
    """GPUs: nodes, with a process on each."""
    gpus_per_node: int = 8
    """GPUs: GPUs per node."""
    queue: str = ""
    """Local queue of Kueue; empty: without Kueue."""
    namespace: str = "default"
    """Namespace."""
    service_account: str = ""
    """Kubernetes service account that may write to the bucket."""
    secret: str = ""
    """Kubernetes secret whose keys become environment variables; no token is written into the job."""
    restarts: int = 20
    """Largest number of restarts after a preemption, a crash or a lost node."""
    grace: int = 120
    """Seconds between SIGTERM and SIGKILL, to save in."""

    def start(self, job: Job) -> int:
        """Applies the JobSet."""
        base.check_bucket(job, "pods")
        apply = self._kubectl(job, "apply", "--filename=-", stdin=to_yaml(self.manifest(job)))
        return base.show(apply) if self.dry_run else apply.run()

    def stop(self, job: Job) -> int:
        """Deletes the JobSet; its pods get SIGTERM and `grace` seconds to save."""
        command = self._kubectl(job, "delete", "jobset", job.name)
        return base.show(command) if self.dry_run else command.run()

    def logs(self, job: Job) -> int:
        """The output of process 0."""
        chosen = {
            f"{LABEL}/jobset-name": job.name,
            f"{LABEL}/job-index": "0",
            "batch.kubernetes.io/job-completion-index": "0",
        }
        selector = "--selector=" + ",".join(f"{k}={v}" for k, v in chosen.items())
        command = self._kubectl(job, "logs", selector, "--tail=-1", *["--follow"] * self.follow)
        return base.show(command) if self.dry_run else command.run()

    def _kubectl(self, job: Job, *words: str, stdin: str = "") -> Command:
        namespace = check_plain("--namespace", self.namespace)
        return Command(("kubectl", *words, f"--namespace={namespace}", *job.extra), stdin)

    def manifest(self, job: Job) -> dict[str, Any]:
        """The JobSet (jobset.x-k8s.io/v1alpha2)."""
        check(
            not job.experiment.endswith(".py"),
            f"--experiment {job.experiment}: the image contains experiments/; put the file there, build"
            " the image again, and give its name",
        )
        base.at_least("--restarts", self.restarts, 0)
        base.at_least("--grace", self.grace, 0)
        tpu = self._is_tpu()
        pods = self._tpu_pods() if tpu else base.at_least("--nodes", self.nodes, 1)
        metadata: dict[str, Any] = {"name": job.name}
        if self.queue:
            metadata["labels"] = {"kueue.x-k8s.io/queue-name": check_plain("--queue", self.queue)}
        if tpu:  # a slice is a node pool that no other job may use
            metadata["annotations"] = {
                f"alpha.{LABEL}/exclusive-topology": "cloud.google.com/gke-nodepool"
            }
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": self._spec(job, pods, tpu),
        }

    def _spec(self, job: Job, pods: int, tpu: bool) -> dict[str, Any]:
        """The spec of the JobSet."""
        worker = {
            "parallelism": pods,
            "completions": pods,
            "completionMode": "Indexed",
            "backoffLimit": 0,  # a lost pod ends all of them; the JobSet restarts them together
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {
                            "containerName": "train",
                            "operator": "In",
                            "values": FINAL_CODES,
                        },
                    }
                ]
            },
            "template": {"spec": self._pod(job, pods, tpu)},
        }
        return {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            # Any other end of a pod (143: saved, 75: a peer was lost, killed, evicted) restarts all pods.
            "failurePolicy": {
                "maxRestarts": self.restarts,
                "rules": [
                    {
                        "name": "final",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": "workers",
                    "replicas": self.slices if tpu else 1,
                    "template": {"spec": worker},
                }
            ],
        }

    def _is_tpu(self) -> bool:
        check(
            bool(self.image),
            "launch gke needs --image, built from the Dockerfile and pushed to a registry",
        )
        check(
            bool(self.accelerator),
            "launch gke needs --accelerator, for example tpu-v5-lite-podslice or nvidia-h100-80gb",
        )
        check_plain("--image", self.image)
        tpu = check_plain("--accelerator", self.accelerator).startswith("tpu")
        check(
            tpu == bool(self.topology),
            f"--accelerator {self.accelerator} needs --topology, for example 4x4"
            if tpu
            else f"--topology belongs to TPUs, not to --accelerator {self.accelerator}",
        )
        return tpu

    def _tpu_pods(self) -> int:
        """Pods of a slice: a pod per node."""
        check(
            re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", self.topology) is not None,
            f"--topology {self.topology!r}: write it as 4x4 or 4x4x4",
        )
        base.at_least("--slices", self.slices, 1)
        per_node = base.at_least("--chips-per-node", self.chips_per_node, 1)
        chips = math.prod(map(int, self.topology.split("x")))
        check(
            chips % per_node == 0,
            f"--topology {self.topology} has {chips} chips, not a multiple of --chips-per-node {per_node}",
        )
        return chips // per_node

    def _pod(self, job: Job, pods: int, tpu: bool) -> dict[str, Any]:
        selector = {"cloud.google.com/gke-accelerator": self.accelerator}
        devices = {"nvidia.com/gpu": base.at_least("--gpus-per-node", self.gpus_per_node, 1)}
        if tpu:
            selector = {
                "cloud.google.com/gke-tpu-accelerator": self.accelerator,
                "cloud.google.com/gke-tpu-topology": self.topology,
            }
            devices = {"google.com/tpu": self.chips_per_node}
        container: dict[str, Any] = {
            "name": "train",
            "image": self.image,
            "args": job.words(),  # the image's entry point is python run.py
            "resources": {"requests": devices, "limits": devices},
        }
        container["env"] = _start()
        if self.secret:
            container["envFrom"] = [{"secretRef": {"name": check_plain("--secret", self.secret)}}]
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": self.grace,
            "nodeSelector": selector,
            "containers": [container],
        }
        if self.service_account:
            pod["serviceAccountName"] = check_plain("--service-account", self.service_account)
        if tpu:  # GKE gives TPU pods the addresses of their peers
            container["ports"] = [{"containerPort": 8471}, {"containerPort": 8080}]
            return pod
        container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]  # for NCCL
        pod["volumes"] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
        if pods > 1:
            container["ports"] = [{"containerPort": PORT}]
            container["env"] += _rendezvous(job.name, pods)
        return pod


def _field(path: str) -> dict[str, Any]:
    return {"fieldRef": {"fieldPath": path}}


def _start() -> list[dict[str, Any]]:
    """Names the launch: a start waits while pods of the one before are still saving."""
    return [{"name": "SPMD_RUN_TOKEN", "value": base.token()}]


def _rendezvous(name: str, pods: int) -> list[dict[str, Any]]:
    """How GPU processes find each other: pod 0 by the DNS name that the JobSet's service gives it."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "POD_IP", "valueFrom": _field("status.podIP")},
        {"name": "SPMD_COORDINATOR", "value": f"{name}-workers-0-0.{name}:{PORT}"},
        {"name": "SPMD_COORDINATOR_BIND", "value": f"$(POD_IP):{PORT}"},
        {"name": "SPMD_NUM_PROCESSES", "value": str(pods)},
        {"name": "SPMD_PROCESS_ID", "valueFrom": _field(index)},
    ]


# ---- YAML, without a library: block style; a string is a JSON string, unless it is a plain word


def to_yaml(value: dict[str, Any]) -> str:
    """A nested dict of JSON types as YAML, keys in their order."""
    return "\n".join(_block(value)) + "\n"


def _block(value: Any) -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else ((None, v) for v in value)
    for key, item in items:
        head = "-" if key is None else f"{_scalar(key)}:"
        if not (isinstance(item, dict | list) and item):
            yield f"{head} {_scalar(item)}"
        elif key is None:  # the first line of an item follows its dash
            first, *rest = _block(item)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)
        else:
            yield head
            yield from (f"  {line}" for line in _block(item))


def _scalar(value: Any) -> str:
    word = isinstance(value, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9./-]*", value)
    reserved = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
    return value if word and value.lower() not in reserved else json.dumps(value)
