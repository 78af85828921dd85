"""`guidellm run`: its three request formats, with texts and with pictures.

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

REQUESTS = 6
OUTPUT_TOKENS = 8
TEXT = f"kind=synthetic_text,prompt_tokens=30,output_tokens={OUTPUT_TOKENS}"
PICTURE = "kind=synthetic_image,width=96,height=64"


@dataclass
class Bench:
    guidellm: Program
    base_url: str
    checkpoint: Path
    result: Path

    def __call__(self, request_format: str, *data: str, profile: str = "kind=concurrent,streams=2") -> dict[str, Any]:
        """The metrics of a run in which every request succeeded with all its tokens."""
        done = self.guidellm.run(
            *("run", "--backend"),
            f"kind=openai_http,target={self.base_url},model={MODEL},request_format={request_format}",
            *("--profile", profile, "--constraint", f"kind=max_requests,count={REQUESTS}"),
            *("--tokenizer", f"kind=huggingface_auto,model={self.checkpoint}"),
            *(part for source in data for part in ("--data", source)),
            *("--output", f"kind=json,path={self.result}", "--disable-console-interactive"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (benchmark,) = json.loads(self.result.read_text())["benchmarks"]
        metrics: dict[str, Any] = benchmark["metrics"]
        assert metrics["request_totals"] == {"successful": REQUESTS, "errored": 0, "incomplete": 0, "total": REQUESTS}
        for request in benchmark["requests"]["successful"]:
            assert request["output"]
            assert request["output_tokens"] == OUTPUT_TOKENS
        return metrics


@pytest.fixture
def bench(guidellm: Program, server: Server, checkpoint: Path, tmp_path: Path) -> Bench:
    return Bench(guidellm, server.base_url, checkpoint, tmp_path / "result.json")


def image_tokens(metrics: dict[str, Any]) -> float:
    found: float = metrics["image"]["tokens"]["input"]["successful"]["mean"]
    return found


def test_chat(bench: Bench) -> None:
    metrics = bench("/v1/chat/completions", TEXT)
    assert metrics["prompt_token_count"]["successful"]["min"] >= 30
    assert image_tokens(metrics) == 0
    assert metrics["time_to_first_token_ms"]["successful"]["min"] > 0


def test_chat_with_pictures(bench: Bench) -> None:
    assert image_tokens(bench("/v1/chat/completions", TEXT, PICTURE)) == 320


def test_completions_at_a_rate(bench: Bench) -> None:
    bench("/v1/completions", TEXT, profile="kind=constant,rate=20")


def test_responses(bench: Bench) -> None:
    bench("/v1/responses", TEXT)
