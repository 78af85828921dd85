"""A real nginx with the configuration that is shipped, in front of real servers on loopback."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.deploy import timed_server
from tests.serving import ROOT, SMALL, clean_environment, command, free_port

START_SECONDS = 60.0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Those that need Debian's nginx are run by `make test-deploy`."""
    return True if collection_path.name == "test_nginx.py" and config.getoption("markexpr") != "deploy" else None


@dataclass
class Replica:
    """A server that may be ended and started again at its port, as a container is."""

    checkpoint: Path
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        flags = ("--port", str(self.port), "--shutdown-timeout", "60")
        with (self.folder / f"{self.port}.log").open("ab") as log:
            self.process = subprocess.Popen(
                command("serve", str(self.checkpoint), *SMALL, *flags, module=timed_server.__name__),
                cwd=ROOT,
                env=clean_environment(**{timed_server.TIMES_FOLDER: str(self.folder)}),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.answers("ready"):
            assert time.monotonic() < deadline, (self.folder / f"{self.port}.log").read_text()
            time.sleep(0.1)

    def answers(self, check: str) -> bool:
        """Whether a probe of that name succeeds within a second."""
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health/{check}", timeout=1.0).status_code == 200
        return False

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self, seconds: float = 90.0) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def replicas(checkpoint: Path, folder: Path, count: int) -> Iterator[list[Replica]]:
    started = [Replica(checkpoint, folder, free_port()) for _ in range(count)]
    try:
        for replica in started:
            replica.start()
        for replica in started:
            replica.wait_until_ready()
        yield started
    finally:
        for replica in started:
            replica.kill()


@contextmanager
def nginx(folder: Path, backends: Sequence[Replica]) -> Iterator[str]:
    """The shipped nginx.conf at a port of its own, with these servers in place of those of the compose file."""
    binary = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    assert binary, "these tests need Debian's nginx"
    port = free_port()
    shipped = ROOT / "deploy" / "nginx"
    config = (shipped / "nginx.conf").read_text(encoding="utf-8")
    for place, own in (("listen 8080;", f"listen 127.0.0.1:{port};"), ("/tmp/nginx", f"{folder}/nginx")):
        assert place in config
        config = config.replace(place, own)
    upstreams = (shipped / "upstreams.conf").read_text(encoding="utf-8").splitlines()
    (example,) = [line for line in upstreams if "replica-1:8000" in line]
    lines = [line for line in upstreams if "replica-" not in line]
    place = lines.index("    least_conn;") + 1
    lines[place:place] = [example.replace("replica-1:8000", f"127.0.0.1:{backend.port}") for backend in backends]
    (folder / "nginx.conf").write_text(config, encoding="utf-8")
    (folder / "upstreams.conf").write_text("\n".join(lines), encoding="utf-8")
    arguments = [binary, "-p", str(folder), "-c", str(folder / "nginx.conf")]
    subprocess.run([*arguments, "-t"], check=True, capture_output=True)
    with (folder / "nginx.log").open("wb") as log:
        process = subprocess.Popen([*arguments, "-g", "daemon off;"], stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health/balancer").status_code == 200:
                    break
            assert process.poll() is None, (folder / "nginx.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGQUIT)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def three(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[Replica]]]:
    """nginx in front of three."""
    folder = tmp_path_factory.mktemp("three")
    with replicas(tiny_checkpoint, folder, 3) as backends, nginx(folder, backends) as url:
        yield url, backends
