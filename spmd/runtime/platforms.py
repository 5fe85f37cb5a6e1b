"""The JAX platforms of a run, chosen before the backend starts from the devices of the machine.

JAX tries every installed plugin: on a machine without a TPU it opens libtpu, which prints errors, and
`JAX_PLATFORMS=cuda` without a GPU ends in a failed assertion.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.metadata
import importlib.util
import os
import pkgutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spmd.core.fields import check, closest

# Set on the machines of a TPU pod, in GKE, or by hand where the devices cannot be seen.
TPU_VARIABLES = (
    "CLOUD_TPU_TASK_ID",
    "JAX_FORCE_TPU_INIT",
    "TPU_ACCELERATOR_TYPE",
    "TPU_NAME",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_HOSTNAMES",
    "TPU_WORKER_ID",
)
GOOGLE = "0x1ae0"  # PCI vendor
GOOGLE_BUT_NO_TPU = {
    "0x001f",
    "0x0042",
}  # persistent disk (NVMe) and network card (gVNIC) of Google's VMs
KNOWN = ("cpu", "cuda", "gpu", "rocm", "tpu")
INSTALL = {
    "cuda": "pip install -r requirements/cuda12.txt, or cuda13.txt",
    "tpu": "pip install -r requirements/tpu.txt",
}


def has_tpu(env: Mapping[str, str] | None = None, root: str | Path = "/") -> bool:
    """Whether this machine may have a TPU: a device file, a PCI device, or a variable of a TPU pod."""
    env = os.environ if env is None else env
    if any(env.get(name) for name in TPU_VARIABLES):
        return True
    root = str(root)
    if glob.glob(
        os.path.join(root, "dev/accel[0-9]*")
    ):  # v2 to v4; newer ones are below /dev/vfio, by PCI
        return True
    for vendor in Path(root).glob("sys/bus/pci/devices/*/vendor"):
        try:
            if vendor.read_text().strip() != GOOGLE:
                continue
            if (vendor.parent / "device").read_text().strip() not in GOOGLE_BUT_NO_TPU:
                return True
        except OSError:  # a device that disappears, or may not be read
            continue
    return False


def has_gpu(env: Mapping[str, str] | None = None, root: str | Path = "/") -> bool:
    """Whether this process may use an NVIDIA GPU: a device file, not hidden by CUDA_VISIBLE_DEVICES."""
    env = os.environ if env is None else env
    if env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    files = ("dev/nvidia[0-9]*", "dev/nvidiactl", "dev/dxg")
    return any(glob.glob(os.path.join(str(root), file)) for file in files)


def installed_plugins() -> set[str]:
    """The names of the installed plugins of JAX (`cuda`, `rocm`, ...); libtpu is `tpu`."""
    names = {"tpu"} if importlib.util.find_spec("libtpu") else set()
    package = importlib.util.find_spec("jax_plugins")
    modules = (
        [m.name for m in pkgutil.iter_modules(package.submodule_search_locations or [])]
        if package
        else []
    )
    modules += [e.value for e in importlib.metadata.entry_points(group="jax_plugins")]
    for module in modules:
        name = module.rpartition(".")[2]
        names.add(next((plugin for plugin in ("cuda", "rocm") if plugin in name), name))
    variable = os.environ.get("PJRT_NAMES_AND_LIBRARY_PATHS", "")
    return names | {entry.partition(os.pathsep)[0] for entry in variable.split(",") if entry}


def choose() -> None:
    """Set JAX's platforms before its backend starts; does nothing once it has started.

    JAX_PLATFORMS is only checked: ValueError when it names a platform that this machine does not have.
    """
    import jax
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        return
    config: Any = jax.config
    requested = os.environ.get("JAX_PLATFORMS") or config.jax_platforms
    installed, gpu, tpu = installed_plugins(), has_gpu(), has_tpu()
    if requested:
        allowed = check_requested(requested, installed, gpu=gpu, tpu=tpu)
        if allowed != config.jax_platforms:
            config.update("jax_platforms", allowed)
        return
    allowed, note = default_platforms(installed, gpu=gpu, tpu=tpu)
    if note:
        print(f"note: {note}", file=sys.stderr)
    if allowed:
        config.update("jax_platforms", allowed)


def use_cpu() -> None:
    """Restrict JAX to the CPU: planning needs no accelerator, which another process may be using."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def default_platforms(installed: set[str], *, gpu: bool, tpu: bool) -> tuple[str, str]:
    """(platforms where the user named none, or "" to leave the choice to JAX; a note for the user, or "")."""
    note = ""
    for name, present in (("cuda", gpu), ("tpu", tpu)):
        if present and name not in installed:
            note = (
                f"this machine has {'a TPU' if name == 'tpu' else 'an NVIDIA GPU'}, which JAX cannot use"
                f" here: {INSTALL[name]}; JAX_PLATFORMS=cpu leaves this line out"
            )
    if (tpu and "tpu" in installed) or installed - {"cuda", "tpu"}:
        return "", note  # JAX knows which to prefer
    return ("cuda,cpu" if gpu and "cuda" in installed else "cpu"), note


def check_requested(requested: str, installed: set[str], *, gpu: bool, tpu: bool) -> str:
    """The available platforms of JAX_PLATFORMS; ValueError, one line, when one of them cannot be used.

    A missing GPU is no error while another platform is named beside it, as in JAX.
    """
    names = [name.strip().lower() for name in requested.split(",") if name.strip()]
    choices = {*KNOWN, *installed}
    for name in names:
        check(
            name in choices,
            f"JAX_PLATFORMS={requested}: unknown platform {name!r}.{closest(name, choices)} Known here:"
            f" {', '.join(sorted(choices))}; unset it to use what the machine has",
        )
    missing = {
        name: reason
        for name in names
        if (reason := _missing_reason(name, installed, gpu=gpu, tpu=tpu))
    }
    usable = [name for name in names if name not in missing]
    fatal = [name for name in missing if name not in ("cuda", "gpu") or not usable]
    check(
        not fatal,
        f"JAX_PLATFORMS={requested}: {missing[fatal[0]] if fatal else ''}; unset it to use what the machine"
        " has",
    )
    return ",".join(usable)


def _missing_reason(name: str, installed: set[str], *, gpu: bool, tpu: bool) -> str:
    """Why a known platform cannot be used; "" when it can, as far as can be seen."""
    if name == "tpu":
        if not tpu:
            return "this machine has no TPU"
        return "" if "tpu" in installed else f"JAX cannot use a TPU here: {INSTALL['tpu']}"
    if name == "cuda" or (name == "gpu" and "rocm" not in installed):
        if not gpu:
            is_set = "CUDA_VISIBLE_DEVICES" in os.environ
            setting = (
                f" (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']})" if is_set else ""
            )
            return f"there is no NVIDIA GPU here{setting}"
        return "" if "cuda" in installed else f"JAX cannot use a GPU here: {INSTALL['cuda']}"
    return (
        ""
        if name == "cpu" or name in installed or name == "gpu"
        else f"no plugin {name} is installed"
    )


def start() -> None:
    """Start the backend; ValueError of one line, instead of JAX's long RuntimeError, when it fails."""
    import jax

    try:
        jax.local_devices()
    except RuntimeError as error:
        text = str(error).strip().splitlines()[0]
        raise ValueError(
            f"JAX's devices do not start: {text[:500]}; is another process using them?"
            " JAX_PLATFORMS=cpu runs without them"
        ) from error


def mute_gloo() -> None:
    """Keep Gloo, with which processes on CPUs exchange arrays, from writing to standard output.

    It writes a line for each group of processes to C++'s std::cout, whatever the log level. Python does not
    use that stream. Has no effect with a C++ library other than libstdc++.so.6.
    """
    import ctypes

    with contextlib.suppress(OSError, AttributeError, ValueError):
        library = ctypes.CDLL("libstdc++.so.6")
        cout = ctypes.addressof(ctypes.c_char.in_dll(library, "_ZSt4cout"))
        clear = library._ZNSt9basic_iosIcSt11char_traitsIcEE5clearESt12_Ios_Iostate
        clear.argtypes, clear.restype = (ctypes.c_void_p, ctypes.c_int), None
        # Itanium C++ ABI: the distance to the virtual base std::ios stands three words before the vtable.
        vtable = ctypes.c_void_p.from_address(cout).value or 0
        distance = ctypes.c_ssize_t.from_address(vtable - 3 * ctypes.sizeof(ctypes.c_void_p)).value
        clear(cout + distance, 1)  # std::ios::badbit: output is discarded
