"""Who may reach a node, and what stands between: the rule of ``--insecure``.

*Process*: the command and the program that embeds a node, before anything is begun; the supervisor
at a reload. Beyond loopback, without ``--insecure``::

    TLS    tokens                  a cluster, beyond that
    no     no      refused         needs --peer-secret or --tls-client-ca
    no     yes     a caution: tokens travel in clear
    yes    no      a caution: whoever reaches the port may read and write (unless --tls-client-ca)
    yes    yes

With tokens a cluster needs that on loopback, too: what nodes ask of each other needs no token.
"""

from __future__ import annotations

from collections.abc import Mapping

from kamacache.errors import ConfigError
from kamacache.node.address import Address
from kamacache.node.place import Place
from kamacache.rundir.live import SecurityFiles
from kamacache.security.check import cautions, check_files


def check_exposure(
    files: SecurityFiles,
    place: Place,
    listening: Mapping[str, Address | None],
    *,
    insecure: bool,
) -> tuple[str, ...]:
    """Return what is to be said in the log; raises `ConfigError` where the node must not start.

    ``listening`` has the address of each setting that opens a port.
    """
    check_own(files, place)
    said = cautions(files)
    open_to_all = {
        setting: address
        for setting, address in listening.items()
        if address is not None and not address.loopback
    }
    if open_to_all and not insecure:
        said += _check_open(files, open_to_all)
    if place.clustered and not insecure:
        if "listen" in open_to_all:
            _check_cluster(files, open_to_all["listen"])
        elif files.tokens and listening.get("listen"):
            _check_cluster(files, None)
    return tuple(said)


def check_own(files: SecurityFiles, place: Place) -> None:
    """Raise `ConfigError` unless the files are good, also as those of the node at this place."""
    check_files(files)
    if place.clustered and place.name is not None and files.tls_cert:
        # Here and not at the top: it loads OpenSSL.
        from kamacache.security.tls import check_peering

        check_peering(files, place.name)


def _check_open(files: SecurityFiles, listening: Mapping[str, Address]) -> list[str]:
    setting, address = next(iter(listening.items()))
    if not files.tls_cert and not files.tokens:
        raise ConfigError(
            f"{setting} is {address}, which other hosts can reach, and there is neither TLS nor a "
            "file of tokens: whoever reaches the port may read and write; give --tls-cert and "
            "--tls-key, or --tokens, or listen on 127.0.0.1, or say --insecure where the network "
            "is yours alone",
            setting=setting,
            value=str(address),
        )
    where = " and ".join(map(str, listening.values()))
    if not files.tls_cert:
        return [f"at {where} tokens and values travel in clear; --tls-cert and --tls-key hide them"]
    if not files.tokens and not files.tls_client_ca:
        what = f"whoever reaches {where} may read and write all groups"
        return [f"{what}; --tokens or --tls-client-ca says who may"]
    return []


def _check_cluster(files: SecurityFiles, address: Address | None) -> None:
    if files.peer_secret or files.tls_client_ca:
        return
    where = "clients need a token"
    if address is not None:
        where = f"listen is {address}, which other hosts can reach"
    raise ConfigError(
        f"{where}, and nothing tells the nodes of this cluster from others: "
        "whoever reaches the port may speak as one of them, without a token; "
        "give all nodes one --peer-secret FILE, or --tls-client-ca with --tls-cert, or say "
        "--insecure where the network is yours alone",
        setting="peer_secret",
    )
