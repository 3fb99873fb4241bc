"""The five requests of Nacos' open API that discovery needs, each bounded in time and size.

*Process*: agent. Version 1 of the API, which Nacos 1 and 2 serve (nacos.io, "Open API Guide"): the
version 2 paths came with 2.2 and their guide has no beat. Parameters go into the query, as in the
guide's examples; name and password alone into a form. Beats are whole ones, with the ``beat``
document, so that a server that forgot the instance makes it anew.

*Invariant*: every failure leaves here as a `SourceError` that holds neither token nor password.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import httpx
import msgspec

from kamacache.cluster.discovery.retry import SourceError, to_the_end
from kamacache.cluster.membership import Member
from kamacache.limits import DISCOVERY_BYTES_MAX, DISCOVERY_TIMEOUT_S

INSTANCE: Final = "/nacos/v1/ns/instance"
_NOT_REGISTERED: Final = 20404  # of a beat's answer: NamingResponseCode.RESOURCE_NOT_FOUND
_TEXT_CHARS_MAX: Final = 120
_T = TypeVar("_T")

# httpx tells each request at INFO with its query, in which the token stands; httpcore at DEBUG
# what it sends and gets.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Service:
    """Where in Nacos the cluster stands; an empty namespace is the server's own default."""

    name: str
    group: str
    namespace: str

    def parameters(self) -> dict[str, str]:
        """Return what every request about the service carries."""
        found = {"serviceName": self.name, "groupName": self.group}
        return found | {"namespaceId": self.namespace} if self.namespace else found


class Instance(msgspec.Struct, frozen=True):
    """What a list says of one instance; the fields that matter here."""

    ip: str
    port: int
    weight: float = 1.0
    healthy: bool = True
    enabled: bool = True


class _Listed(msgspec.Struct):
    hosts: list[Instance]


class _Beaten(msgspec.Struct, rename="camel"):
    code: int = 10200
    client_beat_interval: float = 5000.0


class _LoggedIn(msgspec.Struct, rename="camel"):
    access_token: str
    token_ttl: float = 18_000.0


class NacosClient:
    """One connection to one server, for one instance of one service."""

    def __init__(
        self, server: str, service: Service, own: Member, login: tuple[str, str] | None
    ) -> None:
        self.server = server
        self._service = service
        self._login = login
        self._token = ""
        self._token_until_s = 0.0
        host, _, port = own.address.rpartition(":")
        self._own: dict[str, str] = {"ip": host.strip("[]"), "port": port, "ephemeral": "true"}
        self._weight = own.weight
        # No proxy and no .netrc from the environment: the token would go there.
        self._http = httpx.AsyncClient(
            base_url=f"http://{server}",
            timeout=httpx.Timeout(DISCOVERY_TIMEOUT_S),
            trust_env=False,
            limits=httpx.Limits(max_connections=4),
        )

    async def close(self) -> None:
        """End the connections."""
        await self._http.aclose()

    async def register(self) -> None:
        """Make this node an instance of the service."""
        weight = {"weight": str(float(self._weight)), "enabled": "true", "healthy": "true"}
        await self._ask("POST", INSTANCE, self._own | weight)

    async def deregister(self) -> None:
        """Take this node's instance away; one that is not there is no failure."""
        await self._ask("DELETE", INSTANCE, self._own)

    async def beat(self) -> float | None:
        """Say that this node lives; return after how many seconds to say it again.

        None: the server has no such instance, and wants it registered.
        """
        document = {
            "serviceName": f"{self._service.group}@@{self._service.name}",
            "ip": self._own["ip"],
            "port": int(self._own["port"]),
            "weight": float(self._weight),
            "ephemeral": True,
            "cluster": "DEFAULT",
            "scheduled": True,
            "metadata": {},
        }
        beat = {"beat": msgspec.json.encode(document).decode()}
        answer = await self._ask("PUT", f"{INSTANCE}/beat", self._own | beat)
        found = self._decoded("beat", answer, _Beaten)
        return None if found.code == _NOT_REGISTERED else found.client_beat_interval / 1000

    async def list(self) -> Sequence[Instance]:
        """Return the instances that the server holds for healthy."""
        answer = await self._ask("GET", f"{INSTANCE}/list", {"healthyOnly": "true"})
        found = self._decoded("list", answer, _Listed)
        return [host for host in found.hosts if host.healthy and host.enabled]

    async def _ask(self, method: str, path: str, parameters: Mapping[str, str]) -> bytes:
        query = {**self._service.parameters(), **parameters}
        if self._login is not None:
            query["accessToken"] = await self._access_token(*self._login)
        status, body = await self._send(method, path, params=query)
        if status in (401, 403):
            self._token = ""  # expired, or of a server that was restarted with another secret
        if status != 200:
            raise SourceError(f"{self.server} {method} {path}: {status} {_shown(body)}")
        return body

    async def _access_token(self, name: str, password: str) -> str:
        if not self._token or time.monotonic() >= self._token_until_s:
            form = {"username": name, "password": password}
            status, body = await self._send("POST", "/nacos/v1/auth/login", data=form)
            if status != 200:
                raise SourceError(f"{self.server} refuses the login: {status}")
            found = self._decoded("login", body, _LoggedIn)
            self._token = found.access_token
            self._token_until_s = time.monotonic() + found.token_ttl * 0.9
        return self._token

    async def _send(self, method: str, path: str, **parts: Any) -> tuple[int, bytes]:
        return await to_the_end(self._exchange(method, path, parts))

    async def _exchange(
        self, method: str, path: str, parts: Mapping[str, Any]
    ) -> tuple[int, bytes]:
        body = b""
        try:
            async with (
                asyncio.timeout(DISCOVERY_TIMEOUT_S + 0.5),
                self._http.stream(method, path, **parts) as answer,
            ):
                async for piece in answer.aiter_bytes():
                    body += piece
                    if len(body) > DISCOVERY_BYTES_MAX:
                        raise SourceError(f"{self.server} {path}: the answer is too large")
                return answer.status_code, body
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, TimeoutError) as error:
            why = type(error).__name__  # its text may hold the URL
            raise SourceError(f"{self.server} {method} {path}: {why}") from error

    def _decoded(self, what: str, body: bytes, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise SourceError(f"{self.server} {what}: no such answer: {error}") from error


def _shown(body: bytes) -> str:
    return " ".join(body[: 4 * _TEXT_CHARS_MAX].decode(errors="replace").split())[:_TEXT_CHARS_MAX]
