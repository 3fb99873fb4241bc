"""All files of secrets of a node, looked at before any of them is used.

*Process*: the command, the supervisor (at the start and at each reload), the program that embeds a
node. *Invariant*: what passes here works in the roles, short of being changed in between.
"""

from __future__ import annotations

from kamacache.rundir.live import SecurityFiles


def check_files(files: SecurityFiles) -> None:
    """Raise `ConfigError` that names the file, what is wrong with it, and the remedy."""
    if files.tls_cert or files.tls_key or files.tls_ca or files.tls_client_ca:
        # Here and not at the top: it loads OpenSSL, which a node without certificates needs not.
        from kamacache.security import tls

        tls.check(files)
    if files.tokens:
        from kamacache.security import tokens

        tokens.check(files)
    if files.peer_secret:
        from kamacache.security import peer_secret

        peer_secret.check(files)


def cautions(files: SecurityFiles) -> list[str]:
    """Return what is not wrong yet, or not certain to be, a sentence each; for the log."""
    if not files.tls_cert:
        return []
    from kamacache.security import tls

    return tls.cautions(files)
