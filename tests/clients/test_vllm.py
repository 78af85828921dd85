"""`vllm bench serve`: every backend of its that this server has an endpoint for, with texts and with pictures.

What it measures is not looked at, only that it got all it asked for, and counted what it should.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.clients.programs import Program
from tests.clients.talk import MODEL
from tests.serving import Server

pytestmark = pytest.mark.clients

PROMPTS = 6
INPUT_TOKENS = 30
OUTPUT_TOKENS = 8
# Two pictures of 64 latents and more each, or of 320: the demo checkpoint splits pictures unless told otherwise.
PICTURES = (
    *("--random-mm-base-items-per-request", "2"),
    *("--random-mm-limit-mm-per-prompt", '{"image": 2, "video": 0}'),
    *("--random-mm-bucket-config", "{(64, 96, 1): 1.0}"),
)


@dataclass
class Bench:
    vllm: Program
    base_url: str
    checkpoint: Path
    result: Path

    def __call__(self, backend: str, endpoint: str, dataset: str, *more: str) -> tuple[dict[str, Any], str]:
        """The result file's content, and what was printed."""
        done = self.vllm.run(
            *("bench", "serve", "--backend", backend, "--endpoint", endpoint, "--base-url", self.base_url),
            *("--model", MODEL, "--tokenizer", str(self.checkpoint), "--dataset-name", dataset),
            *("--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(OUTPUT_TOKENS)),
            *("--num-prompts", str(PROMPTS), "--max-concurrency", "3", "--ready-check-timeout-sec", "30"),
            *("--save-result", "--save-detailed", "--disable-tqdm"),
            *("--result-dir", str(self.result.parent), "--result-filename", self.result.name),
            *more,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(self.result.read_text())
        assert result["errors"] == [""] * PROMPTS
        assert result["completed"] == PROMPTS
        assert result["failed"] == 0
        return result, done.stdout + done.stderr


@pytest.fixture
def bench(vllm: Program, server: Server, checkpoint: Path, tmp_path: Path) -> Bench:
    return Bench(vllm, server.base_url, checkpoint, tmp_path / "result.json")


def test_chat(bench: Bench) -> None:
    result, printed = bench("openai-chat", "/v1/chat/completions", "random", "--logprobs", "2", "--seed", "1")
    assert result["output_lens"] == [OUTPUT_TOKENS] * PROMPTS
    assert all(result["generated_texts"])
    assert "tokenize unavailable" not in printed


def test_chat_with_pictures(bench: Bench) -> None:
    result, _ = bench("openai-chat", "/v1/chat/completions", "random-mm", *PICTURES)
    assert result["output_lens"] == [OUTPUT_TOKENS] * PROMPTS
    assert min(result["input_lens"]) > INPUT_TOKENS + 2 * 320


def test_completions(bench: Bench) -> None:
    """It trims its prompts through /tokenize and /detokenize until they have the length that was asked for."""
    result, printed = bench("openai", "/v1/completions", "random", "--ignore-eos")
    assert result["output_lens"] == [OUTPUT_TOKENS] * PROMPTS
    assert "tokenize unavailable" not in printed
    assert set(result["input_lens"]) <= {INPUT_TOKENS, INPUT_TOKENS + 1}


def test_responses(bench: Bench) -> None:
    result, _ = bench("openai-responses", "/v1/responses", "random")
    assert sum(result["output_lens"]) == OUTPUT_TOKENS * PROMPTS
