"""A stand-in for a Nacos 2 server: the naming part of its version 1 open API, over real HTTP.

Written from Nacos' "Open API Guide" and "Authentication" pages (nacos.io), for want of a server
that could run here: what those pages leave open is as in Nacos' own controllers (a beat with no
``beat`` document for an unknown instance answers code 20404; one with it registers the instance).
It is strict where a client could be wrong by habit: required parameters, the range of weights, the
token, the group in a service's name, namespaces apart. Times are Nacos' own (a beat every 5 s,
unhealthy after 15 s, removed after 30 s, tokens for 18,000 s) times ``scale``.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

BEAT_S, UNHEALTHY_S, REMOVED_S, TOKEN_S = 5.0, 15.0, 30.0, 18_000.0
INSTANCE = "/nacos/v1/ns/instance"
ServiceKey = tuple[str, str]  # namespace, GROUP@@NAME
InstanceKey = tuple[str, int, str]  # ip, port, cluster


@dataclass
class Instance:
    """What the server holds of one instance."""

    weight: float
    ephemeral: bool
    enabled: bool
    healthy: bool
    metadata: dict[str, str]
    beaten_s: float = field(default_factory=time.monotonic)


class Refused(Exception):
    """A request that the server refuses, with its status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeNacos:
    """One server; its state may be read and spoilt by tests."""

    def __init__(self, *, scale: float = 1.0, login: tuple[str, str] | None = None) -> None:
        self.scale = scale
        self.login = login
        self.services: dict[ServiceKey, dict[InstanceKey, Instance]] = {}
        self.tokens: dict[str, float] = {}
        self.broken: bytes | None = None  # an answer of status 200 that makes no sense
        self.status: int | None = None  # answered to everything
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.lock = threading.RLock()
        self._server: _Server | None = None
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._server = _Server(("127.0.0.1", self._port), self)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """End, connections included; what is registered is kept, as a pause would."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def forget(self) -> None:
        """Lose all ephemeral instances and all tokens, as a restart does."""
        with self.lock:
            self.services.clear()
            self.tokens.clear()

    def instances(self, service: str, namespace: str = "public") -> list[str]:
        """Return IP:PORT of what is registered, healthy or not."""
        with self.lock:
            self._expire()
            found = self.services.get((namespace, service), {})
            return sorted(f"{ip}:{port}" for ip, port, _ in found)

    def answer(self, method: str, path: str, given: dict[str, str]) -> Any:
        """Return the body of an answer. Raises `Refused`."""
        with self.lock:
            self.requests.append((method, path, dict(given)))
            if self.status is not None:
                raise Refused(self.status, "caused: told to fail;")
            if (method, path) == ("POST", "/nacos/v1/auth/login"):
                return self._log_in(given)
            if self.login is not None and time.monotonic() >= self.tokens.get(
                given.get("accessToken", ""), 0.0
            ):
                raise Refused(403, "token invalid!" if "accessToken" in given else "unknown user!")
            self._expire()
            routes = {
                ("POST", INSTANCE): self._register,
                ("DELETE", INSTANCE): self._deregister,
                ("PUT", f"{INSTANCE}/beat"): self._beat,
                ("GET", f"{INSTANCE}/list"): self._list,
            }
            if (method, path) not in routes:
                raise Refused(404, f"no such path: {method} {path}")
            return routes[method, path](given)

    # Naming.

    def _register(self, given: dict[str, str]) -> str:
        service, key = self._service(given), self._key(given)
        weight = float(given.get("weight", "1"))
        if not 0 <= weight <= 10_000:
            raise Refused(400, "caused: instance format invalid: the weights range is 0 ~ 10000;")
        self.services.setdefault(service, {})[key] = Instance(
            weight,
            ephemeral=_true(given.get("ephemeral", "true")),
            enabled=_true(given.get("enabled", "true")),
            healthy=_true(given.get("healthy", "true")),
            metadata={},
        )
        return "ok"

    def _deregister(self, given: dict[str, str]) -> str:
        service, key = self._service(given), self._key(given)
        found = self.services.get(service, {}).get(key)
        if found is not None and found.ephemeral == _true(given.get("ephemeral", "true")):
            del self.services[service][key]
        return "ok"

    def _beat(self, given: dict[str, str]) -> dict[str, Any]:
        service = self._service(given)
        instances = self.services.setdefault(service, {})
        answer: dict[str, Any] = {
            "clientBeatInterval": BEAT_S * 1000 * self.scale,
            "lightBeatEnabled": True,
        }
        document = json.loads(given["beat"]) if given.get("beat") else None
        if document is not None:
            if document.get("serviceName", service[1]) != service[1]:
                raise Refused(400, "caused: beat is of another service;")
            key = (document["ip"], int(document["port"]), document.get("cluster") or "DEFAULT")
        else:
            key = self._key(given)
        if key not in instances:
            if document is None:
                return answer | {"code": 20404}
            instances[key] = Instance(
                float(document.get("weight", 1)), document.get("ephemeral", True), True, True, {}
            )
        instances[key].beaten_s = time.monotonic()
        instances[key].healthy = True
        return answer | {"code": 10200}

    def _list(self, given: dict[str, str]) -> dict[str, Any]:
        service = self._service(given)
        clusters = set(filter(None, given.get("clusters", "").split(",")))
        hosts = [
            {
                "ip": ip,
                "port": port,
                "weight": found.weight,
                "healthy": found.healthy,
                "valid": found.healthy,
                "marked": False,
                "enabled": found.enabled,
                "ephemeral": found.ephemeral,
                "clusterName": cluster,
                "serviceName": service[1],
                "instanceId": f"{ip}#{port}#{cluster}#{service[1]}",
                "metadata": found.metadata,
            }
            for (ip, port, cluster), found in self.services.get(service, {}).items()
            if found.enabled
            and (found.healthy or not _true(given.get("healthyOnly", "false")))
            and (not clusters or cluster in clusters)
        ]
        return {
            "name": service[1],
            "groupName": service[1].partition("@@")[0],
            "clusters": ",".join(sorted(clusters)),
            "cacheMillis": 10_000,
            "hosts": hosts,
            "lastRefTime": int(time.time() * 1000),
            "checksum": "",
            "allIPs": False,
            "reachProtectionThreshold": False,
            "valid": True,
        }

    def _expire(self) -> None:
        now_s = time.monotonic()
        for instances in self.services.values():
            for key, found in list(instances.items()):
                if found.ephemeral and now_s - found.beaten_s >= REMOVED_S * self.scale:
                    del instances[key]
                elif found.ephemeral and now_s - found.beaten_s >= UNHEALTHY_S * self.scale:
                    found.healthy = False

    # Authentication.

    def _log_in(self, given: dict[str, str]) -> dict[str, Any]:
        if self.login is None or (given.get("username"), given.get("password")) != self.login:
            raise Refused(403, "unknown user!")
        token = secrets.token_hex(16)
        self.tokens[token] = time.monotonic() + TOKEN_S * self.scale
        return {
            "accessToken": token,
            "tokenTtl": TOKEN_S * self.scale,
            "globalAdmin": True,
            "username": self.login[0],
        }

    # Parameters.

    def _service(self, given: dict[str, str]) -> ServiceKey:
        name = _required(given, "serviceName")
        if "@@" not in name:
            name = f"{given.get('groupName') or 'DEFAULT_GROUP'}@@{name}"
        return given.get("namespaceId") or "public", name

    def _key(self, given: dict[str, str]) -> InstanceKey:
        port = _required(given, "port")
        if not (port.isdecimal() and 0 <= int(port) <= 65_535):
            raise Refused(400, f'caused: For input string: "{port}";')
        return _required(given, "ip"), int(port), given.get("clusterName") or "DEFAULT"


def _required(given: dict[str, str], name: str) -> str:
    if not given.get(name):
        raise Refused(400, f"caused: Param '{name}' is required.;")
    return given[name]


def _true(text: str) -> bool:
    return text.lower() in ("true", "yes", "on", "t", "y")  # BooleanUtils.toBoolean


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], nacos: FakeNacos) -> None:
        self.nacos = nacos
        self._open: set[Any] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        super().server_close()
        for request in list(self._open):  # those that clients keep alive, too
            self.shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients end connections, and `server_close` does."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _serve(self) -> None:
        url = urlsplit(self.path)
        given = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.headers.get("Content-Type", "")
        if self.command == "POST" and kind.startswith("application/x-www-form-urlencoded"):
            given |= parse_qsl(body.decode(), keep_blank_values=True)
        status = 200
        try:
            answer = self.server.nacos.answer(self.command, url.path, given)
        except Refused as refused:
            status, answer = refused.status, str(refused)
        except (ValueError, KeyError, TypeError) as error:
            status, answer = 500, f"caused: {error};"
        text = answer if isinstance(answer, str) else json.dumps(answer)
        data = text.encode()
        if status == 200 and self.server.nacos.broken is not None:
            data = self.server.nacos.broken
        self.send_response(status)
        self.send_header(
            "Content-Type", "text/html" if isinstance(answer, str) else "application/json"
        )
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Say nothing."""
