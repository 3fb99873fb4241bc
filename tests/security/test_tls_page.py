"""docs/tls.md: its commands make certificates with which nodes and clients work."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kamacache
from kamacache.rundir.live import SecurityFiles
from kamacache.security import tls
from kamacache.security.check import cautions, check_files
from tests.node_process import ROOT, NodeProcess

PAGE = (ROOT / "docs" / "tls.md").read_text()

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def block(kind: str, holding: str) -> str:
    """Return the page's block of code that holds these words."""
    found = [
        text for text in re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) if holding in text
    ]
    assert len(found) == 1, holding
    text: str = found[0]
    return text


def test_the_commands_make_certificates_that_work(short_dir: Path) -> None:
    # The addresses are this host's; all else is as the page has it.
    commands = block("sh", "openssl").replace("10.0.0.", "127.0.0.")
    subprocess.run(["sh", "-euc", commands], cwd=short_dir, check=True, capture_output=True)
    for number in (1, 2, 3):
        files = SecurityFiles(
            tls_cert=str(short_dir / f"cache-{number}.pem"),
            tls_key=str(short_dir / f"cache-{number}.key"),
            tls_ca=str(short_dir / "ca.pem"),
            tls_client_ca=str(short_dir / "ca.pem"),
        )
        check_files(files)
        assert cautions(files) == []
        for host in (f"127.0.0.{number}", f"cache-{number}.internal"):
            tls.check_peering(files, f"{host}:8001")
    assert sorted(path.name for path in short_dir.glob("*.key")) == [
        "ca.key", "cache-1.key", "cache-2.key", "cache-3.key", "web.key",
    ]  # fmt: skip
    start = block("sh", "kamacache-node --listen").replace("\\\n", " ").split()
    given = dict(zip(start[1::2], start[2::2], strict=False))
    listen = ("--listen", "127.0.0.1:0", "--workers", "1", "--warm-restart-max-downtime", "0")
    names = ("--tls-cert", "--tls-key", "--tls-ca", "--tls-client-ca")
    secure = [part for name in names for part in (name, str(short_dir / given[name]))]
    with NodeProcess(short_dir / "run", *listen, "--group", given["--group"], *secure) as node:
        address = node.await_ready()["listen"]
        call = re.search(r"Client\(\[.*?\], (.*)\)", block("python", "Client"))
        assert call
        files_of = dict(re.findall(r'(\w+)="([\w.]+)"', call[1]))
        access = {name: str(short_dir / file) for name, file in files_of.items()}
        with kamacache.Client([address], **access) as client:  # type: ignore[arg-type]
            client.set("scores", "Tom", b"630")
        command = block("sh", "kamacache get").splitlines()[0].split()
        said = subprocess.run(
            [sys.executable, "-m", "kamacache.cli.client", *command[1:-7], address, *command[-6:]],
            cwd=short_dir,
            env={"PYTHONPATH": str(ROOT)},
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert said.stdout == "630", (said.args, said.stderr)
        assert node.stop() == 0


def test_what_the_page_says_of_reasons_is_what_a_link_says() -> None:
    said = (ROOT / "kamacache" / "cluster" / "handshake.py").read_text()
    joined = re.sub(r'"\s*\n\s*"', "", said)
    rows = re.findall(r"^\| (it[ s].*?) \|", PAGE, re.MULTILINE)
    assert len(rows) == 6
    for begin in rows:
        assert begin in joined, begin
