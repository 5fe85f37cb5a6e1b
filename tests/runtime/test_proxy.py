"""What reaches its host without a proxy, and what keeps it."""

from __future__ import annotations

import urllib.request

import pytest

from spmd.runtime import detect, join, proxy

PROXY = "http://127.0.0.1:9"
STORE = "storage.googleapis.com"


@pytest.fixture
def environ(monkeypatch):
    """Sets the variables of a proxy, and no others of that kind."""

    def set_only(**variables):
        for name in (*proxy.PROXIES, "no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.delenv(name.upper(), raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_only


def test_without_a_proxy_nothing_is_set():
    env = {"PATH": "/bin", "http_proxy": "", "no_proxy": "a"}
    assert not proxy.bypass(["n1"], env)
    assert env == {"PATH": "/bin", "http_proxy": "", "no_proxy": "a"}


@pytest.mark.parametrize("name", [*proxy.PROXIES, *map(str.upper, proxy.PROXIES), "Http_Proxy"])
def test_every_spelling_of_a_proxy_counts(name):
    env = {name: PROXY}
    assert proxy.bypass(["n1", "10.0.0.1", "n1", ""], env)
    assert env == {name: PROXY, "no_grpc_proxy": "n1,10.0.0.1", "no_proxy": "n1,10.0.0.1"}


@pytest.mark.parametrize(
    "given, then",
    [
        ({"no_proxy": "a, .b"}, {"no_proxy": "a,.b,n1", "no_grpc_proxy": "a,.b,n1"}),
        ({"NO_PROXY": "a"}, {"NO_PROXY": "a,n1", "no_grpc_proxy": "n1"}),
        ({"no_proxy": "n1"}, {"no_proxy": "n1", "no_grpc_proxy": "n1"}),
        ({"no_proxy": "*"}, {"no_proxy": "*", "no_grpc_proxy": "*,n1"}),  # all, but to gRPC a name
        (
            {"no_grpc_proxy": "c", "no_proxy": "a", "NO_PROXY": "b"},
            {"no_grpc_proxy": "c,n1", "no_proxy": "a,n1", "NO_PROXY": "b,n1"},
        ),
    ],
)
def test_what_the_user_listed_stays(given, then):
    env = {"https_proxy": PROXY, **given}
    for _ in range(2):  # again on each start
        proxy.bypass(["n1"], env)
        assert env == {"https_proxy": PROXY} | then


@pytest.mark.parametrize("listed", [{}, {"no_proxy": "example.org"}, {"NO_PROXY": ".corp"}])
def test_other_hosts_keep_their_proxy(listed, environ):
    environ(https_proxy=PROXY, **listed)
    proxy.bypass([*proxy.HERE, "n1", *proxy.METADATA])
    assert urllib.request.getproxies()["https"] == PROXY
    assert not urllib.request.proxy_bypass(STORE)
    assert all(urllib.request.proxy_bypass(x) for x in ("n1", "localhost", *proxy.METADATA))
    if listed == {"no_proxy": "example.org"}:
        assert urllib.request.proxy_bypass("example.org")


def test_the_hosts_of_a_run(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "w0,w1")
    monkeypatch.setenv("TPU_PROCESS_ADDRESSES", "w2:8476,[fd00::2]:8476")
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "m0:8080")
    member = detect.Member("localhost:1234", 2, 1, "", "")
    hosts = join._hosts(member)
    assert {"localhost", "127.0.0.1", "w0", "w1", "w2", "m0", "fd00::2"} <= hosts
    assert join._hosts(detect.Member("[fd00::1]:1234", 2, 1, "", "")) >= {"fd00::1"}
    assert "no.such.host.invalid" in join._hosts(
        member._replace(coordinator="no.such.host.invalid:1")
    )
