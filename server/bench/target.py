"""What is asked of the server before the load: is it ready, what does it serve, how does it count tokens."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx

from server.bench.workloads import TokenCounter, Vocabulary, find_vocabulary

POLL_SECONDS = 0.5

_RESIDENT = re.compile(r"^process_resident_memory_bytes(?:\{.*\})? (\S+)", re.MULTILINE)
_ENGINE_RESIDENT = re.compile(r"^idefics2:engine_resident_memory_bytes(?:\{.*\})? (\S+)", re.MULTILINE)


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

    def resident_memory(self) -> float | None:
        """Bytes that the process behind /metrics holds, and its engine's where it tells of that; None where it does not
        say.
        """
        try:
            response = self._client.get(f"{self.root}/metrics")
        except httpx.HTTPError:
            return None
        found = _RESIDENT.search(response.text) if response.status_code == 200 else None
        engine = _ENGINE_RESIDENT.search(response.text)
        return float(found[1]) + (float(engine[1]) if engine else 0.0) if found else None


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


def choose_vocabulary(target: Target, model: str, tokenizer: Path | None) -> Vocabulary:
    """Words counted by the server, else by a local tokenizer, else taken for a token each."""
    if target.count_tokens(model, "the") is not None:
        return find_vocabulary(lambda text: target.count_tokens(model, text) or 0, source="the server's /tokenize")
    if tokenizer is not None:
        return find_vocabulary(_load_tokenizer(tokenizer), source=str(tokenizer))
    return find_vocabulary(None, source="")


def _load_tokenizer(folder: Path) -> TokenCounter:
    if not folder.is_dir():
        raise TargetError(f"--tokenizer: there is no folder {folder}")
    # Imported here: it takes seconds, and most runs ask the server.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
