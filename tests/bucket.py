"""An emulated Cloud Storage that both Orbax's driver and gcsfs talk to, with the store's preconditions."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

import pytest

NEEDS = [m for m in ("gcsfs", "gcp_storage_emulator") if importlib.util.find_spec(m) is None]

# The emulator ignores ifGenerationMatch; the store compares it and writes as one operation.
# Its downloads lack the generation, by which TensorStore reads a file again only when it has changed.
SERVE = """
import sys, threading
from http import HTTPStatus
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

one = threading.Lock()

def conditional(handler, name_of):
    def handle(request, response, storage, *args, **kwargs):
        with one:
            wanted = (request.query.get("ifGenerationMatch") or [None])[0]
            if wanted is not None:
                try:
                    found = storage.get_file_obj(request.params["bucket_name"], name_of(request))
                    generation = found["generation"]
                except NotFound:
                    generation = "0"
                if generation != wanted:
                    response.status = HTTPStatus.PRECONDITION_FAILED
                    return response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return handler(request, response, storage, *args, **kwargs)
    return handle

in_path = lambda request: request.params["object_id"]
in_query = lambda request: (request.query.get("name") or [""])[0] or request.data["meta"]["name"]
objects.patch = conditional(objects.patch, in_path)
objects.delete = conditional(objects.delete, in_path)
objects.insert = conditional(objects.insert, in_query)

download = objects.download

def versioned(request, response, storage, *args, **kwargs):
    with one:
        try:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        except NotFound:
            response.status = HTTPStatus.NOT_FOUND
            return None
        response["x-goog-generation"] = found["generation"]
        if request.query.get("ifGenerationNotMatch") == [found["generation"]]:
            response.status = HTTPStatus.NOT_MODIFIED
            return None
        return download(request, response, storage, *args, **kwargs)

objects.download = versioned

from gcp_storage_emulator.server import create_server
create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""


class Bucket:
    """What the bucket holds, over the store's own JSON API."""

    def __init__(self, url: str):
        self.url = url

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        with urllib.request.urlopen(f"{self.url}{path}", body, timeout=10) as answer:
            return answer.read()

    def names(self) -> list[str]:
        items = json.loads(self._ask("/storage/v1/b/bucket/o")).get("items", [])
        return sorted(item["name"] for item in items)

    def get(self, name: str) -> bytes:
        return self._ask(
            f"/download/storage/v1/b/bucket/o/{urllib.parse.quote(name, '')}?alt=media"
        )

    def put(self, name: str, body: bytes) -> None:
        place = urllib.parse.quote(name, "")
        self._ask(f"/upload/storage/v1/b/bucket/o?uploadType=media&name={place}", body)

    def lines(self, folder: str) -> list[dict]:
        parts = [name for name in self.names() if name.startswith(f"{folder}/")]
        return [json.loads(x) for name in parts for x in self.get(name).decode().splitlines()]


@contextlib.contextmanager
def serving() -> Iterator[Bucket]:
    """The store, in a process of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(port)], **quiet)
    bucket = Bucket(f"http://localhost:{port}")
    for _ in range(200):
        try:
            bucket.names()
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    try:
        yield bucket
    finally:
        process.kill()
        process.wait()


def reached(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process and those that it starts find the store."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", bucket.url)  # read by gcsfs
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.url)  # read by Orbax's driver
