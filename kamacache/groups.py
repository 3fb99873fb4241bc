"""Group: what a user holds. A cache by name, with a getter behind it.

*Process*: any. The same object answers from this process's own memory (single instance), or, once
the process is attached, from its node's. *Invariants*: a hit costs one lookup and nothing more on
its way (see `Group.get`); keys and values are checked and encoded here, so that everything below
sees bytes; no registry forbids two groups of one name: without a node each has its own memory,
attached to a node both are its group of that name.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from kamacache import calls, codecs
from kamacache.config import (
    ITEM_BYTES_MEAN,
    GroupSpec,
    check_callable,
    integer,
    milliseconds,
    number,
    parse_bytes,
    seconds_to_ms,
    text,
)
from kamacache.errors import (
    ConfigError,
    DeadlineExceededError,
    KamaCacheError,
    KeyNotFoundError,
    LoadError,
)
from kamacache.getters import Getter, GetterFunction, Hook, Key, Loaded, key_bytes, keys_bytes
from kamacache.limits import LOAD_THREADS, LOAD_TIMEOUT_S
from kamacache.local import engine as engines
from kamacache.local.engine import Engine
from kamacache.store.near import NEAR_CACHE_BYTES, NEAR_CACHE_ITEMS
from kamacache.store.reader import NEGATIVE, Answer, GetEnds

_BYTES: Final = frozenset({bytes})
K = TypeVar("K", str, bytes, str | bytes)
Items = Mapping[str, Any] | Mapping[bytes, Any] | Mapping[Key, Any]  # a Mapping's key is invariant

CACHE_BYTES: Final = "64MiB"
NEAR_CACHE_ITEMS_MAX: Final = 1 << 24
FALLBACKS: Final = ("getter", "error")
RUN_DIR_VARIABLE: Final = "KAMACACHE_RUN_DIR"


class _Raise:
    def __repr__(self) -> str:
        return "<raise KeyNotFoundError>"


_RAISE: Final = _Raise()


class _Timed:
    """Lets a `DeadlineExceededError` that passes say which time was over."""

    __slots__ = ("_group", "_timeout_s")

    def __init__(self, group: Group, timeout_s: float | None) -> None:
        self._group = group
        self._timeout_s = timeout_s

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DeadlineExceededError):
            self.tell(error)

    def tell(self, error: DeadlineExceededError) -> None:
        if error.timeout_s is None:
            given = self._timeout_s
            error.timeout_s = self._group.spec.load_timeout_s if given is None else given
        error.group = error.group or self._group.spec.name


class Group:
    """A cache of one kind of value, filled by a getter.

    Made once, at import or start, and used from any thread, from asyncio, and after a fork::

        scores = Group("scores", cache_bytes="64MiB", getter=load, ttl=60)
        scores.get("Tom")

    A key is str or bytes, 1 to 1,024 bytes of UTF-8; ``"Tom"`` and ``b"Tom"`` are one key, and the
    getter is always given str where the bytes are UTF-8, bytes otherwise. The getter returns the
    value or raises: `KeyError` means that there is no such key. Every call takes ``timeout`` in
    seconds; without it a call waits for the group's ``load_timeout``.

    ``group[key]``, ``group[key] = value`` and ``del group[key]`` are get, set and delete.
    ``key in group`` tells whether a value is at hand in memory now; it never loads. A group has no
    length and cannot be iterated: its keys are the database's, not the cache's. Calling a group,
    as one calls a decorated function, is `get`, or `aget` where the getter is async.
    """

    __iter__ = None
    __name__: str
    __wrapped__: Callable[..., Any]

    def __init__(
        self,
        name: str,
        *,
        cache_bytes: int | str = CACHE_BYTES,
        getter: GetterFunction | None = None,
        getter_many: GetterFunction | None = None,
        ttl: float | None = None,
        negative_ttl: float = 0,
        codec: str | codecs.Codec = "bytes",
        eviction: str = "lru",
        item_bytes_mean: int | str = ITEM_BYTES_MEAN,
        near_cache_items: int = NEAR_CACHE_ITEMS,
        near_cache_bytes: int | str = NEAR_CACHE_BYTES,
        load_timeout: float | None = None,
        load_threads: int = LOAD_THREADS,
        mirror_ttl: float = 5,
        mirror_share: float = 1 / 8,
        fallback: str = "getter",
        on_worker_start: Hook | None = None,
        on_worker_stop: Hook | None = None,
    ) -> None:
        """Check the settings; nothing is allocated or connected before the first use.

        Sizes are bytes or text such as ``"64MiB"``, times are seconds. ``load_timeout`` is how
        long one load may take (default 30 s); where it is given, and where a call gives a
        timeout, a synchronous getter runs in a thread of its own pool and not in the caller's,
        since only then can the caller leave in time. ``codec`` is "bytes", "str", "json",
        "msgpack", "pickle" or an object with encode and decode. ``fallback`` is what an attached
        group does when its node is gone: "getter" loads without caching, "error" raises
        `NodeUnavailableError`. The mirror settings act in clusters. Raises `ConfigError`.
        """
        self._codec = codecs.resolve(codec)
        self._encode = codecs.encoder(self._codec)
        self._decode = codecs.decoder(self._codec)
        self._plain = type(self._codec) is codecs.BytesCodec  # bytes are kept as they are
        self._getter = Getter(str(name), getter, getter_many, self._encode)
        check_callable("on_worker_start", on_worker_start)
        check_callable("on_worker_stop", on_worker_stop)
        self._on_start = on_worker_start
        self._on_stop = on_worker_stop
        self.load_bounded = load_timeout is not None
        self.near_cache_items = integer("near_cache_items", near_cache_items, NEAR_CACHE_ITEMS_MAX)
        self.near_cache_bytes = parse_bytes(near_cache_bytes, "near_cache_bytes")
        if fallback not in FALLBACKS:
            raise ConfigError(
                f"fallback is {fallback!r}; choose one of {', '.join(FALLBACKS)}",
                setting="fallback",
                value=repr(fallback),
            )
        self.fallback = fallback
        self.spec = GroupSpec(
            name=text("name", name),
            cache_bytes=parse_bytes(cache_bytes, "cache_bytes"),
            eviction=text("eviction", eviction),
            item_bytes_mean=parse_bytes(item_bytes_mean, "item_bytes_mean"),
            ttl_ms=seconds_to_ms(ttl, "ttl"),
            negative_ttl_ms=milliseconds("negative_ttl", negative_ttl),
            load_timeout_s=milliseconds(
                "load_timeout", LOAD_TIMEOUT_S if load_timeout is None else load_timeout
            )
            / 1000,
            load_threads=integer("load_threads", load_threads, 1 << 30),
            mirror_ttl_ms=milliseconds("mirror_ttl", mirror_ttl),
            mirror_share=number("mirror_share", mirror_share),
            has_getter=self._getter.present,
            codec=type(self._codec).__qualname__,
        )
        self._engine: Engine | None = None
        self._starting = threading.Lock()  # one engine, whichever thread asks first
        self._lookup: Callable[[str | bytes], Answer] = self._first_lookup
        engines.join(self)

    @property
    def name(self) -> str:
        """The group's name."""
        return self.spec.name

    def __repr__(self) -> str:
        return f"<kamacache.Group {self.spec.name!r}>"

    # -- one key --------------------------------------------------------------------------------

    def get(self, key: Key, default: Any = _RAISE, timeout: float | None = None) -> Any:
        """Return a key's value, loaded if need be.

        Raises `KeyNotFoundError` (a KeyError) for a key that the getter does not know, or returns
        ``default`` if given. Raises `LoadError` where the getter fails, `DeadlineExceededError`
        where ``timeout`` seconds pass, TypeError for a key that is neither str nor bytes,
        ValueError (`KeyTooLongError`) for one that is empty or too long.
        """
        # A hit runs these lines and the lookup: add nothing here (scripts/bench/local_hit.py).
        try:
            value = self._lookup(key)
        except (TypeError, AttributeError, ValueError):
            key_bytes(key)  # says what is wrong with it
            raise
        if value is None or value is NEGATIVE:
            return self._get_slow(key, value, default, timeout)
        decode = self._decode
        if decode is None:
            return value
        try:
            return decode(value)  # type: ignore[arg-type]
        except Exception as error:
            raise self._undecodable(error) from error

    def _get_slow(self, key: Key, seen: Answer, default: Any, timeout: float | None) -> Any:
        data = key_bytes(key)
        deadline_s = self._deadline_s(timeout)
        found = None
        if seen is None:
            with _Timed(self, timeout):
                found = self._started().get(data, deadline_s)
        return self._answer(data, found, default)

    async def aget(self, key: Key, default: Any = _RAISE, timeout: float | None = None) -> Any:
        """As `get`; never blocks the loop, and a hit does not even yield to it."""
        try:
            value = self._lookup(key)
        except (TypeError, AttributeError, ValueError):
            key_bytes(key)
            raise
        if isinstance(value, bytes):
            return self._value(value)
        data = key_bytes(key)
        deadline_s = None if timeout is None else self._deadline_s(timeout)
        found = None
        if value is None:
            try:  # what no `_Timed` is made for unless it is needed
                found = await (self._engine or self._started()).aget(data, deadline_s)
            except DeadlineExceededError as error:
                _Timed(self, timeout).__exit__(type(error), error, None)
                raise
        if found is not None and self._decode is None:
            return found
        return self._answer(data, found, default)

    def set(
        self, key: Key, value: Any, *, ttl: float | None = None, timeout: float | None = None
    ) -> None:
        """Keep a value, for ``ttl`` seconds or as long as the group says.

        Whoever asks after this call has returned gets this value or a later one. Raises what the
        codec raises for a value that it cannot take (TypeError), `ValueTooLargeError`.
        """
        engine = self._engine or self._started()
        deadline_s = None if timeout is None else self._deadline_s(timeout)
        ttl_ms = None if ttl is None else seconds_to_ms(ttl, "ttl")
        try:  # as `_Timed`, at the cost of nothing
            engine.set(key_bytes(key), self._encode(value), ttl_ms, deadline_s)
        except DeadlineExceededError as error:
            _Timed(self, timeout).tell(error)
            raise

    async def aset(
        self, key: Key, value: Any, *, ttl: float | None = None, timeout: float | None = None
    ) -> None:
        """As `set`."""
        engine = self._started()
        deadline_s = self._deadline_s(timeout)
        data = self._encode(value)
        with _Timed(self, timeout):
            await engine.aset(key_bytes(key), data, seconds_to_ms(ttl, "ttl"), deadline_s)

    def delete(self, key: Key, *, timeout: float | None = None) -> bool:
        """Drop a key from the cache; tell whether a value was there."""
        deadline_s = self._deadline_s(timeout)
        with _Timed(self, timeout):
            return self._started().delete(key_bytes(key), deadline_s)

    async def adelete(self, key: Key, *, timeout: float | None = None) -> bool:
        """As `delete`."""
        deadline_s = self._deadline_s(timeout)
        with _Timed(self, timeout):
            return await self._started().adelete(key_bytes(key), deadline_s)

    # -- many keys ------------------------------------------------------------------------------

    def get_many(self, keys: Iterable[K], *, timeout: float | None = None) -> dict[K, Any]:
        """Return a dict of those found, by the keys as they were given.

        What memory does not hold is loaded together: by ``getter_many`` where there is one. Where
        loads fail, the others are finished and kept, then the first `LoadError` is raised.
        """
        deadline_s = self._deadline_s(timeout)
        found, missing = self._look_up_many(keys)
        if missing:
            with _Timed(self, timeout):
                loaded = self._started().get_many(list(missing), deadline_s)
            self._merge(found, missing, loaded)
        return found

    async def aget_many(self, keys: Iterable[K], *, timeout: float | None = None) -> dict[K, Any]:
        """As `get_many`."""
        deadline_s = self._deadline_s(timeout)
        found, missing = self._look_up_many(keys)
        if missing:
            with _Timed(self, timeout):
                loaded = await self._started().aget_many(list(missing), deadline_s)
            self._merge(found, missing, loaded)
        return found

    def set_many(
        self,
        items: Items,
        *,
        ttl: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """Keep several values; nothing is sent or kept unless all can be encoded."""
        deadline_s = self._deadline_s(timeout)
        data = self._encoded(items)
        if data:
            with _Timed(self, timeout):
                self._started().set_many(data, seconds_to_ms(ttl, "ttl"), deadline_s)

    async def aset_many(
        self,
        items: Items,
        *,
        ttl: float | None = None,
        timeout: float | None = None,
    ) -> None:
        """As `set_many`."""
        deadline_s = self._deadline_s(timeout)
        data = self._encoded(items)
        if data:
            with _Timed(self, timeout):
                await self._started().aset_many(data, seconds_to_ms(ttl, "ttl"), deadline_s)

    def delete_many(self, keys: Iterable[K], *, timeout: float | None = None) -> int:
        """Drop several keys; return how many had a value."""
        deadline_s = self._deadline_s(timeout)
        data = list(dict.fromkeys(key_bytes(key) for key in _keys(keys)))
        with _Timed(self, timeout):
            return self._started().delete_many(data, deadline_s) if data else 0

    async def adelete_many(self, keys: Iterable[K], *, timeout: float | None = None) -> int:
        """As `delete_many`."""
        deadline_s = self._deadline_s(timeout)
        data = list(dict.fromkeys(key_bytes(key) for key in _keys(keys)))
        with _Timed(self, timeout):
            return await self._started().adelete_many(data, deadline_s) if data else 0

    def stats(self, *, timeout: float | None = None) -> dict[str, Any]:
        """Return counters: gets, hits by layer, misses, loads, sets, items, bytes, evictions..."""
        return self._started().stats(self._deadline_s(timeout))

    async def astats(self, *, timeout: float | None = None) -> dict[str, Any]:
        """As `stats`."""
        return await self._started().astats(self._deadline_s(timeout))

    # -- like a dict, like a function -----------------------------------------------------------

    def __getitem__(self, key: Key) -> Any:
        return self.get(key)

    def __setitem__(self, key: Key, value: Any) -> None:
        self.set(key, value)

    def __delitem__(self, key: Key) -> None:
        if not self.delete(key):
            raise self._not_found(key_bytes(key))

    def __contains__(self, key: object) -> bool:
        key_bytes(key)  # type: ignore[arg-type] # it is what checks the type
        return isinstance(self._lookup(key), bytes)  # type: ignore[arg-type]

    def __call__(self, key: Key, default: Any = _RAISE, *, timeout: float | None = None) -> Any:
        """Return `get`'s value, or `aget`'s awaitable where the getter is async."""
        get = self.aget if self._getter.is_async else self.get
        return get(key, default, timeout=timeout)

    # -- for whoever runs the getter (getters.Loadable) -----------------------------------------

    @property
    def is_async(self) -> bool:
        """Whether the getter is awaited."""
        return self._getter.is_async

    @property
    def has_getter(self) -> bool:
        """Whether there is anything to load with."""
        return self._getter.present

    @property
    def has_getter_many(self) -> bool:
        """Whether many keys can be loaded by one call."""
        return self._getter.has_many

    @property
    def get_ends(self) -> GetEnds | None:
        """How `get` ends where memory has no value; None where a hit must be decoded."""
        if self._decode is not None or type(self).get is not Group.get:
            return None
        return GetEnds(self._get_slow, _RAISE)

    @property
    def has_worker_hooks(self) -> bool:
        """Whether there is an on_worker_start or on_worker_stop."""
        return self._on_start is not None or self._on_stop is not None

    def load(self, key: bytes) -> Loaded:
        """Call the getter; see `kamacache.getters.Loadable`."""
        return self._getter.load(key)

    async def aload(self, key: bytes) -> Loaded:
        """Await the getter."""
        return await self._getter.aload(key)

    def load_many(self, keys: Sequence[bytes]) -> dict[bytes, Loaded]:
        """Call ``getter_many``."""
        return self._getter.load_many(keys)

    async def aload_many(self, keys: Sequence[bytes]) -> dict[bytes, Loaded]:
        """Await ``getter_many``."""
        return await self._getter.aload_many(keys)

    def run_worker_start(self) -> Awaitable[None] | None:
        """Run ``on_worker_start``; an awaitable where it is async."""
        return None if self._on_start is None else self._on_start()

    def run_worker_stop(self) -> Awaitable[None] | None:
        """Run ``on_worker_stop``; an awaitable where it is async."""
        return None if self._on_stop is None else self._on_stop()

    # -- the engine -----------------------------------------------------------------------------

    def _use(self, engine: Engine | None) -> None:
        """Answer by this engine from now on; None: start the process's default at the next use."""
        with self._starting:
            self._answer_by(engine)

    def _started(self) -> Engine:
        """Return the engine, started if need be."""
        engine = self._engine
        if engine is not None:
            return engine
        run_dir = os.environ.get(RUN_DIR_VARIABLE)
        if run_dir and not engines.chosen():
            from kamacache.local.attach import attach_first

            attach_first(run_dir)
        with self._starting:
            engine = self._engine
            if engine is None:
                make = engines.factory() or _single
                engine = make(self)
                self._answer_by(engine)
            return engine

    def _answer_by(self, engine: Engine | None) -> None:
        self._engine = engine
        self._lookup = self._first_lookup if engine is None else engine.lookup
        direct = None if engine is None else engine.direct
        if direct is None:
            self.__dict__.pop("get", None)
        else:
            # What `get` does, in the frame of the lookup itself: it halves what a hit costs
            # beyond the lookup (scripts/bench/local_hit.py).
            self.__dict__["get"] = direct

    def _first_lookup(self, key: str | bytes) -> Answer:
        return self._started().lookup(key)

    # -- keys and values ------------------------------------------------------------------------

    def _deadline_s(self, timeout: float | None) -> float | None:
        return None if timeout is None else calls.deadline_after(timeout, LOAD_TIMEOUT_S)

    def _answer(self, key: bytes, found: bytes | None, default: Any) -> Any:
        if found is not None:
            return self._value(found)
        if default is _RAISE:
            raise self._not_found(key)
        return default

    def _value(self, data: bytes) -> Any:
        if self._decode is None:
            return data
        try:
            return self._decode(data)
        except Exception as error:
            raise self._undecodable(error) from error

    def _encoded(self, items: Items) -> dict[bytes, bytes]:
        if not isinstance(items, Mapping):
            raise TypeError(f"set_many takes a dict, not {type(items).__name__}")
        values: Iterable[Any] = items.values()
        if not self._plain or not set(map(type, values)) <= _BYTES:
            values = map(self._encode, values)
        return dict(zip(keys_bytes(items), values, strict=True))

    def _look_up_many(self, keys: Iterable[K]) -> tuple[dict[K, Any], dict[bytes, list[K]]]:
        """Return the values that memory holds, and the other keys as given, by their bytes."""
        asked = list(dict.fromkeys(_keys(keys)))
        answers = self._started().lookup_many(asked)
        decode = self._decode
        if decode is None and set(map(type, answers)) <= _BYTES:
            return dict(zip(asked, answers, strict=True)), {}
        found: dict[K, Any] = {}
        missing: dict[bytes, list[K]] = {}
        for key, value in zip(asked, answers, strict=True):
            if isinstance(value, bytes):
                found[key] = value if decode is None else self._value(value)
            elif value is None:
                missing.setdefault(key_bytes(key), []).append(key)
        return found, missing

    def _merge(
        self, found: dict[K, Any], missing: dict[bytes, list[K]], loaded: dict[bytes, bytes]
    ) -> None:
        for data, keys in missing.items():
            value = loaded.get(data)
            if value is not None:
                for key in keys:
                    found[key] = self._value(value)

    def _not_found(self, key: bytes) -> KeyNotFoundError:
        return KeyNotFoundError(
            f"group {self.spec.name!r} has no such key ({len(key)} bytes)",
            group=self.spec.name,
            key=key,
        )

    def _undecodable(self, error: Exception) -> KamaCacheError:
        return LoadError(
            f"group {self.spec.name!r}: the bytes kept are not what this group's codec writes "
            f"({type(error).__name__}: {error}); were they set under another codec?",
            group=self.spec.name,
            cause_type=type(error).__name__,
        )


def group(name: str, **settings: Any) -> Callable[[GetterFunction], Group]:
    """Make a function the getter of a new `Group`, which takes its name and docstring.

    ``settings`` are those of `Group`, but for ``getter``. The function itself stays reachable as
    ``__wrapped__``, and loads without the cache.
    """
    if callable(name):
        raise TypeError("@kamacache.group takes the group's name: @kamacache.group('scores')")
    if "getter" in settings:
        raise ConfigError("the decorated function is the getter", setting="getter")

    def decorate(function: GetterFunction) -> Group:
        made = Group(name, getter=function, **settings)
        functools.update_wrapper(made, function, updated=())
        return made

    return decorate


def _single(made: engines.EngineUser) -> Engine:
    from kamacache.local.single import SingleEngine

    return SingleEngine(made)


def _keys(keys: Iterable[K]) -> Iterable[K]:
    if isinstance(keys, str | bytes):
        raise TypeError(f"give several keys, not one {type(keys).__name__}")
    return keys


def _after_fork_in_child() -> None:
    for made in engines.live():
        if isinstance(made, Group):
            made._starting = threading.Lock()  # another thread may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)
