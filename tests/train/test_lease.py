"""Leases, on a file system without flock and in a bucket: renewed, expiring, passed on."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import threading
import time
import uuid

import pytest
from etils import epath

from spmd.train import lock, owner
from spmd.train.lease import Lease, LeaseLost
from spmd.train.owner import Busy
from tests import bucket as buckets


@pytest.fixture(scope="module")
def served():
    if buckets.NEEDS:
        pytest.skip(f"needs: pip install {' '.join(buckets.NEEDS)}")
    with buckets.serving() as bucket:
        yield bucket


@pytest.fixture(params=["file", "object"])
def place(request, tmp_path, monkeypatch):
    """Where a lease may lie; the names of what lies beside it."""
    if request.param == "file":
        return epath.Path(tmp_path / "lease")
    bucket = request.getfixturevalue("served")
    buckets.reached(bucket, monkeypatch)
    return epath.Path(f"gs://bucket/{tmp_path.name}/lock")


def elsewhere(**facts):
    """An owner on another machine."""
    return owner.this_process() | {"host": "there", "pid": 7, "machine": uuid.uuid4().hex} | facts


class Held:
    """Leases of a second, released after the test; `lost` is what they said when they were lost."""

    def __init__(self):
        self.leases, self.lost = [], []

    def __call__(self, file, name, seconds=1.0):
        lease = Lease(file, name, seconds, lambda why, code: self.lost.append((why, code)))
        self.leases.append(lease)
        return lease


@pytest.fixture
def held():
    made = Held()
    yield made
    for lease in made.leases:
        lease.release()


def abandoned(file, name):
    """A lease whose owner was killed."""
    Lease(file, name, 3600.0)._ended.set()


def test_one_that_is_renewed_is_refused_and_named(place, held):
    held(place, elsewhere())
    start = time.monotonic()
    with pytest.raises(Busy, match=r"in use by process 7 on there, since 20"):
        held(place, owner.this_process())
    assert time.monotonic() - start < 0.8
    held.leases[0].release()
    held(place, owner.this_process())
    held.leases[1].release()
    assert not place.exists() and not held.lost


def test_a_dead_owner_delays_by_its_term_at_most(place, held):
    abandoned(place, elsewhere())
    start = time.monotonic()
    held(place, owner.this_process())
    assert 0.8 < time.monotonic() - start < 1.5  # the machine may be busy
    time.sleep(0.5)
    assert not held.lost


def test_who_is_dead_on_this_machine_or_by_the_launchers_word_delays_nobody(
    place, held, monkeypatch
):
    child = subprocess.Popen(["true"])
    child.wait()
    monkeypatch.setenv("SPMD_RUN_TOKEN", "launch")
    monkeypatch.setenv("SPMD_RUN_ATTEMPT", "0")
    for dead in (
        owner.this_process() | {"pid": child.pid},
        owner.this_process() | {"process_started": "1"},
    ):
        abandoned(place, dead)
        start = time.monotonic()
        held(place, owner.this_process()).release()
        assert time.monotonic() - start < 0.7
    abandoned(place, elsewhere())
    monkeypatch.setenv("SPMD_RUN_ATTEMPT", "1")
    start = time.monotonic()
    held(place, owner.this_process())
    assert time.monotonic() - start < 0.7


def test_starts_of_one_launch_that_overlap_wait_for_each_other(place, held, monkeypatch):
    """Pods of a JobSet: the old ones may still be saving."""
    monkeypatch.setenv("SPMD_RUN_TOKEN", "launch")
    first = held(place, elsewhere())
    threading.Timer(1.5, first.release).start()
    start = time.monotonic()
    held(place, elsewhere())
    assert 1.4 < time.monotonic() - start < 2.4 and not held.lost


def test_an_owner_that_was_away_too_long_leaves_and_harms_nobody(place, held):
    first = held(place, elsewhere())
    renew, away = first._place.renew, threading.Event()
    first._place.renew = lambda count: away.wait(20)  # the store does not answer
    time.sleep(1.0)
    assert [code for _, code in held.lost] == [75] and "could not be renewed" in held.lost[0][0]
    second = held(place, owner.this_process())
    away.set()
    with pytest.raises(LeaseLost):
        renew(9)
    first.release()
    assert second._place.look().owner["pid"] == os.getpid()
    time.sleep(0.4)
    assert len(held.lost) == 1
    second._place.remove(second._place.look())  # by hand
    time.sleep(0.4)
    assert len(held.lost) == 2 and held.lost[1][1] == 1


@pytest.mark.parametrize("round_", range(3))
def test_of_many_that_take_over_at_once_one_does(place, round_):
    abandoned(place, elsewhere())
    owners, refused = [], []

    def start(i):
        try:
            owners.append(Lease(place, elsewhere(pid=i), 1.0, lambda *_: owners.append("lost")))
        except Busy:
            refused.append(i)

    threads = [threading.Thread(target=start, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(0.4)
    assert len(owners) == 1 and len(refused) == 5, (owners, refused)
    owners[0].release()


def test_without_flock_a_lease_holds_the_directory(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    place = epath.Path(tmp_path / "run")
    first = lock.Lock(place)
    assert [p.name for p in place.iterdir()] == ["lease"]
    with pytest.raises(Busy, match=f"process {os.getpid()} on"):
        lock.Lock(place)
    first.move(lambda: place.rename(tmp_path / "aside"))
    second = lock.Lock(place)
    first.release()
    second.release()
    assert [p.name for p in tmp_path.iterdir()] == ["aside"]


# The child touches nothing of JAX, which warns of any fork.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    first = lock.Lock(epath.Path(tmp_path))
    (read, told), (ready, write) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        os.close(write)
        os.write(told, b"x")
        os.read(ready, 1)  # until the parent is done
        os._exit(0)
    os.read(read, 1)
    held = first._held
    assert isinstance(held, lock._Flock)
    held.close()  # as a kill does
    lock._LOCKS.clear()
    lock.Lock(epath.Path(tmp_path)).release()
    os.write(write, b"x")
    os.waitpid(child, 0)


def test_the_name_of_a_dead_owner_is_not_told_for_that_of_the_new_one(tmp_path, monkeypatch):
    file = epath.Path(tmp_path / "lock")
    dead = owner.this_process() | {"process_started": "1", "pid": 1}
    file.write_text(json.dumps(dead))
    with open(file, "r+") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: file.write_text(json.dumps(owner.this_process()))).start()
        with pytest.raises(Busy, match=f"process {os.getpid()} on"):
            lock.Lock(epath.Path(tmp_path))


def test_a_directory_that_was_moved_by_hand_is_noticed(tmp_path):
    held = lock.Lock(epath.Path(tmp_path / "run"))
    assert held.holds()
    (tmp_path / "run").rename(tmp_path / "away")
    assert not held.holds()
    other = lock.Lock(epath.Path(tmp_path / "run"))  # the path is another's now
    held.release()
    assert other.holds()
    other.release()
