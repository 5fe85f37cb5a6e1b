"""Cloud TPU VMs: create a resource, copy the code to all workers, start, follow, restart and stop the run."""

from __future__ import annotations

import dataclasses
import re
import shlex
import time
from pathlib import Path

from spmd.launch import base
from spmd.launch.base import Command, Job, check, check_plain
from spmd.launch.tpu_scripts import BEGIN, FINISH, FOLLOW, LOG, SETUP, STATUS, STOP

RUNTIMES = {  # prefix of the accelerator type -> image of its VMs
    "v2-": "tpu-ubuntu2204-base",
    "v3-": "tpu-ubuntu2204-base",
    "v4-": "tpu-ubuntu2204-base",
    "v5litepod-": "v2-alpha-tpuv5-lite",
    "v5p-": "v2-alpha-tpuv5",
    "v6e-": "v2-alpha-tpuv6e",
}
CODE = (
    "run.py",
    "spmd",
    "experiments",
    "requirements.txt",
    "requirements",
)  # nothing else is copied
GONE = {
    "SUSPENDED",
    "FAILED",
    "PREEMPTED",
    "TERMINATED",
}  # final states: the resource must be recreated
TRIES = 6  # attempts of ssh and scp: machines answer only some time after they are ACTIVE


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuVm(base.CloudOptions):
    """A TPU slice as a queued resource. Words after -- are passed to `queued-resources create`."""

    zone: str = ""
    """Zone, for example us-east5-a."""
    project: str = ""
    """Project; empty: that of gcloud's configuration."""
    accelerator: str = ""
    """Accelerator type, for example v5litepod-16, v5p-32 or v6e-64."""
    runtime: str = ""
    """Image of the VMs; empty: the usual one for the accelerator."""
    spot: bool = False
    """Spot capacity: cheaper, and may be preempted at any time."""
    restarts: int = 20
    """Largest number of restarts after a preemption, a crash or a lost worker."""
    poll: float = 30.0
    """Seconds between polls of the state of the resource."""
    delete: bool = False
    """With stop: delete the resource too. Otherwise it is kept, and costs."""

    def start(self, job: Job) -> int:
        """Follows the run until it ends; Ctrl-C only stops following."""
        base.at_least("--restarts", self.restarts, 0)
        check(not self.delete, "--delete belongs to: run.py launch tpu-vm stop")
        check(
            base.SCRIPT.is_file(),
            f"launch tpu-vm copies a checkout of the repository to the machines, and {base.ROOT} is none:"
            " clone it and type python run.py launch tpu-vm there",
        )
        check(self.poll >= 0, f"--poll {self.poll} must not be negative")
        base.check_bucket(job, "TPU VMs")
        vm = Machines(self, job)
        self.image()  # reports mistakes before the first request to the cloud
        if self.dry_run:
            return vm.show_start()
        try:
            return self._run(vm)
        except KeyboardInterrupt:
            _say(
                "no longer following. The run continues on the machines; end it with `stop`, and the cost"
                " of the resource with `stop --delete`"
            )
            return base.INTERRUPTED

    def image(self) -> str:
        """The image of the VMs of the accelerator."""
        check(
            bool(self.accelerator),
            "launch tpu-vm needs --accelerator, for example --accelerator v5litepod-16",
        )
        images = [
            image for prefix, image in RUNTIMES.items() if self.accelerator.startswith(prefix)
        ]
        check(
            bool(self.runtime or images),
            f"--accelerator {self.accelerator}: known are {', '.join(f'{p}N' for p in RUNTIMES)}; for"
            " another type give the image of its VMs with --runtime",
        )
        check_plain("--accelerator", self.accelerator)
        return check_plain("--runtime", self.runtime or images[0])

    def _run(self, vm: Machines) -> int:
        code = base.LOST
        for start in range(self.restarts + 1):
            if not self._acquire(vm):
                return 1
            if "running" in vm.status():
                _say("the run is running already; following it")
            elif not self._deploy(vm):
                return 1
            code = self._watch(vm)
            if code < 0:  # stopped by `stop`
                return base.SAVED
            if not base.starts_again(code) or start == self.restarts:
                break
            _say(f"exit code {code}; start {start + 2} of at most {self.restarts + 1}")
        _say(f"ended with exit code {code}. The resource is kept, and costs, until `stop --delete`")
        return code

    def _acquire(self, vm: Machines) -> bool:
        """Creates or reuses the resource and waits until it is ACTIVE; False if the request failed."""
        last_state, created = None, False
        while (state := vm.state(patient=last_state is not None)) != "ACTIVE":
            if state != last_state:
                _say(f"{vm.name} is {state or 'not created yet'}")
            if state in GONE and created:
                _say(f"the request failed; see: {vm.describe.shell()}")
                return False
            if state in GONE:  # the machines and their disks are gone; only the record is left
                vm.delete.run()
            elif not state and not created:
                created = vm.create.run() == 0
                if not created:
                    return False
            else:
                time.sleep(self.poll)
            last_state = state
        _say(f"{vm.name} is ACTIVE")
        return True

    def _deploy(self, vm: Machines) -> bool:
        """Copies, installs and starts on all workers. Returns True also if the machines disappear meanwhile,
        which _watch notices.
        """
        vm.archive.parent.mkdir(parents=True, exist_ok=True)
        if vm.pack.run():
            return False
        for command in (vm.copy, vm.setup, vm.begin):
            tries = TRIES
            while command.run():
                tries -= 1
                if vm.state(patient=True) in GONE:
                    return True
                if not tries:
                    _say(f"gave up on: {command.shell()}")
                    return False
                time.sleep(self.poll)
        return True

    def _watch(self, vm: Machines) -> int:
        """Follows the log until the run ends; returns its exit code, 75 if the machines are gone, -1 if
        stopped.
        """
        lines = "+1"
        while True:
            vm.follow(lines).run()
            first = vm.status(worker="0")
            if first and first != ["running"]:
                break
            state = vm.state(patient=True)
            if state in ("", "DELETING"):  # by a user: a preempted resource is SUSPENDED
                _say(f"{vm.name} was deleted; it is not created again")
                return -1
            if state not in ("ACTIVE", UNKNOWN):
                _say(f"the machines are gone: {vm.name} is {state}")
                return base.LOST
            lines = "20"  # the connection broke: repeat some lines and continue
            time.sleep(self.poll)
        statuses = vm.status(finish=True) or first
        if "stopped" in statuses:
            return -1
        codes = [int(status) for status in statuses if status != "running"]
        final = [code for code in codes if code and not base.starts_again(code)]
        return (final or [code for code in codes if code] or [0])[0]

    def stop(self, job: Job) -> int:
        """Makes the run on all workers save and stop; keeps the resource unless --delete is given."""
        vm = Machines(self, job)
        commands = [vm.stop, *([vm.delete] if self.delete else [])]
        if self.dry_run:
            return base.show(*commands)
        codes = [command.run() for command in commands]
        if not self.delete:
            _say(f"{vm.name} is kept, and costs, until `stop --delete`")
        return codes[-1]

    def logs(self, job: Job) -> int:
        """Prints the output of worker 0."""
        vm = Machines(self, job)
        command = vm.follow("+1") if self.follow else vm.log
        return base.show(command) if self.dry_run else command.run()


UNKNOWN = "UNKNOWN"


class Machines:
    """The gcloud commands of a job, and the states that they report."""

    def __init__(self, options: TpuVm, job: Job):
        self.name = job.name
        check(bool(options.zone), "launch tpu-vm needs --zone, for example --zone us-east5-a")
        self._location = ["--zone", check_plain("--zone", options.zone)]
        if options.project:
            self._location += ["--project", check_plain("--project", options.project)]
        self._options, self._job = options, job
        self.archive = job.dir / f"{self.name}.tar.gz"
        self.delete = self._queued("delete", self.name, "--force", "--quiet")
        self.describe = self._queued("describe", self.name)
        pattern = f"name~(^|/){self.name}$"  # an empty answer, unlike an error, means that it does not exist
        self._state = self._queued("list", f"--filter={pattern}", "--format=value(state.state)")
        self._node = self._vm("describe", self.name, "--format=value(state)")
        self.setup, self.log = self.ssh(SETUP), self.ssh(LOG, worker="0")
        self.stop = self.ssh(STOP)
        self.copy = self._vm(
            "scp", str(self.archive), f"{self.name}:{self.archive.name}", "--worker=all", "--quiet"
        )

    def _gcloud(self, *words: str) -> Command:
        return Command(("gcloud", "compute", "tpus", *words, *self._location))

    def _queued(self, *words: str) -> Command:
        return self._gcloud("queued-resources", *words)

    def _vm(self, *words: str) -> Command:
        return self._gcloud("tpu-vm", *words)

    def ssh(self, script: str, worker: str = "all", **values: str) -> Command:
        """The command that runs a script on a worker, or on all."""
        command = script.format(name=self.name, **values)
        return self._vm("ssh", self.name, f"--worker={worker}", "--quiet", f"--command={command}")

    @property
    def create(self) -> Command:
        """The command that requests the resource."""
        options = self._options
        return self._queued(
            *("create", self.name, "--node-id", self.name),
            *("--accelerator-type", options.accelerator, "--runtime-version", options.image()),
            *(["--spot"] if options.spot else []),
            *self._job.extra,
        )

    @property
    def pack(self) -> Command:
        """The command that packs the code; an experiment file from elsewhere is added at the top level."""
        experiment = Path(self._job.experiment)
        outside = ["-C", str(experiment.parent.absolute()), experiment.name] if self._file() else []
        tar = ("tar", "-czf", str(self.archive), "--exclude=__pycache__", "-C", str(base.ROOT))
        return Command((*tar, *CODE, *outside))

    @property
    def begin(self) -> Command:
        """The command that starts the run on all workers."""
        return self.ssh(
            BEGIN,
            token=base.token(),
            command=shlex.join(["run.py", *self._job.words(self._file())]),
        )

    def _file(self) -> str:
        """File name of the experiment on the workers; empty for a name of experiments/."""
        experiment = self._job.experiment
        return Path(experiment).name if experiment.endswith(".py") else ""

    def follow(self, lines: str) -> Command:
        """The command that follows the log of worker 0 until the run ends."""
        return self.ssh(FOLLOW, worker="0", lines=lines)

    def state(self, *, patient: bool = False) -> str:
        """State of the resource, or of its node if that is gone; "" if there is no resource.

        patient: return UNKNOWN for an error of gcloud, which may be a network outage, instead of raising
        ValueError.
        """
        code, state = self._state.read()
        check(
            patient or code == 0,
            f"gcloud failed with exit code {code} (its message is above): {self._state.shell()}",
        )
        if code:
            return UNKNOWN
        if state == "ACTIVE":
            node = self._node.read()[1]
            return node if node in GONE else state
        return state

    def status(self, *, worker: str = "all", finish: bool = False) -> list[str]:
        """State of the run on each worker that answers: running, stopped or its exit code."""
        script = FINISH + STATUS if finish else STATUS
        _, printed = self.ssh(script, worker=worker).read()
        return re.findall(r"spmd-status=(\w+)", printed)

    def show_start(self) -> int:
        """Prints the commands of a start without failures, in order."""
        return base.show(
            "# The state: an empty line means create it; then wait for ACTIVE.",
            self._state,
            self.create,
            self._node,
            "# Is the run running already?",
            self.ssh(STATUS),
            "# Copy the code, install, start on all workers.",
            Command(("mkdir", "-p", str(self.archive.parent))),
            self.pack,
            self.copy,
            self.setup,
            self.begin,
            "# Follow the log of worker 0; then the exit codes.",
            self.follow("+1"),
            self.ssh(STATUS, worker="0"),
            self.ssh(FINISH + STATUS),
            "# When the state is one of " + ", ".join(sorted(GONE)) + ": from the top, after",
            self.delete,
        )


def _say(text: str) -> None:
    print(f"launch: {text}", flush=True)
