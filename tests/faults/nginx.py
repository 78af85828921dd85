"""A real nginx before several servers, configured as its operators should."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.serving import free_port

NGINX = "/usr/sbin/nginx"

# Another replica is tried only as long as no byte of an answer has come, which nginx takes care of by itself.
# A kept connection must end here before the server ends it, 5 s after its last answer: a request that meets that end
# would count as a failure of the replica.
_CONFIGURATION = """\
{user}
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx-error.log info;
events {{ worker_connections 1024; }}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    log_format tries '$upstream_status';
    access_log {folder}/{log} tries;
    client_max_body_size 32m;
    upstream replicas {{
        zone replicas 64k;
        least_conn;
        {servers}
        keepalive 32;
        keepalive_timeout 4s;
    }}
    server {{
        listen 127.0.0.1:{port};
        location = /nginx {{ access_log off; return 204; }}
        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_buffering off;
            proxy_request_buffering on;
            proxy_connect_timeout 1s;
            proxy_read_timeout {read_timeout:g}s;
            proxy_next_upstream error timeout http_503 non_idempotent;
            proxy_next_upstream_tries {tries};
        }}
    }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    base_url: str
    log: Path

    def num_passed_on(self) -> int:
        """Requests of which a second replica was asked."""
        return sum("," in line for line in self.log.read_text(encoding="ascii").splitlines())


@contextmanager
def running_nginx(folder: Path, ports: Sequence[int], *, tries: int, read_timeout: float) -> Iterator[Nginx]:
    """In the foreground, with all its files in `folder`."""
    port = free_port()
    log = f"nginx-{port}.log"
    configuration = folder / f"nginx-{port}.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            user="user root;" if os.geteuid() == 0 else "",  # else its workers may not enter the folder
            folder=folder,
            log=log,
            servers="\n        ".join(f"server 127.0.0.1:{each} max_fails=1 fail_timeout=5s;" for each in ports),
            port=port,
            read_timeout=read_timeout,
            tries=tries,
        ),
        encoding="utf-8",
    )
    process = subprocess.Popen([NGINX, "-p", folder, "-c", configuration, "-e", folder / "nginx-error.log"])
    try:
        _wait_until_listening(port, process)
        yield Nginx(f"http://127.0.0.1:{port}", folder / log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def _wait_until_listening(port: int, process: subprocess.Popen[bytes], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "nginx has ended"
        try:
            httpx.get(f"http://127.0.0.1:{port}/nginx", timeout=seconds)
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("nginx does not listen")
