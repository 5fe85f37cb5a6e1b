"""Which platforms JAX is given, by what the machine has; and that no start prints what is not ours."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from spmd.runtime import platforms
from tests.command import REPOSITORY, ROOT

NVIDIA, GVNIC, NVME = ("0x10de", "0x2330"), ("0x1ae0", "0x0042"), ("0x1ae0", "0x001f")
V5E = ("0x1ae0", "0x0063")


def machine(root, files=(), pci=()):
    """A root directory with device files and PCI devices (vendor, device)."""
    for i, (vendor, device) in enumerate(pci):
        place = root / f"sys/bus/pci/devices/0000:00:{i:02}.0"
        place.mkdir(parents=True)
        (place / "vendor").write_text(f"{vendor}\n")
        (place / "device").write_text(f"{device}\n")
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


@pytest.mark.parametrize(
    "files, pci, env, tpu, gpu",
    [
        ((), (), {}, False, False),
        (("dev/accel0",), (), {}, True, False),
        (("dev/accel/accel0",), (), {}, False, False),  # Linux's accelerators: an NPU of a laptop
        (("dev/vfio/0",), (V5E,), {}, True, False),
        (("dev/vfio/0", "dev/vfio/vfio"), (GVNIC,), {}, False, False),  # anything passed to a VM
        ((), (GVNIC, NVME, NVIDIA), {}, False, False),  # a VM of Google's
        ((), (), {"TPU_WORKER_ID": "0"}, True, False),
        (
            (),
            (),
            {"TPU_SKIP_MDS_QUERY": "1"},
            False,
            False,
        ),  # JAX itself sets it where there is none
        (("dev/nvidia0",), (), {}, False, True),
        (("dev/nvidiactl",), (), {"CUDA_VISIBLE_DEVICES": "3"}, False, True),
        (("dev/nvidia0",), (), {"CUDA_VISIBLE_DEVICES": ""}, False, False),
        (("dev/nvidia0",), (), {"CUDA_VISIBLE_DEVICES": "-1"}, False, False),
    ],
)
def test_what_the_machine_has(files, pci, env, tpu, gpu, tmp_path):
    root = machine(tmp_path, files, pci)
    assert (platforms.has_tpu(env, root), platforms.has_gpu(env, root)) == (tpu, gpu)


@pytest.mark.parametrize(
    "installed, gpu, tpu, kept, note",
    [
        ({"tpu"}, False, False, "cpu", ""),
        (set(), False, False, "cpu", ""),
        ({"tpu"}, False, True, "", ""),  # JAX's own choice
        ({"cuda"}, True, False, "cuda,cpu", ""),
        ({"cuda", "tpu"}, True, False, "cuda,cpu", ""),
        ({"cuda"}, False, False, "cpu", ""),
        ({"metal"}, False, False, "", ""),
        (set(), True, False, "cpu", "an NVIDIA GPU, which JAX cannot use here: pip install -r"),
        ({"cuda"}, False, True, "cpu", "a TPU, which JAX cannot use here: pip install -r"),
    ],
)
def test_the_choice(installed, gpu, tpu, kept, note):
    found, said = platforms.default_platforms(installed, gpu=gpu, tpu=tpu)
    assert found == kept and note in said and bool(note) == bool(said)


HERE = {"installed": {"cuda", "tpu"}, "gpu": True, "tpu": True}


@pytest.mark.parametrize(
    "asked, here, kept, said",
    [
        ("cpu", {}, "cpu", ""),
        ("CPU", {}, "cpu", ""),
        ("cuda", {}, "cuda", ""),
        ("gpu,cpu", {}, "gpu,cpu", ""),
        ("tpu,cpu", {}, "tpu,cpu", ""),
        ("metal", {"installed": {"metal"}}, "metal", ""),
        ("cuda,cpu", {"gpu": False}, "cpu", ""),  # as in JAX
        ("cuda", {"gpu": False}, "", "JAX_PLATFORMS=cuda: there is no NVIDIA GPU here"),
        ("gpu", {"gpu": False}, "", "there is no NVIDIA GPU here"),
        ("cuda", {"installed": set()}, "", "JAX cannot use a GPU here: pip install -r"),
        ("tpu,cpu", {"tpu": False}, "", "this machine has no TPU"),
        ("tpu", {"installed": set()}, "", "JAX cannot use a TPU here: pip install -r"),
        ("cdua", {}, "", "unknown platform 'cdua'. Did you mean 'cuda'?"),
        ("rocm", {}, "", "no plugin rocm is installed"),
    ],
)
def test_a_platform_that_was_asked_for(asked, here, kept, said):
    if not said:
        assert platforms.check_requested(asked, **HERE | here) == kept
        return
    with pytest.raises(ValueError) as error:
        platforms.check_requested(asked, **HERE | here)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_device_that_does_not_start_is_one_line(monkeypatch):
    import jax

    def fails():
        raise RuntimeError(
            "Unable to initialize backend 'tpu': ABORTED: in use by pid 7\nmore\nlines"
        )

    monkeypatch.setattr(jax, "local_devices", fails)
    with pytest.raises(ValueError, match="in use by pid 7; is another process") as error:
        platforms.start()
    assert "\n" not in str(error.value)


# Runs a command and says whether libtpu was opened in its process.
WATCHED = """
import sys
from spmd.cli import main
code = main(sys.argv[1:])
assert "libtpu" not in open("/proc/self/maps").read(), "libtpu was opened"
sys.exit(code)
"""
FIRST = "--experiment digits --train.steps 5"
THEN = (
    "plan --experiment digits",
    "compare --experiment digits --strategies auto --train.steps 5 --run.dir runs/compare",
    "runs list",
    "--help",
)


@pytest.mark.gate
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(
    platforms.has_gpu() or platforms.has_tpu(), reason="about machines without an accelerator"
)
def test_no_start_prints_what_is_not_ours(tmp_path):
    """With whatever plugins are installed (libtpu, in the development environment), and nothing set."""
    ambient = ("JAX_", "XLA_", "TF_", "TPU_", "PYTHON", "PYTEST_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ambient)}
    environ |= {"PYTHONPATH": str(REPOSITORY)}
    environ["JAX_COMPILATION_CACHE_DIR"] = f"{os.environ[ROOT]}/compiled"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def begin(words, **more):
        command = [sys.executable, "-c", WATCHED, *words.split()]
        return subprocess.Popen(command, cwd=tmp_path, env=environ | more, **pipes)

    def check(words, process):
        out, err = process.communicate(timeout=300)
        said = "one device only: simulating 8\n" if "compare" in words else ""
        assert (process.returncode, err) == (0, said), f"{words}: {err}"
        assert "WARNING" not in out and "E0000" not in out

    check(FIRST, begin(FIRST))
    running = {words: begin(words) for words in THEN}
    for words, process in running.items():
        check(words, process)
    refused = begin(FIRST, JAX_PLATFORMS="cuda").communicate(timeout=60)
    assert refused == (
        "",
        "error: JAX_PLATFORMS=cuda: there is no NVIDIA GPU here; unset it to use what the machine has\n",
    )
