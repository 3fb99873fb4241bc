"""What was asked of the targets, in words."""

from __future__ import annotations

from scripts.loadtest.headline import headline

ASKED = {
    "mix": "90:10:0",
    "popularity": "zipf:0.99",
    "keys": 100_000,
    "cache": "warm",
    "value_size": "100",
    "batch": 1,
    "ttl_s": None,
    "processes": 1,
    "concurrency": 1,
    "rate": None,
    "arrivals": "poisson",
    "seed": 7,
}


def test_a_closed_loop_says_how_many_requests_are_under_way() -> None:
    workload, offer = headline(ASKED)
    assert workload == (
        "mix 90:10:0, zipf:0.99 over 100,000 keys stored before, values of 100 bytes"
    )
    assert offer == "closed loop, 1 process of 1 request at a time, seed 7"
    assert headline({**ASKED, "processes": 4, "concurrency": 16})[1] == (
        "closed loop, 4 processes of 16 requests at a time, seed 7"
    )


def test_an_open_loop_says_its_rate() -> None:
    asked = {**ASKED, "rate": 20_000.0, "processes": 4, "concurrency": 64}
    assert headline(asked)[1] == (
        "open loop of 20,000 requests/s (poisson), 4 processes of 64 connections, seed 7"
    )


def test_what_differs_from_the_usual_is_said() -> None:
    asked = {
        **ASKED,
        "batch": 256,
        "ttl_s": 2.5,
        "value_size": "lognormal:400:1",
        "cache": "cold",
    }
    assert headline(asked)[0] == (
        "mix 90:10:0, zipf:0.99 over 100,000 keys new to the target in each "
        "round, values lognormal:400:1, 256 keys a request, ttl 2.5 s"
    )


def test_a_trace_has_no_number_of_keys() -> None:
    asked = {**ASKED, "mix": "1:0:0", "popularity": "trace:/data/t.gz", "cache": "cold"}
    assert headline(asked)[0].startswith("mix 1:0:0, trace:/data/t.gz, values")


def test_what_is_not_known_is_left_out() -> None:
    assert headline({}) == []
    assert headline({"keys": 5, "mix": "1:0:0"}) == ["mix 1:0:0"]
