"""A server for each module, with a scripted model behind it. Packages and modules override what theirs is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.api.scripted_llm import ScriptedLLM, serving


@pytest.fixture(scope="module")
def llm_type() -> type[ScriptedLLM]:
    return ScriptedLLM


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module", params=[False, True], ids=["quiet", "injecting"])
def injects(request: pytest.FixtureRequest) -> bool:
    """Two servers, where `settings` are made of it: one keeps the tools to itself, the other tells the model."""
    return bool(request.param)


@pytest.fixture(scope="module")
def server(llm_type: type[ScriptedLLM], settings: dict[str, Any]) -> Iterator[tuple[ScriptedLLM, str]]:
    """One for the module, because starting and stopping one takes longer than any test."""
    llm = llm_type()
    with serving(llm, **settings) as url:
        yield llm, url


@pytest.fixture
def llm(server: tuple[ScriptedLLM, str]) -> ScriptedLLM:
    server[0].reset()
    return server[0]


@pytest.fixture
def url(llm: ScriptedLLM, server: tuple[ScriptedLLM, str]) -> str:
    return server[1]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made
