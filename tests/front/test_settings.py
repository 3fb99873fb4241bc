"""`kamacache.front.settings`: what is refused, and what reaches grpc."""

from __future__ import annotations

import os

import pytest

from kamacache.cluster.environment import set_grpc_environment
from kamacache.errors import ConfigError
from kamacache.front.settings import FrontSettings


@pytest.mark.parametrize(
    "listen", ["", "8001", ":8001", "localhost", "localhost:http", "h:65536", "h:-1", "h:\u0661"]
)
def test_a_bad_listen_address_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        FrontSettings(listen=listen)


@pytest.mark.parametrize("setting", ["message_bytes_max", "calls_max", "batch_keys_max"])
def test_a_bound_of_nothing_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        FrontSettings(listen="[::1]:0", **{setting: 0})


def test_the_users_grpc_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_EXPERIMENTS", "mine")
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    set_grpc_environment()
    assert os.environ["GRPC_EXPERIMENTS"] == "mine"
    assert os.environ["GRPC_VERBOSITY"] == "ERROR"
