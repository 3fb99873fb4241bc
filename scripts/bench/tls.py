#!/usr/bin/env python3
"""What TLS costs: gets, batches, values of 64 KiB and new connections, over it and in clear.

Two nodes with the same values, one with TLS, side by side; one client of each, in turn, from one
thread. A get is a hit in the front's memory, so that what is compared is the way there and back.
The certificates are made with openssl, ECDSA P-256, as in docs/tls.md; HTTP has one connection
that stays, by the standard library.

    scripts/bench/tls.py [--quick] [--rounds N] [--json FILE] [--check]
"""

from __future__ import annotations

import http.client
import ssl
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import _harness as harness

import kamacache

GROUP: Final = "scores"
HOST: Final = "127.0.0.1"
KEYS: Final = [f"key:{i}" for i in range(256)]
LARGE: Final = "large"
GETS, BATCHES, LARGES, CONNECTIONS = 100, 15, 25, 5  # a slice


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate that is its own CA."""
    cert, key = folder / "node.pem", folder / "node.key"
    made = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=node -addext subjectAltName=IP:{HOST} -keyout {key} -out {cert}"  # noqa: E501
    subprocess.run(made.split(), check=True, capture_output=True)
    key.chmod(0o600)
    return cert, key


def main() -> None:
    """Measure."""
    args = harness.arguments(__doc__)
    report = harness.Report("tls", args, packages=("grpcio", "uvloop", "uvicorn"))
    rounds = args.rounds or (5 if args.quick else 25)
    with ExitStack() as stack:
        folder = stack.enter_context(harness.workspace())
        cert, key = certificate(folder)
        flags = {"tls": (f"--tls-cert={cert}", f"--tls-key={key}"), "clear": ()}
        suites: dict[str, dict[str, Callable[[], float]]] = {}
        for side, more in flags.items():
            place = folder / side
            place.mkdir()
            api = f"{HOST}:{harness.free_port()}"
            node = stack.enter_context(
                harness.running_node(
                    place, f"--api={api}", *more, groups=[f"{GROUP}:16MiB"], workers=1
                )
            )
            slices = sides(stack, node.address, api, cert if side == "tls" else None)
            for name, body in slices.items():
                suites.setdefault(name, {})[side] = body
        for name, suite in suites.items():
            samples = harness.interleave(suite, rounds)
            report.samples({f"{name}, {side}": rounds for side, rounds in samples.items()})
            report.ratio(
                f"{name}: TLS over clear", harness.ratios(samples["tls"], samples["clear"])
            )
    report.finish()


def sides(
    stack: ExitStack, address: str, api: str, ca: Path | None
) -> dict[str, Callable[[], float]]:
    """Return what is measured at one node: each runs a slice and returns the seconds a call."""
    client = stack.enter_context(kamacache.Client([address], tls_ca=ca))
    client.set_many(GROUP, dict.fromkeys(KEYS, bytes(100)))
    client.set(GROUP, LARGE, bytes(64 << 10))
    host, _, port = api.rpartition(":")
    web: http.client.HTTPConnection
    if ca is None:
        web = http.client.HTTPConnection(host, int(port))
    else:
        context = ssl.create_default_context(cafile=str(ca))
        web = http.client.HTTPSConnection(host, int(port), context=context)
    stack.callback(web.close)

    def over_http() -> None:
        web.request("GET", f"/api?key={KEYS[0]}")
        web.getresponse().read()

    def connect() -> None:
        with kamacache.Client([address], tls_ca=ca) as fresh:
            fresh.get(GROUP, KEYS[0])

    bodies: dict[str, tuple[int, Callable[[], object]]] = {
        "get": (GETS, lambda: client.get(GROUP, KEYS[0])),
        "get_many of 256": (BATCHES, lambda: client.get_many(GROUP, KEYS)),
        "get of 64 KiB": (LARGES, lambda: client.get(GROUP, LARGE)),
        "HTTP get": (GETS, over_http),
        "client made, one get": (CONNECTIONS, connect),
    }
    return {name: partial(_slice, *what) for name, what in bodies.items()}


def _slice(calls: int, call: Callable[[], object]) -> float:
    def body() -> None:
        for _ in range(calls):
            call()

    return harness.per_call(calls, body)


if __name__ == "__main__":
    main()
