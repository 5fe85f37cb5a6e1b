"""A stand-in for gcloud: plays a queued resource, and runs the scripts meant for its workers on this machine.

FAKE_GCLOUD names a directory: states (what `list` answers, a line each; the last one stays), calls.jsonl
(each argv), worker-0/ ... (the home directory of each worker). A worker answers while the resource is ACTIVE.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_GCLOUD"])


def states() -> list[str]:
    return (ROOT / "states").read_text().splitlines()


def main(words: list[str]) -> int:
    with (ROOT / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    kind, verb = words[2], words[3]
    if (kind, verb) == ("queued-resources", "list"):
        now, *later = states()
        print(now)
        if later:
            (ROOT / "states").write_text("\n".join(later) + "\n")
        return 0
    if (kind, verb) == ("queued-resources", "delete"):  # returns when it is gone
        later = states()[states().index("") :] if "" in states() else [""]
        (ROOT / "states").write_text("\n".join(later) + "\n")
    if kind == "queued-resources":  # the next `list` tells
        return 0
    if verb == "describe":
        print((ROOT / "node").read_text().strip() if (ROOT / "node").exists() else "READY")
        return 0
    if states()[0] != "ACTIVE" or (ROOT / "unreachable").exists():
        print("ssh: connect to host: Connection timed out", file=sys.stderr)
        return 255
    option = next(w for w in words if w.startswith("--worker=")).partition("=")[2]
    homes = sorted(ROOT.glob("worker-*")) if option == "all" else [ROOT / f"worker-{option}"]
    return max(on_worker(home, verb, words) for home in homes)


def on_worker(home: Path, verb: str, words: list[str]) -> int:
    if verb == "scp":
        source, target = [w for w in words[4:] if not w.startswith("-")][:2]
        shutil.copy(source, home / target.partition(":")[2])
        return 0
    command = next(w for w in words if w.startswith("--command=")).partition("=")[2]
    env = os.environ | {"HOME": str(home), "WORKER": home.name}
    return subprocess.run(["bash", "-c", command], cwd=home, env=env, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
