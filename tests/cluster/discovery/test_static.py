"""A list in the URL."""

from __future__ import annotations

from tests.cluster.discovery.conftest import Follow


async def test_the_list_is_published_once_with_or_without_the_node(follow: Follow) -> None:
    a = follow("static:10.0.0.2:1=3, 10.0.0.1:1,10.0.0.1:1,")
    await a.sees("10.0.0.1:1", "10.0.0.2:1=3")
    await a.source.leave()
    assert len(a.lists) == 1
