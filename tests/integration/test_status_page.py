"""The status page of real nodes, and of nodes in every state, read in a headless Chromium."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from kamacache.local.snapshot import NodeSnapshot
from tests.attached_estate import Estate
from tests.cluster_nodes import Cluster
from tests.http.status_documents import StatusServer, watched
from tests.node_process import NodeProcess

pytestmark = pytest.mark.integration

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
DEADLINE_S = 20.0
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"

if CHROMIUM is None or DRIVER is None:
    pytest.skip("there is no chromium with its chromedriver", allow_module_level=True)


class Browser:
    """One Chromium for the tests of this module."""

    def __init__(self, profile: str) -> None:
        options = Options()
        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        for flag in (*flags, "--no-proxy-server", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        assert CHROMIUM is not None
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, url: str, width: int = 1280, height: int = 900) -> None:
        """Show a page at a size; what was logged before is forgotten."""
        self.driver.get("about:blank")
        self.complaints()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.scheme("light")
        self.driver.get(url)

    def scheme(self, name: str) -> None:
        """Prefer light or dark colours."""
        media = {"features": [{"name": "prefers-color-scheme", "value": name}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def run(self, script: str, *values: Any) -> Any:
        """Return what a script returns."""
        return self.driver.execute_script(script, *values)

    def text(self, selector: str) -> str:
        """Return the text of an element as it is seen."""
        return self.driver.find_element(By.CSS_SELECTOR, selector).text

    def row(self, table: str, key: str) -> str:
        """Return the text of a table's row; empty: there is none."""
        for row in self.driver.find_elements(By.CSS_SELECTOR, f"#{table} tbody tr"):
            if row.get_attribute("data-key") == key:
                return row.text
        return ""

    def until(self, seen: Callable[[], object], why: Callable[[], object] = lambda: "") -> None:
        """Wait until something is seen."""
        end_s = time.monotonic() + DEADLINE_S
        while True:
            try:
                if seen():
                    return
            except StaleElementReferenceException:
                continue
            assert time.monotonic() < end_s, f"not seen: {why()}\n{self.text('body')}"
            time.sleep(0.05)

    def until_live(self) -> None:
        """Wait for the first answer to be shown."""
        self.until(lambda: self.text("#link-text") == "live")

    def complaints(self) -> list[str]:
        """Return what the console has, warnings and refusals by the policy included."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    profile = tempfile.mkdtemp(prefix="kc-", dir="/tmp")
    found = Browser(profile)
    yield found
    found.driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture(scope="module")
def node(environment: None) -> Iterator[NodeProcess]:
    folder = Path(tempfile.mkdtemp(prefix="kc-", dir="/tmp"))
    with Estate(folder).node(
        *("--api", "127.0.0.1:0", "--warm-restart-max-downtime", "0")
    ) as found:
        found.await_ready()
        yield found
        if found.process.poll() is None:
            found.stop()
    shutil.rmtree(folder, ignore_errors=True)


def url_of(node: NodeProcess) -> str:
    return f"http://{node.description().api}/"


def get_often(node: NodeProcess, count: int) -> None:
    """Read keys over one connection; each is loaded once."""
    connection = http.client.HTTPConnection(str(node.description().api), timeout=10)
    for number in range(count):
        connection.request("GET", f"/api?group=scores&key=often-{number % 5}")
        assert connection.getresponse().read()
    connection.close()


def test_the_page_shows_every_process_and_group_without_a_complaint(
    node: NodeProcess, browser: Browser
) -> None:
    browser.open(url_of(node))
    browser.until_live()
    assert browser.text("#state") == "ready"
    assert browser.text("#notes") == "Nothing needs attention."
    for role in ("supervisor 0", "worker 0", "worker 1", "http 0"):
        assert "ready" in browser.row("roles", role)
    assert "2 MiB" in browser.row("groups", "scores")
    assert "A single node" in browser.text("#peers")
    assert "owns every key" in browser.text("#ring")
    assert browser.complaints() == []


def test_traffic_moves_hit_ratio_and_charts(node: NodeProcess, browser: Browser) -> None:
    browser.open(url_of(node))
    browser.until_live()

    def gets() -> int:
        return int(
            browser.run("return groups.rows.find(r => r.name === 'scores').since_start.gets")
        )

    before = gets()
    get_often(node, 300)

    browser.until(lambda: gets() >= before + 300, gets)  # told though nobody asks any more
    browser.until(lambda: "%" in browser.row("groups", "scores"))
    # A point with gets: the layers are drawn, and stand there again after a reload of the page.
    layers = "return document.querySelectorAll('#charts path.f-memory').length"
    browser.until(lambda: browser.run(layers))
    browser.driver.refresh()
    browser.until(lambda: browser.run(layers))
    assert browser.complaints() == []


def test_a_killed_worker_is_shown_and_its_return(node: NodeProcess, browser: Browser) -> None:
    browser.open(url_of(node))
    browser.until_live()
    worker = node.role("worker 1")
    assert worker is not None
    os.kill(node.pid, signal.SIGSTOP)  # nobody starts it again for now
    try:
        os.kill(worker.pid, signal.SIGKILL)
        browser.until(lambda: "does not answer" in browser.row("roles", "worker 1"))
        browser.until(
            lambda: f"worker 1 (pid {worker.pid}) does not answer" in browser.text("#notes")
        )
        browser.until(lambda: browser.text("#state") == "not serving")
    finally:
        os.kill(node.pid, signal.SIGCONT)

    def back() -> bool:
        role = browser.run("return roles.rows.find(r => r.role === 'worker' && r.index === 1)")
        return bool(
            role["state"] == "ready" and role["restarts"] == 1 and role["pid"] != worker.pid
        )

    browser.until(back, lambda: browser.row("roles", "worker 1"))
    browser.until(lambda: browser.text("#state") == "ready")
    browser.until(lambda: browser.text("#notes") == "Nothing needs attention.")
    told = browser.text("#changes")
    assert f"worker 1 died; it was pid {worker.pid}" in told
    assert "worker 1 runs again" in told


def test_a_node_that_ends_is_told_as_a_lost_connection(node: NodeProcess, browser: Browser) -> None:
    browser.open(url_of(node))
    browser.until_live()
    assert node.stop() == 0
    browser.until(lambda: browser.text("#link-text").startswith("connection lost since"))
    assert "Connection lost since" in browser.text("#lost")
    assert browser.run("return document.title").startswith("lost: ")
    assert browser.row("groups", "scores")  # what was known last still stands there


def test_a_cluster_shows_its_ring_and_a_dead_peer(
    make_cluster: Callable[..., Cluster], browser: Browser
) -> None:
    made = make_cluster(3, workers=1, arguments=("--api", "127.0.0.1:0"))
    with made as cluster:
        cluster.start()
        first, _, third = cluster.nodes
        assert first.process is not None
        browser.open(url_of(first.process))
        browser.until_live()
        browser.until(lambda: "usable" in browser.row("peers", third.address))
        arcs = "return document.querySelectorAll('#ring [data-address]').length"
        assert browser.run(arcs) == 3
        assert "3 members" in browser.text("#ring-hint")
        third.kill()
        browser.until(lambda: "down" in browser.row("peers", third.address))
        browser.until(lambda: f"peer {third.address} is down" in browser.text("#notes"))
        assert browser.run("return document.querySelectorAll('#ring .bad').length") >= 1
        assert browser.complaints() == []


# -- states that are made up ----------------------------------------------------------------------


def overflow(browser: Browser) -> int:
    """Return by how much the page is wider than the window."""
    return int(browser.run("return document.documentElement.scrollWidth - window.innerWidth"))


def test_a_phone_has_no_horizontal_scrolling(browser: Browser) -> None:
    shown = watched(seconds=4, members=24, groups=40, workers=8)
    shown["groups"][0]["name"] = "g" * 63
    shown["peers"][0]["address"] = "cache-with-a-very-long-name." * 8 + "internal:8001"
    shown["node"]["name"] = "cache-with-a-very-long-name." * 8 + "internal:8001"
    with StatusServer(shown) as server:
        browser.open(server.url, width=360, height=740)
        browser.until_live()
        assert overflow(browser) <= 0
        for button in browser.driver.find_elements(By.CSS_SELECTOR, "button.more"):
            browser.run("arguments[0].click()", button)
        assert overflow(browser) <= 0
        assert len(browser.driver.find_elements(By.CSS_SELECTOR, "#groups tbody tr")) == 40


def test_dark_mode_changes_colours_and_both_can_be_read(browser: Browser) -> None:
    with StatusServer(watched(seconds=4)) as server:
        browser.open(server.url)
        browser.until_live()
        grounds = {}
        for scheme in ("light", "dark"):
            browser.scheme(scheme)
            grounds[scheme] = browser.run("return getComputedStyle(document.body).backgroundColor")
            assert browser.run(CONTRAST) == []
        assert grounds["light"] != grounds["dark"]


def test_names_are_text_whatever_they_say(browser: Browser) -> None:
    shown = watched(seconds=4)
    shown["node"]["name"] = shown["node"]["version"] = HOSTILE
    shown["groups"][0]["name"] = shown["peers"][0]["address"] = HOSTILE
    shown["ring"]["members"][1]["address"] = shown["roles"][1]["role"] = HOSTILE
    shown["peers"][0]["state"] = shown["ring"]["members"][1]["state"] = HOSTILE
    shown["notes"] = [{"level": HOSTILE, "text": HOSTILE}]
    shown["changes"] = [{"unix_ms": shown["unix_ms"], "level": "bad", "text": HOSTILE}]
    with StatusServer(shown) as server:
        browser.open(server.url)
        browser.until_live()
        assert browser.text("#name") == HOSTILE
        assert HOSTILE in browser.text("#groups")
        assert browser.text("#notes") == HOSTILE
        assert browser.run("return document.querySelectorAll('main script, img').length") == 0
        assert browser.run("return document.title").startswith(HOSTILE)  # it is text there, too
        assert browser.complaints() == []


def test_many_members_and_groups_are_kept_short_and_found(browser: Browser) -> None:
    with StatusServer(watched(seconds=2, members=100, groups=100)) as server:
        browser.open(server.url)
        browser.until_live()
        rows = "return document.querySelectorAll('#groups tbody tr').length"
        assert browser.run("return document.querySelectorAll('#ring [data-address]').length") == 100
        assert browser.run(rows) == 16
        browser.driver.find_element(By.CSS_SELECTOR, "#groups input").send_keys("group-05")
        assert browser.run(rows) == 10
        header = "#groups th:nth-child(2)"
        browser.driver.find_element(By.CSS_SELECTOR, f"{header} button").click()
        sort = browser.driver.find_element(By.CSS_SELECTOR, header).get_attribute("aria-sort")
        assert sort == "descending"


def test_a_node_without_data_says_so(browser: Browser) -> None:
    with StatusServer(watched(seconds=0, members=0, groups=0, state="starting")) as server:
        browser.open(server.url)
        browser.until_live()
        assert browser.text("#state") == "starting"
        assert "the node starts" in browser.text("#notes")
        assert "no data yet" in browser.text("#charts")
        assert "This node has no groups." in browser.text("#groups")


def test_a_lost_connection_comes_back_and_the_reason_is_told(browser: Browser) -> None:
    with StatusServer(None) as server:
        browser.open(server.url)
        browser.until(lambda: "the node is away" in browser.text("#lost"))
        server.shown = watched(_drain, seconds=4)
        browser.until_live()
        assert not browser.driver.find_element(By.ID, "lost").is_displayed()
        assert browser.text("#state") == "draining"
        assert "connection is back" in browser.run(SAID) or "drains" in browser.run(SAID)


def test_a_hidden_page_asks_nothing(browser: Browser) -> None:
    with StatusServer(watched(seconds=4)) as server:
        browser.open(server.url)
        browser.until_live()
        page = browser.driver.current_window_handle
        browser.driver.switch_to.new_window("tab")
        other = browser.driver.current_window_handle
        try:
            time.sleep(0.3)  # what was on its way
            asked = server.asked
            time.sleep(1.5)
            assert server.asked == asked
        finally:
            browser.driver.switch_to.window(other)
            browser.driver.close()
            browser.driver.switch_to.window(page)
        browser.until(lambda: server.asked > asked)


def test_the_keyboard_reaches_ring_and_charts(browser: Browser) -> None:
    with StatusServer(watched(seconds=60)) as server:
        browser.open(server.url)
        browser.until_live()
        browser.run("document.querySelector('#ring svg').focus()")
        keys = browser.driver.switch_to.active_element
        keys.send_keys("\ue014\ue014")  # twice to the right
        assert "10.20.0.2:8001" in browser.text("#ring-told")
        browser.run("document.querySelector('#charts svg').focus()")
        browser.driver.switch_to.active_element.send_keys("\ue012")
        label = "return document.querySelector('#charts svg').getAttribute('aria-label')"
        assert "near cache 71.0 %" in browser.run(label)
        assert browser.run(SAID).startswith("Hit ratio by layer")


def _drain(shot: NodeSnapshot) -> None:
    shot.node.state = "stopping"


SAID = "return document.getElementById('said').textContent"

# Every text against the nearest ground behind it, by WCAG 2: those below 4.5 : 1.
CONTRAST = """
const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [...n, 1].slice(0, 4); };
const found = [];
for (const node of document.querySelectorAll('body *')) {
  const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !node.getClientRects().length || node.closest('style, script')) continue;
  const style = getComputedStyle(node);
  const ink = node instanceof SVGElement ? style.fill : style.color;
  let behind = node;
  while (behind && rgba(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  if (!behind) continue;
  const levels = [light(rgba(ink)), light(rgba(getComputedStyle(behind).backgroundColor))].sort((a, b) => b - a);
  const ratio = (levels[0] + 0.05) / (levels[1] + 0.05);
  if (ratio < 4.5) found.push(node.tagName + ' ' + node.className + ' ' + ratio.toFixed(2));
}
return found;
"""  # noqa: E501
