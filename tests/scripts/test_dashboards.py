"""scripts/deploy: dashboard and alerts are whole, and name no metric that a node does not have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from kamacache.http.measures import MEASURES

DEPLOY: Final = Path(__file__).resolve().parents[2] / "scripts" / "deploy"
DASHBOARD: Final = DEPLOY / "grafana" / "kamacache.json"
PROMETHEUS: Final = DEPLOY / "prometheus"
VARIABLES: Final = {"$__rate_interval": "5m", "$instance": ".*", "$group": ".*"}
KNOWN: Final = {name for measure in MEASURES for name in measure.series}
LABELS: Final = {
    name: {*measure.labels, "instance", "job", "le"}
    for measure in MEASURES
    for name in measure.series
}
KINDS: Final = {"timeseries", "stat", "heatmap"}


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Return every query of the dashboard, with its variables filled in."""
    told = [target["expr"] for panel in panels() for target in panel["targets"]]
    told += [note["expr"] for note in dashboard()["annotations"]["list"]]
    for name, value in VARIABLES.items():
        told = [expression.replace(name, value) for expression in told]
    return told


def promtool(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed; .ci/run unpacks it from Debian's prometheus")
    return subprocess.run(
        [found, *args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\bkamacache_\w+", text))


def test_every_metric_of_the_dashboard_is_one_of_a_node() -> None:
    asked = set().union(*map(metrics_in, expressions()))
    assert len(asked) > 40
    assert asked <= KNOWN
    for variable in dashboard()["templating"]["list"][1:]:
        assert metrics_in(variable["definition"]) <= KNOWN


def test_every_metric_of_the_alerts_is_one_of_a_node() -> None:
    rules = (PROMETHEUS / "alerts.yml").read_text()
    asked = metrics_in(rules)
    assert len(asked) > 15
    assert asked <= KNOWN
    assert metrics_in((PROMETHEUS / "alerts_test.yml").read_text()) <= KNOWN


@pytest.mark.parametrize("source", ["dashboard", "alerts"])
def test_labels_are_those_of_their_metrics(source: str) -> None:
    text = "\n".join(expressions())
    if source == "alerts":
        text = (PROMETHEUS / "alerts.yml").read_text()
    selectors = re.findall(r"(kamacache_\w+)\{([^}]*)\}", text)
    assert selectors
    for name, matchers in selectors:
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert asked <= LABELS[name], f"{name}{{{matchers}}}"


def test_the_dashboard_is_whole() -> None:
    whole = dashboard()
    assert whole["uid"] == "kamacache"
    names = [variable["name"] for variable in whole["templating"]["list"]]
    assert names == ["datasource", "instance", "group"]
    assert all(variable["multi"] for variable in whole["templating"]["list"][1:])
    ids = [panel["id"] for panel in whole["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["type"] in KINDS
        assert panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "heatmap"
        refs = [target["refId"] for target in panel["targets"]]
        assert refs == sorted(set(refs))
        for target in panel["targets"]:
            assert "$instance" in target["expr"], panel["title"]


def test_no_two_panels_lie_on_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                other = taken.setdefault((x, y), panel["title"])
                assert other == panel["title"], f"{other!r} and {panel['title']!r}"


def test_every_query_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"dashboard:{number}", "expr": expression}
        for number, expression in enumerate(expressions())
    ]
    # JSON is YAML.
    (tmp_path / "rules.yml").write_text(
        json.dumps({"groups": [{"name": "dashboard", "rules": rules}]})
    )
    done = promtool("check", "rules", "rules.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_alerts_are_valid_and_fire_when_they_should() -> None:
    for args in (
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
        ("check", "config", "prometheus.yml"),
    ):
        done = promtool(*args, cwd=PROMETHEUS)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test() -> None:
    tests = (PROMETHEUS / "alerts_test.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", (PROMETHEUS / "alerts.yml").read_text())
    assert len(alerts) > 15
    assert [name for name in alerts if name not in tests] == []
    page = (PROMETHEUS.parents[2] / "docs/operations.md").read_text()
    assert [name for name in alerts if f"`{name}`" not in page] == []  # says what to do
