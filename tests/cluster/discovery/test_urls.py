"""URLs of sources: what is taken, what is refused and how, and that passwords stay out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kamacache.cluster.discovery import open_discovery
from kamacache.cluster.discovery.urls import parse_source
from kamacache.cluster.membership import Member
from kamacache.errors import ConfigError
from tests.node_process import ROOT

OWN = Member("127.0.0.1:8001")


@pytest.mark.parametrize(
    "url",
    [
        "static:127.0.0.1:8001,127.0.0.1:8002=2",
        "file:/etc/kamacache/peers.toml",
        "file:///etc/kamacache/peers.json",
        "dns:cache.default.svc:8001",
        "dns:cache.default.svc.:8001?every=0.5",
        "dns:_cache._tcp.default.svc?server=[::1]:53&every=30",
        "etcd://127.0.0.1:2379/kamacache",
        "etcd://a:2379,[fd00::1]:2379/team/cache/?ttl=5",
        "etcd://a:2379/c?username=u&password=a%26b+c",
        "nacos://127.0.0.1:8848/cache",
        "nacos://a:8848,b:8848/cache?namespace=n&group=G&username=u&password=p&every=1",
    ],
)
def test_urls_that_are_taken(url: str) -> None:
    assert open_discovery(url, OWN) is not None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8001",
        "consul://a:1/x",
        "static:",
        "static:a",
        "static:a:1,a:1=2",
        "static:a:1?x=1",
        "static://a:1",
        "file:peers.toml",
        "file:/peers.yaml",
        "file://host/peers.toml",
        "dns:",
        "dns:name",
        "dns:name:8001=2",
        "dns:10.0.0.1:8001",
        "dns:[::1]:8001",
        "dns://name:8001",
        "dns:_x._tcp.name:8001",
        "dns:a..b:8001",
        "dns:name:1?every=0",
        "dns:name:1?every=nan",
        "dns:name:1?every=x",
        "dns:name:1?evry=1",
        "dns:name:1?every",
        "dns:name:1?every=1&every=2",
        "dns:name:1?server=name:53",
        "dns:name:1?server=127.0.0.1",
        "etcd:/x",
        "etcd:///x",
        "etcd://a:2379",
        "etcd://a:2379/",
        "etcd://a/x",
        "etcd://a:2379=2/x",
        "etcd://u:p@a:2379/x",
        "etcd://a:2379/x y",
        "etcd://a:2379/x?ttl=1",
        "etcd://a:2379/x?username=u",
        "etcd://" + ",".join(f"a{i}:1" for i in range(17)) + "/x",
        "nacos://a:8848",
        "nacos://a:8848/x/y",
        "nacos://a:8848/x@@y",
        "nacos:a:8848/x",
        "nacos://a:8848/x?group=a%20b",
        "nacos://a:8848/x?password=p",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        open_discovery(url, OWN)
    assert refused.value.setting == "discover"
    assert str(refused.value)


def test_a_refused_url_says_what_is_expected() -> None:
    with pytest.raises(ConfigError) as refused:
        open_discovery("etcd://127.0.0.1:2379", OWN)
    assert refused.value.value == "etcd://127.0.0.1:2379"
    assert "etcd://HOST:PORT,HOST:PORT/PREFIX" in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "nacos://a:1/x?username=u&password=hush",
        "nacos://a:1/x?Password=hush&username=u",
        "etcd://u:hush@a:1/x",
        "redis://u:hush@a:1/x",
        "etcd://u:a/hush?b@a:1/x",
        "etcd://a:1/x?password=hush&x=1",
        "etcd:/u:hush@a:1/x",
        "u:hush@a:1/x",
        "//hush@a:1/x",
        "etcd://u:hush\nhush@a:1/x",
    ],
)
def test_no_password_is_shown(url: str) -> None:
    try:
        source = parse_source(url)
        source.allow_options("username", "password")
        shown = source.shown
    except ConfigError as error:
        shown = str(error) + str(error.value)
    assert "hush" not in shown
    assert "***" in shown


def test_an_option_is_decoded_and_a_plus_is_a_plus() -> None:
    source = parse_source("nacos://a:1/x%2Dy?username=u&password=a%26b%3D+c")
    assert source.path == "/x-y"
    assert source.login() == ("u", "a&b=+c")


@pytest.mark.parametrize(
    ("url", "extra", "module"),
    [
        ("dns:name:1", "dns", "dns"),
        ("etcd://a:1/x", "etcd", "aetcd"),
        ("nacos://a:1/x", "nacos", "httpx"),
    ],
)
def test_a_missing_extra_is_named(
    url: str, extra: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith(f"kamacache.cluster.discovery.{extra}")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'kamacache\[{extra}\]'") as refused:
        open_discovery(url, OWN)
    assert refused.value.setting == "discover"
    assert refused.value.value == url


def test_a_scheme_loads_only_what_it_needs() -> None:
    program = (
        "import sys\n"
        "from kamacache.cluster.discovery import open_discovery\n"
        "from kamacache.cluster.membership import Member\n"
        "open_discovery('static:a:1', Member('a:1'))\n"
        "open_discovery('file:/a.toml', Member('a:1'))\n"
        "print([m for m in ('grpc', 'aetcd', 'dns', 'httpx') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.strip() == "[]"
