"""The files under scripts/deploy as tests see them: the image's start command, YAML documents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from tests.node_process import ROOT

DEPLOY: Final = ROOT / "scripts/deploy"
DOCKERFILE: Final = DEPLOY / "docker/Dockerfile"
COMPOSE: Final = DEPLOY / "docker/docker-compose.yml"
KUBERNETES: Final = DEPLOY / "kubernetes"
HEALTHCHECK: Final = DEPLOY / "docker/healthcheck.py"


def instructions(path: Path = DOCKERFILE) -> list[tuple[str, str]]:
    """Return the instructions of the image's last stage, and COPY and RUN of all."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in found]


def last(name: str) -> str:
    """Return what the Dockerfile says last by an instruction."""
    return [rest for found, rest in instructions() if found == name][-1]


def entrypoint() -> list[str]:
    """Return the image's start command; it must be in exec form."""
    command: list[str] = json.loads(last("ENTRYPOINT"))
    return command


def image_environment() -> dict[str, str]:
    """Return the node's variables of the image."""
    return dict(re.findall(r"(KAMACACHE_\w+)=(\S+)", last("ENV")))


def documents(yaml: Any, *paths: Path) -> list[dict[str, Any]]:
    """Return all YAML documents of these files; ``yaml`` is the module."""
    return [found for path in paths for found in yaml.safe_load_all(path.read_text()) if found]


def manifests(yaml: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what the folder kubernetes/ declares, by kind and name."""
    every = documents(yaml, *sorted(KUBERNETES.rglob("*.yaml")))
    return {(one["kind"], one["metadata"]["name"]): one for one in every}
