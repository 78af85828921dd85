"""Completions are asked of a model with a vocabulary, a tokenizer and probabilities."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.api.completions.client import Asker
from tests.api.prompt_llm import PromptLLM


@pytest.fixture(scope="module")
def llm_type() -> type[PromptLLM]:
    return PromptLLM


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=10) as client:
        yield client


@pytest.fixture
def ask(url: str, http: httpx.Client) -> Asker:
    return Asker(url, http)
