"""Checks of the cluster: does every node answer, name itself as it is named, and know the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import kamacache
from kamacache.cli.admin.asking import Told, ask_all
from kamacache.cli.admin.diagnosis import Finding, failed, ok, warning
from kamacache.cluster.membership import Member, Membership
from kamacache.errors import AccessDeniedError, KamaCacheError
from kamacache.wire.messages import LinkNow

ASKED_S: Final = 3.0
ASKED_MAX: Final = 64  # nodes, of a large cluster the first
SKEW_WARNED_S: Final = 0.5
SKEW_FAILED_S: Final = 10.0
LAG_WARNED_S: Final = 5.0
TOLD_MAX: Final = 8

Asked = Iterator[Finding]
Answers = dict[str, Told | KamaCacheError]


def ask_cluster(membership: Membership, timeout_s: float) -> Answers:
    """Ask every other node who it is, and whom it knows."""
    return ask_all(membership.others[:ASKED_MAX], min(ASKED_S, timeout_s))


def cluster_checks(membership: Membership, answers: Answers) -> Asked:
    """Yield how the other nodes' words agree with this one's."""
    told = {address: answer for address, answer in answers.items() if isinstance(answer, Told)}
    yield from _reached(answers)
    yield from _rings(membership, told)
    yield from _versions(told)
    yield from _clocks(told)


def _reached(answers: Answers) -> Asked:
    """Yield who does not answer, and who answers that this command may not ask."""
    failures = {name: why for name, why in answers.items() if isinstance(why, KamaCacheError)}
    denied = [name for name, why in failures.items() if isinstance(why, AccessDeniedError)]
    silent = [f"{name} ({why})" for name, why in failures.items() if name not in denied]
    if silent:
        yield failed(
            "peers",
            f"{len(silent)} of {len(answers)} do not answer this host: {_some(silent)}",
            "are they up, and does a firewall or TLS (--tls-ca here) stand between?",
        )
    if denied:
        yield warning(
            "peers",
            f"{len(denied)} of {len(answers)} demand a token before they tell: {_some(denied)}",
            "give one with --token-file, of whatever scope",
        )
    if not failures:
        yield ok("peers", f"all {len(answers)} answer over gRPC")


def _rings(membership: Membership, told: dict[str, Told]) -> Asked:
    """Yield who has another list of members, or another name, than this node."""
    own, differing = set(membership.members), 0
    for address, answer in told.items():
        if answer.own != address:
            differing += 1
            yield failed(
                "ring",
                f"{address} calls itself {answer.own or 'nothing'}: keys would go to it under "
                "another name",
                f"start it with --advertise {address}, or name it {answer.own} in every list",
            )
            continue
        difference = _difference(own, set(answer.members))
        if difference:
            differing += 1
            yield failed(
                "ring",
                f"{address} knows other members than {membership.own}: {difference}",
                "give every node the same --peers, or the same source to --discover; while a list "
                "changes this lasts for seconds",
            )
    if told and not differing:
        yield ok("ring", f"{len(told) + 1} nodes agree on {len(own)} members and their weights")


def _difference(ours: set[Member], theirs: set[Member]) -> str:
    weights = {member.address: member.weight for member in ours}
    other_weights = {member.address: member.weight for member in theirs}
    parts = []
    if missing := sorted(weights.keys() - other_weights.keys()):
        parts.append(f"it lacks {_some(missing)}")
    if extra := sorted(other_weights.keys() - weights.keys()):
        parts.append(f"it has {_some(extra)} beside")
    changed = [
        f"{address} with weight {other_weights[address]} instead of {weights[address]}"
        for address in sorted(weights.keys() & other_weights.keys())
        if weights[address] != other_weights[address]
    ]
    if changed:
        parts.append(f"it has {_some(changed)}")
    return "; ".join(parts)


def _versions(told: dict[str, Told]) -> Asked:
    others = [
        f"{address} {answer.version or '(too old to say)'}"
        for address, answer in told.items()
        if answer.version != kamacache.__version__
    ]
    if others:
        yield warning(
            "versions of peers",
            f"this library is {kamacache.__version__}: {_some(others)}",
            "let the upgrade go on to every node; the CHANGELOG says which versions link",
        )
    elif told:
        yield ok("versions of peers", f"all {kamacache.__version__}")


def _clocks(told: dict[str, Told]) -> Asked:
    """Yield whose wall clock differs; the way there and back bounds what can be told."""
    known = {a: t for a, t in told.items() if t.ahead_s is not None}
    if not known:
        return
    surely = {
        address: max(0.0, abs(answer.ahead_s or 0.0) - answer.uncertain_s)
        for address, answer in known.items()
    }
    skewed = [
        f"{address} by {known[address].ahead_s:+.2f} s"
        for address, by_s in surely.items()
        if by_s > SKEW_WARNED_S
    ]
    if not skewed:
        yield ok("clocks of peers", f"within {max(surely.values()) + 0.001:.3f} s of this host's")
        return
    detail = f"they differ from this host's: {_some(skewed)}"
    remedy = "run NTP on every node: of two writes to one key the one of the later clock wins"
    worst_s = max(surely.values())
    make = failed if worst_s > SKEW_FAILED_S else warning
    yield make("clocks of peers", detail, remedy)


def link_checks(links: dict[int, list[LinkNow]], answers: Answers) -> Asked:
    """Yield how this node's workers are linked to the others."""
    bad: list[str] = []
    late: list[str] = []
    for worker, of_worker in sorted(links.items()):
        for link in of_worker:
            if link.state not in ("usable", "draining", "returning"):
                answers_here = isinstance(answers.get(link.address), Told)
                but = ", though it answers this command" * answers_here
                bad.append(f"worker {worker} to {link.address}: {link.state}{but}")
            if link.lag_ms > LAG_WARNED_S * 1000:
                waits = f"{link.pending} for {link.lag_ms / 1000:.1f} s"
                late.append(f"worker {worker} to {link.address}: {waits}")
    if bad:
        yield failed(
            "links",
            f"{len(bad)} are not up: {_some(bad)}",
            "the node's log says why; the ring's next node stands in meanwhile",
        )
    else:
        yield ok("links", f"all {sum(map(len, links.values()))} of {len(links)} workers are up")
    if late:
        yield warning(
            "invalidations",
            f"they wait: {_some(late)}",
            "a peer is away or slow; it drops what is old before it is asked again",
        )


def _some(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - TOLD_MAX} more" if len(parts) > TOLD_MAX else ""
    return ", ".join(parts[:TOLD_MAX]) + more
