"""Keys as operators and clients meet them: a real server with a file of keys, their shares, and what stays apart."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.spellings import GUARDED, NO_PATHS
from tests.api.spellings import ask as ask_raw
from tests.engines import noise_image, png
from tests.serving import SMALL, Server, running_server

ALICE, BOB, NARROW, POOR = (f"sk-{name}-canary-0123456789" for name in ("alice", "bob", "narrow", "poor"))
FILE = f"""# canary: comments are not told either
alice={ALICE}
bob={BOB}
narrow={NARROW}  max_reqs=1
poor={POOR}  tokens_per_minute=60
"""


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text(FILE)
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, key_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {"IDEFICS2_API_KEY": f"fifth={ALICE}5", "IDEFICS2_API_KEY_FILE": str(key_file)}
    with running_server(tiny_checkpoint, log, *SMALL, **environment) as running:
        running.headers = bearer(ALICE)
        yield running
        running.wait_until_idle()
        assert running.stop() == 0
    assert "canary" not in log.read_text()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def picture(seed: int) -> dict[str, Any]:
    content = base64.b64encode(png(noise_image(60, 40, seed))).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}", "detail": "low"}}


def ask(server: Server, key: str, *parts: dict[str, Any], **fields: Any) -> httpx.Response:
    words = {
        "type": "text",
        "text": "What is this of the canary, in a sentence that fills more than a block of tokens?"[::1],
    }
    body = {"messages": [{"role": "user", "content": [*parts, words]}], "max_tokens": 2, "temperature": 0, **fields}
    return httpx.post(f"{server.base_url}/v1/chat/completions", json=body, headers=bearer(key), timeout=60)


def is_limited(answer: httpx.Response) -> bool:
    return (
        answer.status_code == 429
        and answer.json()["error"]["code"] == "rate_limit_exceeded"
        and answer.json()["error"]["type"] == "rate_limit_error"
        and 1 <= int(answer.headers["retry-after"]) <= 120
    )


# -- what one key learns of another -----------------------------------------------------------------------------------


def found(server: Server, key: str, seed: int, **fields: Any) -> tuple[bool, bool, bool]:
    """Whether a prompt with this picture finds its blocks, its decoded picture and its embedded tile."""
    before = {name: server.metric(name) for name in ("image_cache_hits_total", "tiles_encoded_total")}
    answer = ask(server, key, picture(seed), **fields)
    assert answer.status_code == 200, answer.text
    server.wait_until_idle()
    hits, encoded = (server.metric(name) - value for name, value in before.items())
    return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, hits > 0, encoded == 0


def test_no_cache_tells_one_key_what_another_has_sent(server: Server) -> None:
    assert found(server, ALICE, seed=1) == (False, False, False)
    assert found(server, BOB, seed=1) == (False, False, False)
    assert found(server, ALICE, seed=1) == (True, True, True)
    assert found(server, BOB, seed=1) == (True, True, True)


def test_no_salt_of_a_clients_choice_leads_into_another_keys_caches(server: Server) -> None:
    assert found(server, ALICE, seed=2, cache_salt="x") == (False, False, False)
    for salt in ("x", "5:alice:x", "alice:x", "alice"):
        assert found(server, BOB, seed=2, cache_salt=salt) == (False, False, False)
    assert found(server, ALICE, seed=2, cache_salt="x") == (True, True, True)


def test_keys_share_caches_where_the_operator_says_so(tiny_checkpoint: Path, key_file: Path, tmp_path: Path) -> None:
    flags = ("--api-key-file", str(key_file), "--share-caches-between-keys", "--engine-client", "thread")
    with running_server(tiny_checkpoint, tmp_path / "log", *SMALL, *flags) as server:
        server.headers = bearer(ALICE)
        assert found(server, ALICE, seed=1) == (False, False, False)
        assert found(server, BOB, seed=1) == (True, True, True)
        assert found(server, BOB, seed=1, cache_salt="x") == (False, False, False)


# -- what a key may have ----------------------------------------------------------------------------------------------


def test_a_key_has_so_many_requests_at_a_time_and_others_are_not_concerned(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=server.base_url, headers=bearer(NARROW), timeout=60) as http:
        with http.stream("POST", "/v1/chat/completions", json=body) as stream:
            assert stream.status_code == 200
            events = stream.iter_raw()
            next(events)
            limited = ask(server, NARROW)
            assert is_limited(limited)
            assert "this API key has 1 requests running or waiting, the limit is 1" in limited.text
            assert ask(server, BOB).status_code == 200
        server.wait_until_idle()
    assert ask(server, NARROW).status_code == 200


def test_a_key_has_so_many_tokens_a_minute(server: Server) -> None:
    first = ask(server, POOR, max_tokens=100, ignore_eos=True)
    assert first.status_code == 200
    limited = ask(server, POOR)
    assert is_limited(limited)
    assert "the limit is 60" in limited.text
    assert int(limited.headers["retry-after"]) > 30
    assert ask(server, BOB).status_code == 200


# -- clients and operators --------------------------------------------------------------------------------------------


def test_openais_client_with_the_right_and_a_wrong_key(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key=BOB) as client:
        assert client.models.list().data
    with (
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="sk-wrong-canary") as client,
        pytest.raises(openai.AuthenticationError, match="incorrect API key provided"),
    ):
        client.models.list()


def test_no_spelling_of_a_path_is_open(server: Server) -> None:
    for target in GUARDED:
        for method in ("GET", "POST"):
            assert ask_raw(server.base_url, f"{method} {target}")[0] == 401, target
    for target in NO_PATHS:
        status, body = ask_raw(server.base_url, f"GET {target}")
        assert status in (0, 400, 401, 404), target
        assert b'"ok"' not in body
    assert ask_raw(server.base_url, "GET /health") == (200, b'{"status":"ok"}')


def test_requests_are_counted_by_key(server: Server) -> None:
    statuses = [
        httpx.get(f"{server.base_url}{path}", headers=bearer(f"{ALICE}5")).status_code
        for path in ("/v1/models", "/v1/models", "/nothing")
    ]
    assert statuses == [200, 200, 404]
    assert server.metric("requests_by_key_total", 'key="fifth",outcome="answered"') == 2
    assert server.metric("requests_by_key_total", 'key="fifth",outcome="refused"') == 1


def test_the_log_begins_with_the_settings_without_secrets(server: Server, key_file: Path) -> None:
    (line,) = re.findall(r"configuration: (\{.*\})", server.log.read_text())
    told = json.loads(line)
    assert told["api_key"] == "***"
    assert told["api_key_file"] == str(key_file)
    assert (told["max_num_seqs"], told["max_num_queued_reqs"]) == (8, 512)


def test_neither_log_nor_errors_nor_metrics_tell_what_was_sent(server: Server) -> None:
    url = f"{server.base_url}/v1/chat/completions"
    broken = {"type": "image_url", "image_url": {"url": f"data:;base64,{ALICE}"}}
    bad: list[dict[str, Any]] = [
        {"messages": [{"role": "canary", "content": "x"}]},
        {"messages": [{"role": "user", "content": "canary " * 3000}]},
        {"messages": [{"role": "user", "content": "x"}], "model": ALICE},
        {"messages": [{"role": "user", "content": "x"}], "temperature": ALICE},
        {"messages": [{"role": "user", "content": [broken]}]},
        {"messages": [{"role": "user", "content": "x"}], "structured_outputs": {"regex": "(canary"}},
    ]
    told = [httpx.post(url, json=body, headers=bearer(BOB)).text for body in bad]
    told.append(httpx.post(url, content=b"{canary", headers=bearer(BOB)).text)
    told += [httpx.get(f"{url}?key={ALICE}", headers=bearer(key)).text for key in (BOB, f"{BOB}x")]
    told.append(httpx.get(f"{server.base_url}/metrics", headers=bearer(BOB)).text)
    deadline = time.monotonic() + 10
    while server.log.read_text().count(" by bob") < 9:  # the log of an answer is written behind it
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not [text for text in (*told, server.log.read_text()) if "canary" in text]
