"""Which of JAX's platforms a run uses: decided before the backend starts, from what the machine has.

JAX tries every plugin that is installed. On a machine without a TPU it opens libtpu all the same, which
prints its own complaints, and `JAX_PLATFORMS=cuda` without a GPU ends in a failed assertion.
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
        except OSError:  # a device that goes away, or may not be read
            continue
    return False


def has_gpu(env: Mapping[str, str] | None = None, root: str | Path = "/") -> bool:
    """Whether this process may use an NVIDIA GPU: a device file, not hidden by CUDA_VISIBLE_DEVICES."""
    env = os.environ if env is None else env
    if env.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    files = ("dev/nvidia[0-9]*", "dev/nvidiactl", "dev/dxg")
    return any(glob.glob(os.path.join(str(root), file)) for file in files)


def plugins() -> set[str]:
    """The names of the installed plugins of JAX (`cuda`, `rocm`, ...); libtpu is `tpu`."""
    found = {"tpu"} if importlib.util.find_spec("libtpu") else set()
    places = importlib.util.find_spec("jax_plugins")
    modules = (
        [m.name for m in pkgutil.iter_modules(places.submodule_search_locations or [])]
        if places
        else []
    )
    modules += [e.value for e in importlib.metadata.entry_points(group="jax_plugins")]
    for module in modules:
        name = module.rpartition(".")[2]
        found.add(next((known for known in ("cuda", "rocm") if known in name), name))
    named = os.environ.get("PJRT_NAMES_AND_LIBRARY_PATHS", "")
    return found | {entry.partition(os.pathsep)[0] for entry in named.split(",") if entry}


def choose() -> None:
    """Names the platforms to JAX, before its backend starts; does nothing once it has started.

    A choice of the user's (JAX_PLATFORMS) is only checked: ValueError when it names what is not here.
    """
    import jax
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        return
    config: Any = jax.config
    asked = os.environ.get("JAX_PLATFORMS") or config.jax_platforms
    installed, gpu, tpu = plugins(), has_gpu(), has_tpu()
    if asked:
        kept = chosen(asked, installed, gpu=gpu, tpu=tpu)
        if kept != config.jax_platforms:
            config.update("jax_platforms", kept)
        return
    kept, note = found(installed, gpu=gpu, tpu=tpu)
    if note:
        print(f"note: {note}", file=sys.stderr)
    if kept:
        config.update("jax_platforms", kept)


def use_cpu() -> None:
    """Names the CPU alone to JAX: planning needs no accelerator, which another process may be using."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def found(installed: set[str], *, gpu: bool, tpu: bool) -> tuple[str, str]:
    """(platforms for a user who named none, or "" to leave the choice to JAX; a line for the user, or "")."""
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


def chosen(asked: str, installed: set[str], *, gpu: bool, tpu: bool) -> str:
    """The platforms of JAX_PLATFORMS that are here; ValueError, one line, when one of them cannot be used.

    A GPU that is missing is no error while another platform is named beside it, as in JAX.
    """
    names = [name.strip().lower() for name in asked.split(",") if name.strip()]
    known = {*KNOWN, *installed}
    for name in names:
        check(
            name in known,
            f"JAX_PLATFORMS={asked}: unknown platform {name!r}.{closest(name, known)} Known here:"
            f" {', '.join(sorted(known))}; unset it to use what the machine has",
        )
    absent = {name: why for name in names if (why := _absent(name, installed, gpu=gpu, tpu=tpu))}
    rest = [name for name in names if name not in absent]
    fatal = [name for name in absent if name not in ("cuda", "gpu") or not rest]
    check(
        not fatal,
        f"JAX_PLATFORMS={asked}: {absent[fatal[0]] if fatal else ''}; unset it to use what the machine has",
    )
    return ",".join(rest)


def _absent(name: str, installed: set[str], *, gpu: bool, tpu: bool) -> str:
    """Why a known platform cannot be used here; "" when it can, as far as can be seen."""
    if name == "tpu":
        if not tpu:
            return "this machine has no TPU"
        return "" if "tpu" in installed else f"JAX cannot use a TPU here: {INSTALL['tpu']}"
    if name == "cuda" or (name == "gpu" and "rocm" not in installed):
        if not gpu:
            hidden = "CUDA_VISIBLE_DEVICES" in os.environ
            seen = f" (CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']})" if hidden else ""
            return f"there is no NVIDIA GPU here{seen}"
        return "" if "cuda" in installed else f"JAX cannot use a GPU here: {INSTALL['cuda']}"
    return (
        ""
        if name == "cpu" or name in installed or name == "gpu"
        else f"no plugin {name} is installed"
    )


def start() -> None:
    """Starts the backend; ValueError in place of JAX's RuntimeError, which is many lines, when it cannot."""
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
    """Keeps Gloo, by which processes on CPUs exchange arrays, from writing to the standard output.

    It writes a line for each group of processes to C++'s std::cout, whatever the log level. Python does not
    use that stream; a C++ library that does not come as libstdc++.so.6 goes on writing.
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
        clear(cout + distance, 1)  # std::ios::badbit: what is written goes nowhere
