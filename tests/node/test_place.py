"""A node's place in the cluster: what is its name, and what is refused in which words."""

from __future__ import annotations

import pytest

from kamacache.cluster.membership import Member
from kamacache.errors import ConfigError
from kamacache.limits import MEMBERS_MAX
from kamacache.node.address import Address
from kamacache.node.place import Place, find_place

LISTEN = Address("127.0.0.1", 8001)
ANYWHERE = Address("0.0.0.0", 8001)


def test_node_told_nothing_is_alone_under_its_own_name() -> None:
    place = find_place(LISTEN, listen_text="LocalHost:8001")
    assert place == Place(name="localhost:8001")
    assert not place.clustered
    assert find_place(None) == Place()


def test_peers_that_name_only_the_node_itself_make_no_cluster() -> None:
    place = find_place(LISTEN, listen_text="127.0.0.1:8001", peers=["127.0.0.1:8001=3"])
    assert not place.clustered
    assert (place.name, place.weight) == ("127.0.0.1:8001", 3)


def test_peers_and_a_source_of_peers_make_a_cluster() -> None:
    peers = ["127.0.0.1:8002=2", "127.0.0.1:8001"]
    place = find_place(LISTEN, listen_text="127.0.0.1:8001", peers=peers)
    assert place.clustered
    assert place.peers == (Member("127.0.0.1:8001"), Member("127.0.0.1:8002", 2))
    assert find_place(LISTEN, discover="dns:cache:8001").clustered


def test_advertised_name_stands_for_the_listen_address() -> None:
    peers = ["a.internal:8001=2", "b.internal:8001"]
    place = find_place(ANYWHERE, peers=peers, advertise="A.internal:8001")
    assert (place.name, place.weight) == ("a.internal:8001", 2)
    place = find_place(ANYWHERE, discover="dns:x:1", advertise="a.internal:8001=4")
    assert (place.name, place.weight) == ("a.internal:8001", 4)


def test_any_free_port_becomes_part_of_the_name_when_it_is_known() -> None:
    place = find_place(Address("127.0.0.1", 0), listen_text="localhost:0", discover="static:a:1")
    assert place.on_port(4711).name == "localhost:4711"
    assert place.on_port(4711).clustered
    advertised = find_place(Address("127.0.0.1", 0), discover="static:a:1", advertise="b:10")
    assert advertised.on_port(4711).name == "b:10"


def test_names_of_ipv6_addresses_are_short_and_in_brackets() -> None:
    listen = Address("fd00::1", 8001)
    assert find_place(listen, listen_text="[FD00:0::1]:8001").name == "[fd00::1]:8001"
    assert find_place(listen, listen_text="fd00::1:8001").name == "[fd00::1]:8001"


def test_node_alone_may_listen_everywhere_and_then_has_no_name() -> None:
    assert find_place(ANYWHERE, listen_text="0.0.0.0:8001").name is None
    assert find_place(Address("::", 8001), listen_text="[::]:8001").name is None
    assert find_place(ANYWHERE, advertise="a:1").name == "a:1"


@pytest.mark.parametrize(
    ("listen", "text"),
    [(ANYWHERE, "0.0.0.0:8001"), (Address("::", 8001), "[::]:8001"), (ANYWHERE, "0:8001")],
)
@pytest.mark.parametrize("told", [{"peers": ["a:1", "b:1"]}, {"discover": "dns:x:1"}])
def test_listening_everywhere_needs_an_advertised_name(
    listen: Address, text: str, told: dict
) -> None:
    with pytest.raises(ConfigError, match=f"listen is .*{text[-5:]}.*--advertise HOST:PORT"):
        find_place(listen, listen_text=text, **told)


def test_scoped_address_is_no_name_for_others() -> None:
    listen, text = Address("fe80::1%eth0", 8001), "[fe80::1%eth0]:8001"
    assert find_place(listen, listen_text=text).name == text
    with pytest.raises(ConfigError, match="--advertise HOST:PORT"):
        find_place(listen, listen_text=text, discover="dns:x:1")


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"peers": ["localhost:8001", "localhost:8002"]}, "127.0.0.1:8001.*localhost:8001, local"),
        ({"peers": ["127.0.0.1:8002"]}, "add it to --peers, or say with --advertise"),
        ({"peers": ["127.0.0.1:8001"], "advertise": "a:8001"}, "this node is a:8001"),
        ({"peers": ["127.0.0.1:8001", "a:1", "a:1"]}, "a:1 twice"),
        ({"peers": ["127.0.0.1:8001", "a:1", "A:01=2"]}, "a:1 twice"),
        ({"peers": ["127.0.0.1:8001", "a"]}, "'a' does not name a node; write HOST:PORT"),
        ({"peers": ["127.0.0.1:8001", "a:1=none"]}, "weight in 'a:1=none'"),
        ({"peers": ["127.0.0.1:8001", "0.0.0.0:1"]}, "peers: '0.0.0.0:1' is every address"),
        ({"peers": ["127.0.0.1:8001=2"], "advertise": "127.0.0.1:8001=3"}, "leave it out"),
        ({"discover": "zookeeper://h:1/p"}, "the scheme is not known; write .*etcd://HOST:PORT"),
        ({"advertise": "0.0.0.0:8001"}, "advertise: '0.0.0.0:8001' is every address"),
        ({"advertise": "[::]:8001"}, "is every address"),
        ({"advertise": "cache-1"}, "'cache-1' does not name a node"),
        ({"advertise": "cache-1:0"}, "write HOST:PORT"),
        ({"peers": ["127.0.0.1:8001", *(f"a:{n}" for n in range(1, MEMBERS_MAX + 1))]}, "at most"),
        ({"peers": [f"a:{n}" for n in range(1, 10)]}, "a:5 and 4 more"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_remedy(told: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_place(LISTEN, listen_text="127.0.0.1:8001", **told)


def test_node_on_loopback_with_peers_elsewhere_is_hidden() -> None:
    def hidden(*peers: str, advertise: str | None = None, listen: Address = LISTEN) -> str | None:
        text = str(listen)
        place = find_place(listen, listen_text=text, peers=peers, advertise=advertise)
        return place.hidden(listen)

    assert hidden("127.0.0.1:8001", "10.0.0.2:8001") == "10.0.0.2:8001"
    assert hidden("a:1", "127.0.0.2:8001", advertise="a:1") == "a:1"
    assert hidden("127.0.0.1:8001", "127.0.0.2:8001", "[::1]:1", "localhost:1") is None
    assert hidden("127.0.0.1:8001") is None
    assert hidden("10.0.0.1:8001", "10.0.0.2:1", listen=Address("10.0.0.1", 8001)) is None


def test_free_port_cannot_be_among_peers() -> None:
    with pytest.raises(ConfigError, match="any free port, which the peers cannot know"):
        find_place(Address("127.0.0.1", 0), listen_text="127.0.0.1:0", peers=["127.0.0.1:8002"])


@pytest.mark.parametrize(
    "told", [{"peers": ["a:1"]}, {"discover": "dns:x:1"}, {"advertise": "a:1"}]
)
def test_node_that_does_not_listen_has_no_place_in_a_cluster(told: dict) -> None:
    with pytest.raises(ConfigError, match="does not listen"):
        find_place(None, **told)
