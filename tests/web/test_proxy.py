"""The page behind a proxy that puts a path before everything and takes it off again."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import expect

from tests.serving import Server
from tests.web.playground import Playground

pytestmark = pytest.mark.web

PREFIX = "/some/where"


@pytest.fixture
def proxied(server: Server) -> Iterator[str]:
    target = urlsplit(server.base_url)

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(f"{PREFIX}/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            behind = http.client.HTTPConnection(str(target.hostname), target.port, timeout=60)
            kept = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            behind.request(self.command, self.path.removeprefix(PREFIX), body, kept)
            answer = behind.getresponse()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            self.end_headers()
            while piece := answer.read1(65536):
                self.wfile.write(piece)
            behind.close()

        do_POST = do_GET  # noqa: N815 - the base's name

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        thread = threading.Thread(target=proxy.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{proxy.server_port}{PREFIX}/"
        proxy.shutdown()
        thread.join()


def test_all_addresses_are_relative(open_page: Callable[..., Playground], proxied: str) -> None:
    page = open_page(proxied)
    expect(page.page.get_by_label("Model")).to_have_value("tiny")
    expect(page.page.locator("#samples img")).not_to_have_count(0)
    page.set(Max_tokens=4)
    expect(page.ask("Hello")).to_have_attribute("data-state", "complete")
    page.button("Request").click()
    assert f"{proxied}v1/chat/completions" in page.snippet("curl")
    assert all(address.startswith((proxied, "data:", "blob:")) for address in page.requested)
