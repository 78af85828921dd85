"""Certificates and keys as a context for TLS, or one line that says what is wrong with them."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import ConfigError

if TYPE_CHECKING:
    from server.config import ServerConfig


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """None where the server is to speak plain HTTP.

    TLS 1.2 and later. Raises ConfigError for files that cannot be read, are no PEM, or do not fit together.
    """
    if config.ssl_certfile is None or config.ssl_keyfile is None:
        if config.ssl_ca_certs is not None:
            raise ConfigError("ssl_ca_certs: clients can show certificates only over TLS: ssl_certfile is missing")
        return None
    for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs"):
        _check_readable(name, getattr(config, name))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        # Without a password given here, OpenSSL asks the terminal for one.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except ssl.SSLError as error:
        raise ConfigError(_why_no_chain(error)) from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except ssl.SSLError:
            raise ConfigError(f"ssl_ca_certs: {config.ssl_ca_certs} holds no certificates in PEM format") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(name: str, path: Path | None) -> None:
    if path is None:
        return
    try:
        path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot read {path}: {error.strerror}") from None


def _why_no_chain(error: ssl.SSLError) -> str:
    if error.reason == "KEY_VALUES_MISMATCH":
        return "ssl_keyfile: is not the key of the first certificate in ssl_certfile"
    if error.reason in ("EE_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "CA_KEY_TOO_SMALL"):
        return "ssl_certfile: its key or its digest is weaker than this system's OpenSSL accepts"
    return (
        "ssl_certfile and ssl_keyfile: cannot be used: both must be in PEM format, the key without a password "
        f"({error.reason or 'not PEM'})"
    )
