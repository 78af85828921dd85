"""An application that says what it was asked, and answers with the path and the body."""

from __future__ import annotations

import asyncio

from starlette.types import Receive, Scope, Send


class Recorder:
    """Keeps (method, path, headers, body) of every request; `/late` is answered after half a second."""

    def __init__(self, answer: bytes | None = None) -> None:
        self.requests: list[tuple[str, str, list[tuple[bytes, bytes]], bytes]] = []
        self.disconnects = 0
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.requests.append((scope["method"], scope["path"], list(scope["headers"]), body))
        if scope["path"] == "/late":
            await asyncio.sleep(0.5)
        if scope["path"] == "/never":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.disconnects += 1
            return
        answer = self._answer if self._answer is not None else f"{scope['path']} {body.decode()}\n".encode()
        headers = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})
