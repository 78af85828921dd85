"""`schemathesis run` over the server's own OpenAPI document: what it allows, what it nearly allows, and its limits.

No answer may be a 5xx, and every answer must be one that the document describes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.programs import SCHEMATHESIS
from tests.serving import Server, running_server

pytestmark = pytest.mark.clients

LEAST_CASES = 5_000
EXAMPLES = 250  # for each operation, beside those that it makes from limits
# Much of what it asks has no `max_tokens`, and means all that the context has room for.
SMALL = ("--dtype", "float32", "--max-model-len", "192", "--max-num-seqs", "32", "--kv-cache-memory-gb", "0.1")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


@pytest.fixture
def small_server(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    fast = ("--image-fetch-timeout", "0.5", "--num-threads", "1")
    with running_server(checkpoint, tmp_path / "log", *SMALL, *fast) as running:
        yield running
        running.wait_until_idle()
        assert running.metric("kv_cache_usage_perc") == 0
    assert "Traceback" not in running.log.read_text()


def test_no_5xx_and_no_answer_that_the_document_does_not_describe(small_server: Server, tmp_path: Path) -> None:
    done = SCHEMATHESIS.found().run(
        *("run", f"{small_server.base_url}/openapi.json", "--phases", "examples,coverage,fuzzing"),
        *("--max-examples", str(EXAMPLES), "--seed", "1", "--request-timeout", "120", "--continue-on-failure"),
        *("--checks", ",".join(CHECKS), "--warnings", "off"),
        seconds=3000,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    generated = re.search(r"([0-9,]+) generated", done.stdout)
    assert generated is not None, done.stdout[-2_000:]
    assert int(generated[1].replace(",", "")) >= LEAST_CASES
