"""scripts/deploy: linted, and a node that the node's own reader of settings accepts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from kamacache.cli.node import command
from kamacache.limits import DRAIN_TIMEOUT_S
from kamacache.node.group_options import merge_groups
from kamacache.node.settings import NodeSettings, from_layers, read_file
from kamacache.node.stopping import DRAIN_MARGIN_S
from kamacache.security.tokens import Tokens
from kamacache.store import required_bytes
from tests import deploy_files
from tests.deploy_files import COMPOSE, DEPLOY, DOCKERFILE, HEALTHCHECK, KUBERNETES
from tests.node_process import ROOT

DRAIN_S = DRAIN_TIMEOUT_S + DRAIN_MARGIN_S + 1.0
UNITS = {"m": 1 << 20, "g": 1 << 30, "Mi": 1 << 20, "Gi": 1 << 30}


def tool(name: str) -> str:
    """Return a linter of the dev extra; skips where it is not installed."""
    here = Path(sys.executable).with_name(name)
    found = str(here) if here.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'kamacache[dev]'")
    return found


def said(*run: str) -> tuple[int, str]:
    done = subprocess.run(run, capture_output=True, text=True, timeout=60, check=False, cwd=DEPLOY)
    return done.returncode, done.stdout + done.stderr


def node(
    arguments: Sequence[str], environment: Mapping[str, str], file: Path | None = None
) -> NodeSettings:
    """Return what the image's command makes of these; raises where it would refuse."""
    [program] = deploy_files.entrypoint()
    flags = dict(command.make_context(program, list(arguments)).params)
    path = flags.pop("config", None)
    assert (path is None) == (file is None)
    variables = {**deploy_files.image_environment(), **environment}
    return from_layers(flags, variables, read_file(file) if file else {})


def size(text: str) -> int:
    number, unit = re.fullmatch(r"([0-9]+)([A-Za-z]+)", text).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


def shard_bytes(settings: NodeSettings) -> int:
    return sum(required_bytes(spec, settings.workers) for spec in merge_groups([], settings.groups))


@pytest.fixture(scope="module")
def yaml() -> Any:
    return pytest.importorskip("yaml", reason="PyYAML is not installed")


@pytest.fixture(scope="module")
def manifests(yaml: Any) -> dict[tuple[str, str], dict[str, Any]]:
    return deploy_files.manifests(yaml)


@pytest.fixture(scope="module")
def pod(manifests: dict[tuple[str, str], dict[str, Any]]) -> Any:
    return manifests["StatefulSet", "kamacache"]["spec"]["template"]["spec"]


# ---------------------------------------------------------------------------- linters


def test_hadolint_finds_nothing() -> None:
    assert said(tool("hadolint"), str(DOCKERFILE)) == (0, "")


def test_yamllint_finds_nothing() -> None:
    assert said(tool("yamllint"), "--strict", "docker", "kubernetes") == (0, "")


def test_the_manifests_are_what_kubernetes_takes() -> None:
    files = [str(path) for path in sorted(KUBERNETES.rglob("*.yaml"))]
    assert len(files) > 4
    assert said(tool("kubernetes-validate"), "--strict", "--quiet", *files) == (0, "")


def test_the_compose_file_is_what_the_specification_takes() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    found = compose_spec.PyOptions(apply_merge=True).from_yaml(COMPOSE.read_text())
    found.validate()
    assert set(found.service_names()) == {"node-1", "node-2", "node-3", "prometheus"}


# ---------------------------------------------------------------------------- the image


def test_the_image_alone_is_a_node_that_nobody_else_reaches() -> None:
    settings = node((), {"KAMACACHE_GROUP": "scores:1MiB"})
    assert str(settings.listen) == "127.0.0.1:8001"
    assert settings.run_dir == Path("/run/kamacache/node")


def test_the_image_has_all_that_it_is_made_of() -> None:
    ignore = DOCKERFILE.with_name(f"{DOCKERFILE.name}.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied: set[str] = set()
    for name, rest in deploy_files.instructions():
        if name == "COPY" and not rest.startswith("--from="):
            copied.update(Path(source).as_posix() for source in rest.split()[:-1])
    assert copied == allowed
    assert all((ROOT / source).exists() for source in copied)


def test_the_image_runs_as_the_user_that_the_pod_names(pod: Any) -> None:
    uid, _, gid = deploy_files.last("USER").partition(":")
    about = pod["securityContext"]
    assert (about["runAsUser"], about["runAsGroup"], about["fsGroup"]) == (
        int(uid),
        int(gid),
        10001,
    )


def test_the_healthcheck_of_no_node_says_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(HEALTHCHECK), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert str(tmp_path) in done.stdout
    assert done.stderr == ""


# ---------------------------------------------------------------------------- compose


@pytest.mark.parametrize("name", ["node-1", "node-2", "node-3"])
def test_each_compose_service_is_a_node_of_the_cluster(yaml: Any, name: str) -> None:
    service = yaml.safe_load(COMPOSE.read_text())["services"][name]
    settings = node((), service["environment"])
    assert settings.place.name == f"{name}:8001"
    assert {peer.address for peer in settings.place.peers} == {
        f"node-{number}:8001" for number in (1, 2, 3)
    }
    assert size(service["shm_size"]) > 1.1 * shard_bytes(settings)
    assert int(service["stop_grace_period"].rstrip("s")) > DRAIN_S
    run_dir = str(settings.run_dir.parent)
    assert any(mount.startswith(f"{run_dir}:") for mount in service["tmpfs"])
    assert service["ports"][1].endswith(f":{settings.api.port}")  # type: ignore[union-attr]
    assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])


def test_the_files_that_compose_mounts_are_there(yaml: Any) -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            assert (COMPOSE.parent / volume.partition(":")[0]).exists(), volume
    build = services["node-1"]["build"]
    assert (COMPOSE.parent / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DOCKERFILE


def test_prometheus_of_compose_asks_its_nodes_and_has_the_alerts(yaml: Any) -> None:
    [ours] = deploy_files.documents(yaml, COMPOSE.with_name("prometheus.yml"))
    [everywhere] = deploy_files.documents(yaml, DEPLOY / "prometheus/prometheus.yml")
    assert ours["rule_files"] == everywhere["rule_files"]
    [job], [known] = ours["scrape_configs"], everywhere["scrape_configs"]
    assert job["job_name"] == known["job_name"]  # by which the alerts know it
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    asked = {
        f"{name}:{service['environment']['KAMACACHE_API'].rpartition(':')[2]}"
        for name, service in services.items()
        if name.startswith("node-")
    }
    assert set(job["static_configs"][0]["targets"]) == asked
    assert set(services["prometheus"]["depends_on"]) == {name.partition(":")[0] for name in asked}


# ---------------------------------------------------------------------------- kubernetes


def test_the_pod_is_a_node_that_the_service_leads_to(
    manifests: dict[tuple[str, str], dict[str, Any]], pod: Any, tmp_path: Path
) -> None:
    [container] = pod["containers"]
    # The files of the Secret, as the kubelet writes them.
    secret = manifests["Secret", "kamacache"]["stringData"]
    for name, text in secret.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o440)
    text = manifests["ConfigMap", "kamacache"]["data"]["node.toml"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    config = tmp_path / "node.toml"
    config.write_text(text.replace(mounts["secret"], str(tmp_path)))
    assert container["args"][1] == f"{mounts['config']}/node.toml"

    values = {"POD_NAME": "kamacache-0", "POD_NAMESPACE": "default"}
    environment = {
        entry["name"]: re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], entry["value"])
        for entry in container["env"]
        if "value" in entry
    }
    settings = node(container["args"], environment, config)
    service = manifests["Service", "kamacache"]["spec"]
    stateful = manifests["StatefulSet", "kamacache"]["spec"]
    assert stateful["serviceName"] == "kamacache"
    assert service["clusterIP"] == "None"
    assert settings.place.name == "kamacache-0.kamacache.default.svc.cluster.local:8001"
    assert settings.place.discover == "dns:_grpc._tcp.kamacache.default.svc.cluster.local."
    ports = {port["name"]: port["port"] for port in service["ports"]}
    assert ports["grpc"] == settings.listen.port  # type: ignore[union-attr]
    assert ports["http"] == settings.api.port  # type: ignore[union-attr]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == ports

    assert mounts["run"] == str(settings.run_dir.parent)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    shm = size(volumes["shm"]["emptyDir"]["sizeLimit"])
    assert (mounts["shm"], volumes["shm"]["emptyDir"]["medium"]) == ("/dev/shm", "Memory")
    assert shm > 1.1 * shard_bytes(settings)
    assert size(container["resources"]["limits"]["memory"]) > shm + 25 * (1 << 20) * (
        settings.workers + settings.fronts + 3
    )
    probes = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    assert [probe["path"] for probe in probes] == ["/readyz", "/readyz", "/healthz"]
    waits_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > waits_s + DRAIN_S


def test_the_example_of_tokens_is_one(
    manifests: dict[tuple[str, str], dict[str, Any]], tmp_path: Path
) -> None:
    text = manifests["Secret", "kamacache"]["stringData"]["tokens.toml"]
    told = {token["name"]: token for token in tomllib.loads(text)["token"]}
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    path.chmod(0o600)
    tokens = Tokens.load(str(path))
    web = tokens.find(told["web"]["secret"])
    assert web is not None
    assert web.may_write("scores")
    prometheus = tokens.find(told["prometheus"]["secret"])
    assert prometheus is not None
    assert prometheus.stats
    assert not prometheus.may_read("scores")


def test_all_selectors_mean_the_pods(manifests: dict[tuple[str, str], dict[str, Any]]) -> None:
    stateful = manifests["StatefulSet", "kamacache"]["spec"]
    labels = stateful["template"]["metadata"]["labels"]
    assert stateful["selector"]["matchLabels"] == labels
    for name in ("kamacache", "kamacache-http"):
        assert manifests["Service", name]["spec"]["selector"] == labels
    budget = manifests["PodDisruptionBudget", "kamacache"]["spec"]
    assert budget["selector"]["matchLabels"] == labels
