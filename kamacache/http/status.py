"""What /status.json says: one snapshot as the status page shows it, with rates of the last minute.

*Process*: http. The shape is documented in docs/status-page.md: names stay, new ones may come.
*Invariants*: the size is bounded, by `STATUS_PEERS_MAX` where no other bound of the node does it;
what is wrong is said in ``notes``, in sentences, so that nobody has to find it in a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from kamacache.http.changes import Changes, Level
from kamacache.http.history import GroupMark, Mark, PeerMark, cpu_of, quantile_ms, rounded
from kamacache.limits import STATUS_NOTES_MAX, STATUS_PEERS_MAX
from kamacache.local.snapshot import (
    GroupInfo,
    MemberInfo,
    NodeSnapshot,
    PeerInfo,
    RoleInfo,
    WorkerInfo,
)

FORMAT: Final = 1

_WAITING_MANY: Final = 1_000  # invalidations that wait for a peer: told as something wrong
_FAILED_SHARE: Final = 0.01  # of loads, or of calls to peers, in the last minute
_TROUBLE: Final = ("down", "partly down", "draining", "returning", "connecting")  # worst first


def state_of(snapshot: NodeSnapshot) -> str:
    """Return the state of the node: starting, ready, draining, stalled."""
    node = snapshot.node
    if node.state == "stopping":
        return "draining"
    if node.state == "starting":
        return "starting"
    return "ready" if node.serving else "stalled"


def peer_state(peer: PeerInfo) -> str:
    """Return the state of a peer over all workers' links to it."""
    if not peer.member:
        return "left"
    if not peer.links:
        return "unknown"
    if peer.down:
        return "down" if peer.down == peer.links else "partly down"
    for state in ("draining", "returning", "connecting"):
        if getattr(peer, state):
            return state
    return "usable"


def peer_states(snapshot: NodeSnapshot) -> dict[str, str]:
    """Return the state of each peer by its address."""
    return {peer.address: peer_state(peer) for peer in snapshot.peers}


def document(
    snapshot: NodeSnapshot,
    now: Mark,
    before: Mark | None,
    changes: Changes,
) -> dict[str, Any]:
    """Return all of it but for the history. ``before``: from which rates are taken, if any."""
    state = state_of(snapshot)
    states = peer_states(snapshot)
    roles = list(_roles(snapshot, now, before))
    groups = [_group(group, now, before) for group in snapshot.groups]
    peers = sorted(
        (_peer(peer, states[peer.address], now, before) for peer in snapshot.peers),
        key=lambda peer: (_rank(peer["state"]), peer["address"]),
    )
    notes = list(_notes(snapshot, state, roles, peers, groups))
    return {
        "format": FORMAT,
        "unix_ms": int(snapshot.node.unix_s * 1000),
        "node": _node(snapshot, state),
        "notes": notes[:STATUS_NOTES_MAX],
        "notes_more": max(0, len(notes) - STATUS_NOTES_MAX),
        "recent_s": None if before is None else rounded(now.at_s - before.at_s),
        "totals": _totals(snapshot, now, before),
        "roles": roles,
        "ring": _ring(snapshot, states),
        "peers": peers[:STATUS_PEERS_MAX],
        "peers_more": max(0, len(peers) - STATUS_PEERS_MAX),
        "groups": groups,
        "changes": [
            {"unix_ms": change.unix_ms, "level": change.level, "text": change.text}
            for change in changes.told()
        ],
    }


def _node(snapshot: NodeSnapshot, state: str) -> dict[str, Any]:
    node = snapshot.node
    return {
        "state": state,
        "serving": node.serving,
        "name": node.name,
        "version": node.version,
        "python": node.python,
        "epoch": node.epoch,
        "pid": node.pid,
        "uptime_s": rounded(node.uptime_s),
        "workers": node.workers,
        "fronts": node.fronts,
        "listen": node.listen,
        "api": node.api,
        "clustered": node.clustered,
        "run_dir": node.run_dir,
        "reloads": node.reloads,
        "reloads_refused": node.reloads_refused,
    }


# -- processes ------------------------------------------------------------------------------------


def _roles(snapshot: NodeSnapshot, now: Mark, before: Mark | None) -> Iterator[dict[str, Any]]:
    workers = {worker.index: worker for worker in snapshot.workers}
    fronts = {front.index: front for front in snapshot.fronts}
    for role in snapshot.roles:
        worker = workers.get(role.index) if role.role == "worker" else None
        told = {
            "role": role.role,
            "index": role.index,
            "pid": role.pid,
            "state": _role_state(role, worker),
            "restarts": role.restarts,
            "uptime_s": _age_s(role, snapshot.node.boottime_ms),
            "cpu": None if before is None else cpu_of(now, before, (role.role, role.index)),
            "rss_bytes": role.rss_bytes,
            "own_bytes": role.own_bytes,
        }
        if worker is not None:
            told |= {
                "connections": worker.connections,
                "loads_running": worker.loads_running,
                "loads_queued": worker.loads_queued,
                "fetches_in_flight": worker.fetches_in_flight,
                "getters_hung": worker.getters_hung,
            }
        elif role.role == "front" and role.index in fronts:
            front = fronts[role.index]
            told |= {"calls_in_flight": front.calls_in_flight, "peer_streams": front.peer_streams}
        elif role.role == "http" and snapshot.http is not None:
            told |= {
                "calls_in_flight": snapshot.http.in_flight,
                "connections": snapshot.http.connections,
            }
        yield told


def _role_state(role: RoleInfo, worker: WorkerInfo | None) -> str:
    if not role.pid:
        return "down"
    if not role.ready:
        return "starting"
    return "silent" if worker is not None and not worker.answered else "ready"


def _age_s(role: RoleInfo, now_ms: int) -> float | None:
    if not (role.pid and role.started_ms):
        return None
    return rounded(max(0, now_ms - role.started_ms) / 1000)


# -- the cluster ----------------------------------------------------------------------------------


def _ring(snapshot: NodeSnapshot, states: dict[str, str]) -> dict[str, Any] | None:
    if snapshot.membership is None:
        return None
    found = snapshot.membership

    def state(member: MemberInfo) -> str:
        return "own" if member.address == found.own else states.get(member.address, "unknown")

    members = sorted(
        found.members, key=lambda m: (_rank(state(m)) if m.address != found.own else -1, m.address)
    )
    shown = members[:STATUS_PEERS_MAX]
    return {
        "number": found.number,
        "own": found.own,
        "members": [
            {
                "address": member.address,
                "weight": member.weight,
                "share": rounded(member.share),
                "state": state(member),
            }
            for member in sorted(shown, key=lambda m: m.address)
        ],
        "more": len(members) - len(shown),
    }


def _peer(peer: PeerInfo, state: str, now: Mark, before: Mark | None) -> dict[str, Any]:
    total = now.peers[peer.address]
    came: PeerMark | None = None
    if before is not None:
        came = total.since(before.peers.get(peer.address, PeerMark()))
    return {
        "address": peer.address,
        "state": state,
        "links": peer.links,
        "usable": peer.usable,
        "down": peer.down,
        "breaker_failures": peer.breaker_failures,
        "calls": total.calls,
        "failures": total.failures,
        "connects": peer.connects,
        "in_flight": peer.in_flight,
        "invalidations_sent": peer.invalidations_sent,
        "invalidations_waiting": peer.invalidations_pending,
        "invalidation_lag_s": rounded(peer.invalidation_lag_s),
        "recent": _peer_rates(came, now, before),
    }


def _peer_rates(came: PeerMark | None, now: Mark, before: Mark | None) -> dict[str, Any] | None:
    if came is None or before is None:
        return None
    seconds = now.at_s - before.at_s
    return {
        "calls_s": rounded(came.calls / seconds),
        "failures_s": rounded(came.failures / seconds),
        "p50_ms": quantile_ms(came.seconds, 0.5),
        "p99_ms": quantile_ms(came.seconds, 0.99),
    }


# -- groups ---------------------------------------------------------------------------------------


def _group(group: GroupInfo, now: Mark, before: Mark | None) -> dict[str, Any]:
    total = now.groups[group.name]
    came = None if before is None else total.since(before.groups.get(group.name, GroupMark()))
    return {
        "name": group.name,
        "items": group.items,
        "live_bytes": group.live_bytes,
        "capacity_bytes": group.capacity_bytes,
        "mirror_bytes": sum(shard.mirror_bytes for shard in group.shards),
        "expired": sum(shard.expired for shard in group.shards),
        "sets": group.sets,
        "deletes": group.deletes,
        "loads_in_flight": group.loads_in_flight,
        "loads_queued": group.loads_queued,
        "fallback_loads": group.fallback_loads,
        "has_getter": bool(group.spec.get("has_getter")),
        "since_start": _counts(total),
        "recent": _rates(came, now, before),
    }


def _totals(snapshot: NodeSnapshot, now: Mark, before: Mark | None) -> dict[str, Any]:
    total = now.group_totals()
    came = None if before is None else total.since(before.group_totals())
    return {
        "items": sum(group.items for group in snapshot.groups),
        "live_bytes": sum(group.live_bytes for group in snapshot.groups),
        "capacity_bytes": sum(group.capacity_bytes for group in snapshot.groups),
        "since_start": _counts(total),
        "recent": _rates(came, now, before),
    }


def _counts(mark: GroupMark) -> dict[str, Any]:
    return {
        "gets": mark.gets,
        **mark.shares(),
        "loads": mark.loads,
        "load_errors": mark.load_errors,
        "fetches": mark.fetches,
        "fetch_errors": mark.fetch_errors,
        "evictions": mark.evictions,
        "load_p50_ms": quantile_ms(mark.seconds, 0.5),
        "load_p99_ms": quantile_ms(mark.seconds, 0.99),
    }


def _rates(came: GroupMark | None, now: Mark, before: Mark | None) -> dict[str, Any] | None:
    if came is None or before is None:
        return None
    seconds = now.at_s - before.at_s
    return {
        "gets_s": rounded(came.gets / seconds),
        **came.shares(),
        "loads_s": rounded(came.loads / seconds),
        "load_errors_s": rounded(came.load_errors / seconds),
        "fetches_s": rounded(came.fetches / seconds),
        "fetch_errors_s": rounded(came.fetch_errors / seconds),
        "evictions_s": rounded(came.evictions / seconds),
        "load_p50_ms": quantile_ms(came.seconds, 0.5),
        "load_p99_ms": quantile_ms(came.seconds, 0.99),
    }


# -- what is wrong --------------------------------------------------------------------------------


def _rank(state: str) -> int:
    return _TROUBLE.index(state) if state in _TROUBLE else len(_TROUBLE)


def _notes(
    snapshot: NodeSnapshot,
    state: str,
    roles: Iterable[dict[str, Any]],
    peers: Iterable[dict[str, Any]],
    groups: Iterable[dict[str, Any]],
) -> Iterator[dict[str, str]]:
    yield from _node_notes(snapshot, state)
    for role in roles:
        name = f"{role['role']} {role['index']}"
        if role["state"] == "down":
            yield _said("bad", f"{name} is down; the supervisor starts it again")
        elif role["state"] == "silent":
            yield _said("bad", f"{name} (pid {role['pid']}) does not answer")
        elif role["state"] == "starting" and state == "ready":
            yield _said("warn", f"{name} starts")
        if role.get("getters_hung"):
            yield _said("warn", f"{name}: {role['getters_hung']} calls of getters do not end")
    yield from _peer_notes(peers)
    for group in groups:
        recent = group["recent"] or {}
        errors_s, loads_s = recent.get("load_errors_s") or 0, recent.get("loads_s") or 0
        if errors_s > _FAILED_SHARE * loads_s:
            yield _said("warn", f"group {group['name']}: {errors_s:g} loads a second fail")
        if group["loads_queued"]:
            waiting = group["loads_queued"]
            yield _said("info", f"group {group['name']}: {waiting} loads wait for a getter thread")


def _node_notes(snapshot: NodeSnapshot, state: str) -> Iterator[dict[str, str]]:
    if state == "starting":
        ready = sum(role.ready for role in snapshot.roles)
        yield _said(
            "info", f"the node starts: {ready} of {len(snapshot.roles)} processes are ready"
        )
    elif state == "draining":
        yield _said("warn", "the node drains: it finishes what is under way, and ends")
    elif state == "stalled":
        yield _said(
            "bad",
            "the supervisor has not said for 2 s that the node serves; is it stopped or hung?",
        )
    if snapshot.node.reloads_refused:
        refused = snapshot.node.reloads_refused
        yield _said("info", f"{refused} reloads were refused since the start; the log says why")


def _peer_notes(peers: Iterable[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for peer in peers:
        name, state = f"peer {peer['address']}", peer["state"]
        if state == "down":
            yield _said("bad", f"{name} is down: its keys go to the next node")
        elif state == "partly down":
            yield _said("warn", f"{name} is down for {peer['down']} of {peer['links']} workers")
        elif state in ("draining", "returning"):
            what = "drains" if state == "draining" else "has come back, and is asked again soon"
            yield _said("info", f"{name} {what}")
        if peer["invalidations_waiting"] >= _WAITING_MANY and state == "usable":
            waiting = peer["invalidations_waiting"]
            yield _said("warn", f"{name}: {waiting} invalidations wait to be answered")
        recent = peer["recent"] or {}
        failed_s, calls_s = recent.get("failures_s") or 0, recent.get("calls_s") or 0
        if failed_s > _FAILED_SHARE * calls_s and state == "usable":
            yield _said("warn", f"{name}: {failed_s:g} calls a second fail")


def _said(level: Level, text: str) -> dict[str, str]:
    return {"level": level, "text": text}
