"""Groups as an operator names them: ``--group scores:64MiB,eviction=s3fifo`` and TOML tables.

*Process*: the supervisor and the command. What is named here overrides the app's own setting of
the same group, field by field: the operator knows the host, the app's author did not.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import msgspec

from kamacache.config import GroupSpec, parse_bytes, seconds_to_ms
from kamacache.errors import ConfigError
from kamacache.limits import GROUPS_MAX

Fields = dict[str, Any]
"""Settings of one group by the names of `GroupSpec`, checked, only those that were given."""


def _number(value: object, setting: str) -> float:
    try:
        if isinstance(value, str):
            return float(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    except ValueError:
        pass
    raise ConfigError(f"{setting} is {value!r}; give a number", setting=setting, value=str(value))


def _whole(value: object, setting: str) -> int:
    number = _number(value, setting)
    if number != int(number):
        raise ConfigError(f"{setting} is {value!r}; give a whole number", setting=setting)
    return int(number)


def _bytes(value: object, setting: str) -> int:
    return parse_bytes(value if isinstance(value, int | str) else repr(value), setting)


def _ms(value: object, setting: str) -> int | None:
    if value in ("none", ""):
        return None
    return seconds_to_ms(_number(value, setting), setting)


def _ms_or_zero(value: object, setting: str) -> int | None:
    return seconds_to_ms(_number(value, setting), setting, zero=True)


# What the public contract calls a setting -> its field in GroupSpec, and how its text is read.
_OPTIONS: Final[dict[str, tuple[str, Callable[[object, str], Any]]]] = {
    "cache_bytes": ("cache_bytes", _bytes),
    "eviction": ("eviction", lambda value, _: str(value)),
    "ttl": ("ttl_ms", _ms),
    "negative_ttl": ("negative_ttl_ms", _ms_or_zero),
    "item_bytes_mean": ("item_bytes_mean", _bytes),
    "load_timeout": ("load_timeout_s", _number),
    "load_threads": ("load_threads", _whole),
    "mirror_ttl": ("mirror_ttl_ms", _ms_or_zero),
    "mirror_share": ("mirror_share", _number),
}


def group_fields(name: str, options: Mapping[str, object]) -> Fields:
    """Return the checked fields of one group's options; raises `ConfigError`."""
    fields: Fields = {}
    for option, value in options.items():
        known = option.replace("-", "_")
        if known not in _OPTIONS:
            raise ConfigError(
                f"group {name!r} has no setting {option!r}{nearest(known, _OPTIONS)}",
                setting=option,
                value=str(value),
            )
        field, read = _OPTIONS[known]
        fields[field] = read(value, f"group {name!r}: {option}")
    # A probe of the checks in GroupSpec; the size may still come from the app.
    GroupSpec(name=name, **{"cache_bytes": 1, **fields})
    return fields


def parse_group(text: str) -> tuple[str, Fields]:
    """Read ``NAME:SIZE`` or ``NAME:SIZE,option=value,...``; raises `ConfigError`."""
    head, *rest = text.split(",")
    name, colon, size = head.partition(":")
    if not colon or not size:
        raise ConfigError(
            f"group {text!r}: write NAME:SIZE, such as scores:64MiB, "
            "or with options scores:64MiB,eviction=s3fifo,ttl=60",
            setting="group",
            value=text,
        )
    options: dict[str, object] = {"cache_bytes": size}
    for part in rest:
        option, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(
                f"group {text!r}: {part!r} is not option=value", setting="group", value=text
            )
        options[option.strip()] = value.strip()
    return name.strip(), group_fields(name.strip(), options)


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"``, or the list of what is known."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(names)}"


def merge_groups(app: Iterable[GroupSpec], given: Mapping[str, Fields]) -> list[GroupSpec]:
    """Return the node's groups: the app's, with what the operator gave laid over, then the rest.

    Raises `ConfigError` where there is none, where there are too many, and where a group that the
    app does not have was given no size.
    """
    specs = {spec.name: spec for spec in app}
    for name, fields in given.items():
        if name in specs:
            specs[name] = msgspec.structs.replace(specs[name], **fields)
        elif "cache_bytes" in fields:
            specs[name] = GroupSpec(name=name, **fields)
        else:
            raise ConfigError(
                f"group {name!r} has no size and is not one of the app's"
                f"{nearest(name, specs) if specs else ''}; give it cache_bytes",
                setting="group",
                value=name,
            )
    if not specs:
        raise ConfigError(
            "the node has no group; name one with --group NAME:SIZE (such as --group "
            "scores:64MiB), with --app module:attr, or with [groups.NAME] in the config file",
            setting="group",
        )
    if len(specs) > GROUPS_MAX:
        raise ConfigError(f"{len(specs)} groups; a node has at most {GROUPS_MAX}", setting="group")
    return list(specs.values())
