"""TLS with certificates that the test makes; clients that must show one; and files that do not fit."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from server.config import ServerConfig
from server.connections import readers
from server.connections.tls import tls_context
from server.errors import ConfigError
from tests.connections.recorder import Recorder
from tests.connections.serving import Listening, connect, connected, error_of, head, read_all
from tests.listening import wait_until

CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server's certificate and key, an authority, a client's certificate of it, and things that are none of these."""
    folder = tmp_path_factory.mktemp("tls")

    def at(name: str) -> str:
        return str(folder / name)

    names = ("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl("req", "-x509", *CURVE, *names, "-subj", "/CN=localhost", "-keyout", at("key"), "-out", at("cert"))
    openssl("req", "-x509", *CURVE, "-subj", "/CN=other", "-keyout", at("other key"), "-out", at("other cert"))
    openssl("req", "-x509", *CURVE, "-subj", "/CN=authority", "-keyout", at("ca key"), "-out", at("ca"))
    openssl("req", *CURVE, "-subj", "/CN=client", "-keyout", at("client key"), "-out", at("client request"))
    authority = ("-CA", at("ca"), "-CAkey", at("ca key"), "-CAcreateserial")
    openssl("x509", "-req", "-in", at("client request"), *authority, "-out", at("client cert"))
    openssl("pkey", "-in", at("key"), "-aes256", "-passout", "pass:secret", "-out", at("locked key"))
    (folder / "text").write_text("no certificate\n")
    return folder


@pytest.fixture
def settings(files: Path) -> dict[str, Path]:
    return {"ssl_certfile": files / "cert", "ssl_keyfile": files / "key"}


def client_context(files: Path, *, shows: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(files / "cert"))
    if shows is not None:
        context.load_cert_chain(files / f"{shows} cert", files / f"{shows} key")
    return context


def connect_tls(server: Listening, files: Path, *, shows: str | None = None) -> ssl.SSLSocket:
    context = client_context(files, shows=shows)
    return context.wrap_socket(connect(server.address), server_hostname="localhost")


def test_requests_and_streams_over_tls(files: Path, settings: dict[str, Path]) -> None:
    with connected(**settings) as server, httpx.Client(verify=client_context(files)) as client:
        url = server.url.replace("http://127.0.0.1", "https://localhost")
        assert client.get(f"{url}/health/live").json() == {"status": "ok"}
        body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
        assert client.post(f"{url}/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")


def test_plain_http_on_a_tls_port_is_ended(settings: dict[str, Path]) -> None:
    with connected(**settings) as server:
        with connect(server.address) as client:
            client.sendall(head())
            assert b"HTTP" not in read_all(client)
        wait_until(lambda: server.num_open == 0)


def test_old_versions_are_refused(files: Path, settings: dict[str, Path]) -> None:
    context = client_context(files)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with connected(**settings) as server:
        with context.wrap_socket(connect(server.address), server_hostname="localhost") as client:
            assert client.version() == "TLSv1.2"
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(connect(server.address), server_hostname="localhost")


def test_a_handshake_that_does_not_end(settings: dict[str, Path]) -> None:
    with connected(**settings, header_timeout=0.3) as server, connect(server.address) as client:
        wait_until(lambda: server.num_open == 1)
        started = time.monotonic()
        assert read_all(client) == b""
        assert time.monotonic() - started < 5
        wait_until(lambda: server.num_open == 0)


def test_limits_hold_over_tls(files: Path, settings: dict[str, Path]) -> None:
    with connected(**settings, header_timeout=0.4) as server:
        with connect_tls(server, files) as client:
            client.sendall(head("X: " + "a" * 20_000))
            error_of(read_all(client), 431)
        with connect_tls(server, files) as client:
            client.sendall(b"GET / ")
            error_of(read_all(client), 408)


def test_one_connection_too_many_is_closed_without_a_handshake(files: Path, settings: dict[str, Path]) -> None:
    with connected(**settings, max_connections=1) as server:
        with connect_tls(server, files) as client:
            with pytest.raises(OSError, match=r"EOF|reset|closed"):
                connect_tls(server, files)
            client.sendall(head())
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: server.num_open == 0)
        connect_tls(server, files).close()


def test_an_answer_that_nobody_reads(files: Path, settings: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READ_SECONDS", 0.5)
    app = Recorder(b"a" * (16 << 20))
    with connected(app=app, keep_alive=0.1, **settings) as server, connect_tls(server, files) as client:
        client.sendall(head())
        wait_until(lambda: server.num_open == 0, 10)


# -- clients' certificates -------------------------------------------------------------------------------------------


def is_served(client: socket.socket) -> bool:
    """With TLS 1.3 a client learns only afterwards that the server did not want it."""
    try:
        client.sendall(head())
        return client.recv(65536).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


@pytest.mark.parametrize(("shows", "expected"), [("client", True), ("other", False), (None, False)])
def test_clients_must_show_a_certificate(
    files: Path, settings: dict[str, Path], shows: str | None, *, expected: bool
) -> None:
    with connected(**settings, ssl_ca_certs=files / "ca") as server:
        with connect_tls(server, files, shows=shows) as client:
            assert is_served(client) is expected
        wait_until(lambda: server.num_open == 0)


# -- files -----------------------------------------------------------------------------------------------------------


BAD_FILES = [
    ("cert", "other key", None, "ssl_keyfile: is not the key of the first certificate in ssl_certfile"),
    ("nothing", "key", None, "ssl_certfile: cannot read .*nothing: No such file or directory"),
    ("cert", "nothing", None, "ssl_keyfile: cannot read .*nothing: No such file or directory"),
    ("cert", ".", None, "ssl_keyfile: cannot read .*: Is a directory"),
    ("text", "key", None, "ssl_certfile and ssl_keyfile: cannot be used"),
    ("cert", "text", None, "ssl_certfile and ssl_keyfile: cannot be used"),
    ("cert", "locked key", None, "the key without a password"),
    ("cert", "key", "text", "ssl_ca_certs: .*text holds no certificates"),
    ("cert", "key", "nothing", "ssl_ca_certs: cannot read .*nothing"),
]


@pytest.mark.parametrize(("cert", "key", "authorities", "message"), BAD_FILES)
def test_files_that_cannot_be_used(files: Path, cert: str, key: str, authorities: str | None, message: str) -> None:
    config = ServerConfig(
        ssl_certfile=files / cert,
        ssl_keyfile=files / key,
        ssl_ca_certs=None if authorities is None else files / authorities,
    )
    with pytest.raises(ConfigError, match=message) as caught:
        tls_context(config)
    assert "\n" not in str(caught.value)


def test_authorities_without_tls_would_let_everybody_in(files: Path) -> None:
    with pytest.raises(ConfigError, match="ssl_ca_certs: "):
        tls_context(ServerConfig(ssl_ca_certs=files / "ca"))


def test_without_files_there_is_no_tls() -> None:
    assert tls_context(ServerConfig()) is None
