"""Asks POST /v1/completions, and holds every answer against its description."""

from __future__ import annotations

from typing import Any

import httpx

from server.api.completions.protocol import Completion
from server.types import PromptInput
from tests.api.prompt_llm import PromptLLM


class Asker:
    """Posts bodies to the endpoint."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.url = url
        self._client = client

    def post(self, prompt: Any = "Two cats", **fields: Any) -> httpx.Response:
        return self._client.post(f"{self.url}/v1/completions", json={"prompt": prompt, **fields})

    def __call__(self, prompt: Any = "Two cats", **fields: Any) -> Any:
        answer = self.post(prompt, **fields)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        # Every answer is what the OpenAPI page says of it, with no key more or less.
        assert Completion.model_validate(body).model_dump(mode="json") == body
        return body

    def choices(self, prompt: Any = "Two cats", **fields: Any) -> Any:
        return self(prompt, **fields)["choices"]

    def error(self, prompt: Any = "Two cats", **fields: Any) -> tuple[int, str, str]:
        answer = self.post(prompt, **fields)
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["param"]


def prompts(llm: PromptLLM) -> list[str | tuple[int, ...]]:
    return [item.prompt for item in llm.items if isinstance(item, PromptInput)]


def only_item(llm: PromptLLM) -> PromptInput:
    (item,) = llm.items
    assert isinstance(item, PromptInput)
    return item
