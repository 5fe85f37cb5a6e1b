"""Local paths that no library takes for a pattern or an address. Standard library only."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator

_PLAIN = re.compile(r"[A-Za-z0-9_./ =+,\-]*")
_DESCRIPTORS = "/proc/self/fd"
_SHARED = 900  # below the usual limit of 1024, and above what a process has open
# The kernel's limit is 4096 bytes; names inside a run directory have up to about 200.
_LONGEST = 3800
# `[*?]` are wildcards, `#` a generation of an object, `\` and `%` what clients escape with.
_NOT_IN_OBJECTS = re.compile(r"[\[\]*?#\\%\x00-\x1f\x7f]")


@contextlib.contextmanager
def plain_path(path: str | os.PathLike[str], *, same: bool = False) -> Iterator[str]:
    r"""Another path to the same place, of letters, digits and `_./ =+,-` only.

    Orbax globs the path that it merges a step in, and TensorStore takes `\` for a separator: of a directory
    `pr[1]` no array would be found again. A plain path is returned unchanged. Any other one leads through a
    file descriptor, which leaves nothing behind when the process is killed, or through a symbolic link where
    there is no /proc.

    Args:
      path: a local path whose parent exists; an object store's (gs://) comes back as it is.
      same: all processes of a run call this at once, and get the same path, which Orbax compares.

    Yields:
      The path to use, in this process only and until the context ends.

    Raises:
      OSError: its directory cannot be opened.
    """
    text = os.fspath(path)
    if "://" in text or _PLAIN.fullmatch(text):
        yield text
        return
    parent, name = os.path.split(os.path.abspath(text))
    if not _PLAIN.fullmatch(name):
        parent, name = os.path.join(parent, name), ""
    with contextlib.ExitStack() as stack:
        if os.path.isdir(_DESCRIPTORS):
            descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
            if same:
                import fcntl  # absent on Windows

                unsorted, descriptor = (
                    descriptor,
                    fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _SHARED),
                )
                os.close(unsorted)
            stack.callback(os.close, descriptor)
            link = f"{_DESCRIPTORS}/{descriptor}"
        else:
            folder = tempfile.mkdtemp(prefix="spmd-path-")
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            link = os.path.join(folder, "to")
            os.symlink(parent, link)
        yield os.path.join(link, name) if name else link


def why_unusable(path: str | os.PathLike[str]) -> str:
    """Why nothing can be stored at a path, as a clause that follows its name; "" if something can be."""
    text = os.fspath(path)
    if "://" in text:
        odd = _NOT_IN_OBJECTS.search(text)
        return (
            f"has {odd[0]!r} in it, which clients of object stores do not take literally"
            if odd
            else ""
        )
    if "\0" in text:
        return "has a null character in it"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "is not UTF-8"
    return f"has {size} bytes, more than {_LONGEST}" if size > _LONGEST else ""
