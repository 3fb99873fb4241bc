"""Targets as text, and what is said of text that is none."""

from __future__ import annotations

import pytest

from scripts.loadtest.targets.specs import check_spec, make_target, split_spec, split_targets


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        (["local:/a,redis:/b"], ["local:/a", "redis:/b"]),
        (["local,redis"], ["local", "redis"]),
        (["local:/a", "redis:/b"], ["local:/a", "redis:/b"]),
        (["grpc:a:1,b:2,redis:c:3"], ["grpc:a:1,b:2", "redis:c:3"]),
        (["grpc:a:1,b:2;grpc:c:3"], ["grpc:a:1,b:2", "grpc:c:3"]),
        (["local:/a, http , memcached"], ["local:/a", "http", "memcached"]),
        (["redis:/x,local:/y,with,commas"], ["redis:/x", "local:/y,with,commas"]),
    ],
)
def test_commas_end_a_target_only_where_another_begins(
    given: list[str], targets: list[str]
) -> None:
    assert split_targets(given) == targets


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["local:/a"], "names 1 target"),
        ([""], "names 0 target"),
        (["local:/a,local:/a"], "named twice"),
        (["local:/a;oracle:/b"], "'oracle:/b' is no target"),
        ([";".join(f"redis:/{n}" for n in range(9))], "the limit is 8"),
    ],
)
def test_what_cannot_be_compared(given: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        split_targets(given)


@pytest.mark.parametrize(
    "text",
    ["", "/run/x", "redis:localhost", "redis:host:0", "redis:host:65536", "grpc:a:1,b", "http:x:y",
     "memcached::1", "grpc:/a/b", "redis:host:\u00b2"],
)  # fmt: skip
def test_no_target(text: str) -> None:
    with pytest.raises(ValueError, match=r"no target|HOST:PORT"):
        check_spec(text)


def test_a_bare_scheme_has_its_usual_place() -> None:
    assert split_spec("grpc") == ("grpc", "127.0.0.1:8001")
    assert split_spec("redis") == ("redis", "127.0.0.1:6379")
    assert split_spec("local") == ("local", "")


@pytest.mark.parametrize(
    "text",
    ["local:/nowhere", "grpc:[::1]:8001,b:2", "http", "redis:/s.sock", "memcached:10.0.0.1:11211"],
)
def test_each_is_made_without_being_asked(text: str) -> None:
    target = make_target(text)
    assert target.name == text
    assert target.client
    target.close()
