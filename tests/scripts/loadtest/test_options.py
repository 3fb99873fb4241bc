"""The command line: what is made of it, and the sentence for what cannot be."""

from __future__ import annotations

import gzip
from pathlib import Path

import click
import pytest

from scripts.loadtest.flags import AS_IS, COLD, WARM
from scripts.loadtest.options import Options, parse


def options(*arguments: object) -> Options:
    found = parse([str(argument) for argument in arguments])
    assert found is not None
    return found


def refused(*arguments: object) -> str:
    with pytest.raises(click.ClickException) as raised:
        parse([str(argument) for argument in arguments])
    assert raised.value.exit_code == 2
    return raised.value.format_message()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.gz"
    path.write_bytes(gzip.compress(b"".join(b"key-%d\n" % number for number in range(50))))
    return path


def test_one_target_has_one_long_round() -> None:
    found = options("--target", "redis")
    assert (found.targets, found.rounds, found.duration_s, found.warmup_s) == (["redis"], 1, 10, 1)
    assert (found.concurrency, found.rate, found.mix, found.cache) == (1, None, "90:10:0", WARM)


def test_a_comparison_has_several_short_ones() -> None:
    found = options("--compare", "redis,memcached")
    assert (found.targets, found.rounds) == (["redis", "memcached"], 5)
    assert found.duration_s == 3


def test_an_open_loop_has_connections() -> None:
    found = options("--target", "redis", "--rate", "1e3")
    assert (found.rate, found.concurrency) == (1000.0, 64)


def test_a_trace_is_read_once_and_cold(trace: Path) -> None:
    found = options("--target", "redis", "--popularity", f"trace:{trace}")
    assert (found.duration_s, found.warmup_s, found.cache) == (None, 0, COLD)
    assert (found.mix, found.key_prefix) == ("1:0:0", "")
    again = options("--target", "redis", "--popularity", f"trace:{trace}", "--duration", 5)
    assert again.duration_s == 5


def test_seeds_differ_unless_given() -> None:
    assert options("--target", "redis").seed != options("--target", "redis").seed
    assert options("--target", "redis", "--seed", 7).seed == 7


def test_what_is_shown_is_plain() -> None:
    shown = options("--target", "redis", "--json", "/tmp/x.json", "--as-is").as_shown()
    assert shown["json"] == "/tmp/x.json"
    assert shown["cache"] == AS_IS
    assert shown["targets"] == ["redis"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_target_and_exit_code(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse([flag]) is None
    said = capsys.readouterr().out
    for word in ("local", "grpc", "http", "redis", "memcached", "69", "70"):
        assert word in said


TARGET = ("--target", "redis")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--keys", "5"), "give --target SPEC, or --compare"),
        ((*TARGET, "--compare", "local,redis"), "give --target SPEC, or --compare"),
        (("--target", "oracle"), "'oracle' is no target"),
        (("--compare", "redis"), "names 1 target"),
        ((*TARGET, "--processes", "0"), "'0'; give a whole number from 1 to 256"),
        ((*TARGET, "--processes", "257"), "from 1 to 256"),
        ((*TARGET, "--processes", "2.5"), "whole number"),
        ((*TARGET, "--concurrency", "5000"), "from 1 to 4,096"),
        ((*TARGET, "--rate", "0"), "requests a second"),
        ((*TARGET, "--rate", "nan"), "requests a second"),
        ((*TARGET, "--rate", "inf"), "requests a second"),
        ((*TARGET, "--duration", "0.01"), "from 0.1 to 86,400 seconds"),
        ((*TARGET, "--duration", "soon"), "'soon'"),
        ((*TARGET, "--rounds", "1001"), "from 1 to 1,000"),
        ((*TARGET, "--keys", "1e6"), "whole number from 1 to 100,000,000"),
        ((*TARGET, "--keys", "100000000"), "use --as-is or --cold"),
        ((*TARGET, "--keys", "9000000", "--value-size", "10000"), "64 GiB"),
        ((*TARGET, "--value-size", "big"), "is no size of values"),
        ((*TARGET, "--popularity", "zipf:x"), "THETA"),
        ((*TARGET, "--popularity", "trace:/no/such"), "No such file"),
        ((*TARGET, "--mix", "0:0"), "all 0"),
        ((*TARGET, "--batch", "4097"), "from 1 to 4,096"),
        ((*TARGET, "--ttl", "0"), "from 0.001"),
        ((*TARGET, "--timeout", "0"), "from 0.01 to 600 seconds"),
        ((*TARGET, "--getter-ms", "-1"), "getter's MS"),
        ((*TARGET, "--seed", "-1"), "from 0"),
        ((*TARGET, "--arrivals", "odd"), "poisson"),
        ((*TARGET, "--key-prefix", "x" * 1015), "limit is 1014"),
        ((*TARGET, "--cold", "--warmup", "1"), "a cold test has none"),
        (("--target", "http", "--batch", "2"), "HTTP has no batches"),
        (("--target", "memcached", "--concurrency", "257"), "a thread for each"),
        (("--compare", "local;grpc;redis", "--processes", "256"), "768 processes"),
        ((*TARGET, "more"), "unexpected extra argument"),
        ((*TARGET, "--no-such"), "No such option"),
    ],
)
def test_mistakes_name_value_limit_and_remedy(arguments: tuple[str, ...], says: str) -> None:
    assert says in refused(*arguments)


def test_traces_that_cannot_be_used(trace: Path, tmp_path: Path) -> None:
    asked = ("--target", "redis", "--popularity", f"trace:{trace}")
    assert "only 50 keys" in refused(*asked, "--processes", 51)
    assert "longest key has" in refused(*asked, "--key-prefix", "x" * 1010)
    empty = tmp_path / "empty"
    empty.write_text("\n\n")
    assert "holds no keys" in refused("--target", "redis", "--popularity", f"trace:{empty}")
