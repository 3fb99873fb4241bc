"""Answers in parts: what a `Values` left out is asked for again, and joined.

*Process*: every one that asks for many keys. *Invariant*: one key at least is answered each time,
so that who asks again comes to an end.
"""

from __future__ import annotations

from kamacache.wire.messages import GetMany, KeyFailure, Reply, Request, Value, Values


def rest_of(request: Request, reply: Reply) -> GetMany | None:
    """Return the request for the keys that a `Values` left out, None when it is whole."""
    if type(reply) is not Values or type(request) is not GetMany:
        return None
    answered = len(reply.values)
    if answered >= len(request.keys):
        return None
    return GetMany(
        group=request.group,
        depth=request.depth,
        chain=request.chain,
        flags=request.flags,
        keys=request.keys[answered:],
    )


def append(whole: Values, part: Reply) -> None:
    """Put the answer to `rest_of` behind what is there."""
    answered = len(whole.values)
    if type(part) is Values:
        whole.values += part.values
        whole.errors = whole.errors + [
            KeyFailure(failed.index + answered, failed.kind, failed.message, failed.fields)
            for failed in part.errors
        ]
        ttls, versions = part.ttls, part.versions
    elif type(part) is Value:  # one too large for a frame of several answers as a single one
        whole.values.append(part.value)
        ttls, versions = [part.ttl_ms], [part.version]
    else:
        whole.values.append(None)
        ttls, versions = [0], [0]
    if len(whole.ttls) == len(whole.versions) == answered:  # told to a peer
        whole.ttls = whole.ttls + ttls
        whole.versions = whole.versions + versions
