"""Names of nodes, and the numbered list of them."""

from __future__ import annotations

import pytest

from kamacache.cluster.membership import Member, check_address
from kamacache.errors import ConfigError
from kamacache.limits import WEIGHT_MAX


@pytest.mark.parametrize(
    ("text", "address", "weight"),
    [
        ("127.0.0.1:8001", "127.0.0.1:8001", 1),
        (" 10.0.0.1:65535=3 ", "10.0.0.1:65535", 3),
        ("Cache-1.Internal:08001", "cache-1.internal:8001", 1),
        ("localhost:1", "localhost:1", 1),
        ("my_service:1=64", "my_service:1", 64),
        ("[FD00:0:0::1]:8001=2", "[fd00::1]:8001", 2),
    ],
)
def test_address_has_one_spelling_and_a_weight(text: str, address: str, weight: int) -> None:
    assert check_address(text, "peers") == Member(address, weight)


@pytest.mark.parametrize(
    "text",
    ["", "8001", ":8001", "a:", "a:b", "a:0", "a:65536", "a:-1", "a:1:2", "::1:8001", "[::1:8001",
     "[fe80::1%eth0]:1", "10.0.0.256:1", "127.1:1", "a b:1", "http://a:1", "a:1=", "a:1=x",
     "a:1=0", f"a:1={WEIGHT_MAX + 1}", "a:1=1.5", "a:1=-1", "a:\u0661", "-a:1", "a,b:1",
     "0.0.0.0:8001", "[::]:8001", "[0::0]:8001", "a:" + "9" * 5000]
)  # fmt: skip
def test_what_is_no_address_is_refused_by_name(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_address(text, "--peers")
    assert refused.value.setting == "--peers"
    assert refused.value.value == text
    assert repr(text) in str(refused.value)
