"""What the tests on real processes share."""

from tests.attached_estate import detached, estate

__all__ = ["detached", "estate"]
