"""What is asked of the server before the load: is it ready, what does it serve, how does it count tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

TokenCounter = Callable[[str], int]

POLL_SECONDS = 0.5


class TargetError(Exception):
    """The server cannot be measured; the message says what it answered."""


class Target:
    """An OpenAI-compatible server. `base_url` is given with or without the closing `/v1`. Use as a context manager."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        self.root = base_url.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # No proxies from the environment: one in the way would be measured too.
        self._client = httpx.Client(headers=self.headers, timeout=10.0, trust_env=False)

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def chat_url(self) -> str:
        return f"{self.root}/v1/chat/completions"

    def wait_ready(self, timeout: float) -> list[str]:
        """The ids of the models served, asked for until there is an answer or `timeout` seconds have gone.

        A refusal that waiting does not cure (no such path, wrong key) ends the wait at once. Raises TargetError.
        """
        deadline = time.monotonic() + timeout
        url = f"{self.root}/v1/models"
        while True:
            try:
                response = self._client.get(url)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise TargetError(f"{url}: {error}") from None
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            else:
                if response.status_code == 200:
                    return _model_ids(url, response)
                reason = f"HTTP {response.status_code}"
                if response.status_code < 500 and response.status_code != 429:
                    raise TargetError(f"{url} answered {reason}")
            if time.monotonic() + POLL_SECONDS > deadline:
                raise TargetError(f"{url} is not ready after {timeout:g} s: {reason}")
            time.sleep(POLL_SECONDS)

    def count_tokens(self, model: str, text: str) -> int | None:
        """Tokens of `text` by the server's own /tokenize, without special tokens; None where it has none."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            return _count(self._client.post(f"{self.root}/tokenize", json=body))
        except httpx.HTTPError:
            return None


def _model_ids(url: str, response: httpx.Response) -> list[str]:
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise TargetError(f"{url} did not answer with a list of models") from None


def _count(response: httpx.Response) -> int | None:
    """The count in a /tokenize answer: `count`, or the length of `tokens`; None when it holds neither."""
    if response.status_code != 200:
        return None
    try:
        answer: Any = response.json()
    except ValueError:
        return None
    if not isinstance(answer, dict):
        return None
    if isinstance(answer.get("count"), int):
        return int(answer["count"])
    return len(answer["tokens"]) if isinstance(answer.get("tokens"), list) else None
