"""What a node owns on its host: the shards, words and folders of one epoch, and its ports.

*Process*: the supervisor, holding the run directory's lock. Made in one order (`Estate.reserve`),
removed in the other (`Estate.remove`), also when it was made only in part.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path
from typing import Final

import structlog

import kamacache
from kamacache import store
from kamacache.cluster.membership import (
    Member,
    MembershipReader,
    make_membership,
    write_membership,
)
from kamacache.config import GroupSpec
from kamacache.limits import OWED_FILE_BYTES
from kamacache.node.address import Address, hold_port
from kamacache.node.exits import NodeEndError
from kamacache.node.settings import NodeSettings
from kamacache.node.space import check_space, mib
from kamacache.rundir.cleaning import clean_epoch, clean_stale, note_kept, remove_epoch_folder
from kamacache.rundir.context import EXIT_ROLE, Unsettled
from kamacache.rundir.control import CONTROL_BYTES, ControlWriter
from kamacache.rundir.counters import Counters, counters_bytes, create_counters, open_counters
from kamacache.rundir.description import (
    DESCRIPTION_FORMAT,
    NodeDescription,
    read_boot_id,
    write_description,
)
from kamacache.rundir.kept import Kept, KeptFolder, find_kept, keep_shards
from kamacache.rundir.layout import (
    RunDir,
    SupervisorLock,
    new_epoch,
    own_folder,
    share_files,
)
from kamacache.rundir.live import write_live
from kamacache.rundir.meters import MeterSizes, create_meters

LOCK_WAIT_S: Final = 1.0
_PAGE_BYTES: Final = 4096

log = structlog.get_logger("kamacache.node")


def take_lock(run_dir: RunDir) -> SupervisorLock:
    """Return the lock of a run directory; raises `NodeEndError` where another node has it.

    Waits a moment: the orphans of a killed supervisor hold the lock while they clean up.
    """
    give_up_s = time.monotonic() + LOCK_WAIT_S
    while True:
        taken = SupervisorLock.take(run_dir)
        if isinstance(taken, SupervisorLock):
            return taken
        if time.monotonic() >= give_up_s:
            holder = f"pid {taken}" if taken else "a process of another pid namespace"
            raise NodeEndError(
                EXIT_ROLE,
                f"a node runs at {run_dir.path} already ({holder} holds supervisor.lock); "
                "stop it, or give this node another --run-dir",
            )
        time.sleep(0.02)


class Estate:
    """The files and the ports of one epoch."""

    control: ControlWriter
    counters: Counters
    description: NodeDescription
    unsettled: Unsettled | None = None  # a warm start that the other nodes have to agree to

    def __init__(self, run_dir: RunDir, settings: NodeSettings, groups: list[GroupSpec]) -> None:
        self._run_dir = run_dir
        self._settings = settings
        self._groups = groups
        self._held: list[socket.socket] = []  # the ports of fronts and HTTP
        self._epoch = new_epoch()
        self._shm_dir = run_dir.shm_dir(os.path.realpath(settings.shm_dir), self._epoch)
        self._sockets_dir = run_dir.sockets_dir(self._epoch)

    def reserve(self) -> None:
        """Clean up after dead nodes, reserve everything, publish node.json.

        Raises `NodeEndError` and `StorageError`, each with the remedy.
        """
        settings = self._settings
        if settings.listen and (other := settings.place.hidden(settings.listen)):
            log.warning(
                "the node listens on loopback only, other hosts will not reach it; choose --listen",
                listen=str(settings.listen),
                other=other,
            )
        listen = self._hold(settings.listen if settings.fronts else None, "listen")
        # A socket that was passed listens already, and is everybody's who has a copy of it.
        api = settings.api if settings.api_fd is not None else self._hold(settings.api, "api")
        found = self._find_kept()
        removed = clean_stale(
            self._run_dir, settings.shm_dir, but="" if found is None else found.path.name
        )
        if removed:
            log.warning("cleaned up after a node that crashed", folders=removed)
        usable = 0 if found is None else found.usable_bytes(found.files(self._groups))
        check_space(Path(settings.shm_dir), self.required_bytes() - usable)
        store.warn_unless_tmpfs(settings.shm_dir)
        own_folder(self._shm_dir.parent, "shm_dir", gid=settings.socket_gid)
        # Last of all that may fail before: a start that fails leaves it for another.
        taken = None if found is None else self._take(found)
        self._reserve_memory(listen, api, taken)
        self._write_membership(taken)
        own_folder(self._sockets_dir, "run_dir", gid=settings.socket_gid)
        write_live(self._sockets_dir, settings.live(0))
        if self.unsettled is None:
            self.publish()

    def publish(self) -> None:
        """Let processes attach, and read the shards."""
        self.unsettled = None
        self.control.extend()  # who finds node.json finds a node that serves
        write_description(self._run_dir, self.description, gid=self._settings.socket_gid)

    def _find_kept(self) -> KeptFolder | None:
        """Return what the last node left, if it can be used; throw it away and say so, if not."""
        settings = self._settings
        found = find_kept(self._run_dir.shm_base(os.path.realpath(settings.shm_dir)))
        if found is None:
            return None
        place = settings.place
        why = found.why_cold(
            version=kamacache.__version__,
            workers=settings.workers,
            name=place.name if place.clustered else None,
            away_max_s=settings.warm_restart_max_downtime_s,
        )
        if why:
            log.warning("cold start: what the last node left is thrown away", why=why)
            remove_epoch_folder(found.path)
            return None
        return found

    def _take(self, found: KeptFolder) -> Kept | None:
        away_s = round(found.away_s, 3)
        try:
            found.take(self._shm_dir, found.files(self._groups))
        except OSError as error:
            log.warning("cold start: what the last node left cannot be taken", why=str(error))
            remove_epoch_folder(found.path)
            return None
        for spec in self._groups:
            if changed := found.changed(spec):
                log.warning("group starts cold: it was changed", group=spec.name, changed=changed)
        log.info("warm start", away_s=away_s)
        if self._settings.place.clustered:
            self.unsettled = Unsettled(
                members=tuple(address for address, _ in found.kept.members),
                left_ms=found.kept.left_ms,
                discovers=self._settings.place.discover is not None,
            )
        return found.kept

    def _hold(self, address: Address | None, setting: str) -> Address | None:
        if address is None:
            return None
        held, resolved = hold_port(address, setting)
        self._held.append(held)
        return resolved

    def required_bytes(self) -> int:
        """Return what all files of the shared-memory folder take."""
        workers, groups = self._settings.workers, self._groups
        shards = sum(store.required_bytes(spec, workers) for spec in groups)
        words = CONTROL_BYTES + counters_bytes(len(groups)) + self._meter_sizes().bytes
        if self._settings.place.clustered:
            words += workers * OWED_FILE_BYTES
        rounding = _PAGE_BYTES * (4 + 3 * workers * len(groups))  # files take whole pages
        return shards + words + rounding

    def _meter_sizes(self) -> MeterSizes:
        settings = self._settings
        return MeterSizes.of(
            workers=settings.workers,
            groups=len(self._groups),
            fronts=settings.fronts if settings.listen else 0,
            clustered=settings.place.clustered,
        )

    def _reserve_memory(
        self, listen: Address | None, api: Address | None, taken: Kept | None
    ) -> None:
        settings = self._settings
        place = settings.place.on_port(listen.port) if listen else settings.place
        own_folder(self._shm_dir, "shm_dir", gid=settings.socket_gid)
        self.description = described = NodeDescription(
            format=DESCRIPTION_FORMAT,
            epoch=self._epoch,
            pid=os.getpid(),
            boot_id=read_boot_id(),
            workers=settings.workers,
            hash_seed=taken.hash_seed if taken else secrets.randbits(64),
            shm_dir=str(self._shm_dir),
            sockets_dir=str(self._sockets_dir),
            groups=self._groups,
            listen=str(listen) if listen else None,
            version=kamacache.__version__,
            name=place.name,
            memory=taken.memory if taken else self._epoch,
            clustered=place.clustered,
            api=str(api) if api else None,
        )
        self.control = ControlWriter(described.control_path)
        create_counters(described.counters_path, len(self._groups))
        create_meters(described.shm_dir, self._meter_sizes())
        self.counters = open_counters(described.counters_path)
        for spec in self._groups:
            for shard in range(settings.workers):
                store.create_shard(
                    described.shm_dir,
                    spec,
                    shard,
                    settings.workers,
                    described.hash_seed,
                    described.boot_id,
                )
            _tell_size(spec, settings.workers)
        if settings.socket_gid is not None:
            share_files(self._shm_dir, settings.socket_gid)

    def _write_membership(self, taken: Kept | None) -> None:
        """Publish the cluster as the settings tell it; before any role starts.

        A node that looks for its peers and was told none begins alone, or with those that it knew
        last: it owes them what they must drop.
        """
        name, place = self.description.name, self._settings.place
        if self.description.clustered and name is not None:
            known = [] if taken is None else taken.members
            left = tuple(Member(a, weight) for a, weight in known if a != name)
            members = place.peers or (*left, Member(name, place.weight))
            write_membership(
                self.description, make_membership(1, name, members), self.control.words
            )

    def leave(self) -> None:
        """Let go of what a forked role inherited: words it must not write, the held ports.

        A role that outlives the node for a moment would keep them taken.
        """
        self.control.close()
        self.counters.close()
        for held in self._held:
            held.close()

    def unpublish(self) -> None:
        """Remove node.json: no process attaches from now on, those that did go on."""
        self._run_dir.description_path.unlink(missing_ok=True)

    def remove(self, why_lost: str, left_ms: int) -> None:
        """Stop readers, remove all files and free the ports; when no role runs any more.

        The shards are left for the next node, unless ``why_lost`` says why not. ``left_ms`` is
        when the node began to stop.
        """
        if not self._settings.warm_restart_max_downtime_s:
            why_lost = "warm restart is off"
        elif why_lost and hasattr(self, "control"):
            log.info("the shards are not kept for the next node", why=why_lost)
        members = () if why_lost else self._members()
        if hasattr(self, "control"):
            self.control.end()
            self.control.close()
        if hasattr(self, "counters"):
            self.counters.close()
        if why_lost or not self._keep(members, left_ms):
            clean_epoch(self._run_dir, self._epoch, self._shm_dir)
        for held in self._held:
            held.close()

    def _members(self) -> tuple[tuple[str, int], ...]:
        """Return the nodes of the cluster, this one included; none: it has no peers."""
        if not self.description.clustered:
            return ()
        reader = MembershipReader(self.description)
        try:
            return tuple((m.address, m.weight) for m in reader.current().members)
        finally:
            reader.close()

    def _keep(self, members: tuple[tuple[str, int], ...], left_ms: int) -> bool:
        """Leave the shards, and nothing else of the epoch."""
        about = self.description
        try:
            note_kept(self._run_dir, about.shm_dir)
            keep_shards(about, members, left_ms)
        except OSError as error:
            log.warning("the shards cannot be kept for the next node", why=str(error))
            return False
        remove_epoch_folder(self._sockets_dir)
        away_max_s = self._settings.warm_restart_max_downtime_s
        log.info("the shards are kept for the next node", folder=about.shm_dir, seconds=away_max_s)
        return True


def _tell_size(spec: GroupSpec, workers: int) -> None:
    sizes = store.geometry(spec.cache_bytes // workers, spec.item_bytes_mean)
    total = sizes.total_bytes * workers
    log.info(
        "group",
        group=spec.name,
        bytes=total,
        eviction=spec.eviction,
        value_bytes_max=sizes.value_bytes_max,
    )
    if total > spec.cache_bytes:
        log.warning(
            "group is rounded up to the least size of its shards",
            group=spec.name,
            asked=mib(spec.cache_bytes),
            least=mib(total),
            workers=workers,
        )
