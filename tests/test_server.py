"""The whole server as a client meets it: a real process, real sockets, the unmodified `openai` client."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.engines import noise_image, png
from tests.serving import ROOT, SMALL, Server, checked_server, clean_environment, command, running_server

pytestmark = pytest.mark.slow


def data_url(width: int, height: int, seed: int) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(noise_image(width, height, seed))).decode()}"


def picture(url: str, detail: str | None = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": detail} if detail else {})}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    names = ("--served-model-name", "tiny", "org/tiny")
    with checked_server(tiny_checkpoint, log, *SMALL, *names) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, *messages: dict[str, Any], **options: Any) -> Any:
    options = {"temperature": 0, "max_completion_tokens": 12, **options}
    return client.chat.completions.create(model="tiny", messages=list(messages), **options)


def test_models_by_every_name(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data[:1]
    assert model.id == "tiny"
    assert client.models.retrieve("org/tiny").id in ("tiny", "org/tiny")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_detail_decides_the_tokens_of_a_picture(client: openai.OpenAI) -> None:
    url = data_url(500, 400, seed=1)
    usage = {detail: ask(client, user(picture(url, detail), "What is this?")).usage for detail in ("low", "high", None)}
    assert usage["high"].prompt_tokens - usage["low"].prompt_tokens == 260
    assert usage["low"].prompt_tokens_details.image_tokens == 64
    assert usage["high"].prompt_tokens_details.image_tokens == 320
    assert usage[None].prompt_tokens == usage["high"].prompt_tokens  # the checkpoint splits by default


def test_stream_equals_plain_answer_in_text_and_usage(client: openai.OpenAI) -> None:
    message = user("Look: ", picture(data_url(300, 500, seed=2)), " and tell.")
    plain = ask(client, message, max_completion_tokens=40)
    stream = ask(client, message, max_completion_tokens=40, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        plain.choices[0].message.content
    )
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == plain.usage.prompt_tokens
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [reason for reason in reasons if reason] == [plain.choices[0].finish_reason]


def test_second_turn_reports_its_cache_and_encodes_nothing(server: Server, client: openai.OpenAI) -> None:
    first = user(picture(data_url(640, 480, seed=3), "high"), "What is on the table?")
    answer = ask(client, first)
    before = server.metric("tiles_encoded_total")
    second = ask(
        client, first, {"role": "assistant", "content": answer.choices[0].message.content}, user("And behind it?")
    )
    assert second.usage.prompt_tokens_details.cached_tokens > 326
    assert server.metric("tiles_encoded_total") == before


def test_same_words_with_another_picture_get_another_answer(client: openai.OpenAI) -> None:
    answers = {
        ask(client, user(picture(data_url(400, 400, seed)), "Colour?"), temperature=1, seed=0)
        .choices[0]
        .message.content
        for seed in range(4)
    }
    assert len(answers) == 4


def test_order_of_pictures_matters(client: openai.OpenAI) -> None:
    a, b = picture(data_url(400, 400, seed=10), "low"), picture(data_url(400, 400, seed=11), "low")
    ab, ba = (
        ask(client, user(*pair, "Which?"), temperature=1, seed=0, max_completion_tokens=64) for pair in ((a, b), (b, a))
    )
    assert ab.choices[0].message.content != ba.choices[0].message.content
    assert ab.usage.prompt_tokens == ba.usage.prompt_tokens


def test_special_tokens_in_text_are_plain_characters(client: openai.OpenAI) -> None:
    plain = ask(client, user("one <image> two </s><end_of_utterance> three"))
    assert plain.usage.prompt_tokens > 20  # spelled out; as special ids they would make it 14
    assert plain.usage.prompt_tokens_details.image_tokens == 0


def test_image_tokens_cannot_be_sampled(client: openai.OpenAI) -> None:
    answer = ask(
        client,
        user("x"),
        logit_bias={"32000": 100, "32001": 100, "1824": 99},
        extra_body={"skip_special_tokens": False, "ignore_eos": True},
    )
    assert answer.choices[0].message.content == " ".join(["What"] * 12)


def test_length_controls(client: openai.OpenAI) -> None:
    exact = ask(client, user("x"), max_completion_tokens=64, extra_body={"ignore_eos": True})
    assert (exact.usage.completion_tokens, exact.choices[0].finish_reason) == (64, "length")
    forced_end = {"2": 100}
    stopped = ask(client, user("x"), logit_bias=forced_end)
    assert (stopped.usage.completion_tokens, stopped.choices[0].finish_reason) == (1, "stop")
    assert stopped.choices[0].message.content == ""
    later = ask(client, user("x"), logit_bias=forced_end, extra_body={"min_tokens": 9})
    assert (later.usage.completion_tokens, later.choices[0].finish_reason) == (10, "stop")
    asked_too_much = ask(client, user("x"), max_completion_tokens=10**9, logit_bias=forced_end)
    assert asked_too_much.choices[0].finish_reason == "stop"


def test_stop_strings_never_leak_a_part(client: openai.OpenAI) -> None:
    whole = ask(client, user("Tell me"), max_completion_tokens=30).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 6]
    expected = whole[: whole.index(stop)]
    plain = ask(client, user("Tell me"), max_completion_tokens=30, stop=[stop])
    assert plain.choices[0].message.content == expected
    assert plain.choices[0].finish_reason == "stop"
    assert plain.choices[0].stop_reason == stop
    seen = ""
    for chunk in ask(client, user("Tell me"), max_completion_tokens=30, stop=[stop], stream=True):
        seen += chunk.choices[0].delta.content or ""
        assert expected.startswith(seen)
    assert seen == expected
    kept = ask(
        client, user("Tell me"), max_completion_tokens=30, stop=stop, extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].message.content == expected + stop


def test_a_seed_gives_one_answer_alone_and_in_a_crowd(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        answer = ask(client, user("Tell me"), temperature=1, seed=seed, max_completion_tokens=24)
        content: str = answer.choices[0].message.content
        return content

    alone = draw(7)
    with ThreadPoolExecutor(12) as pool:
        crowd = list(pool.map(draw, [7, *range(100, 110), 7]))
    assert crowd[0] == crowd[-1] == alone
    assert len(set(crowd)) == 11


def test_a_busy_hour_in_small_every_answer_as_if_alone(server: Server, client: openai.OpenAI) -> None:
    """More requests than slots: texts, one and several pictures, streams, each compared with itself alone."""
    conversations = [
        user(*[picture(data_url(380 + 10 * i, 390, seed=20 + i), "low") for _ in range(i % 4)], f"Question {i}?")
        for i in range(24)
    ]
    alone = [ask(client, message).choices[0].message.content for message in conversations]

    def stream(message: dict[str, Any]) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, message, stream=True))

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(stream, conversations)) == alone
    server.wait_until_idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server: Server, stream: bool) -> None:
    body = {
        "messages": [user(picture(data_url(900, 700, seed=40)), "Go on")],
        "max_tokens": 1500,
        "ignore_eos": True,
        "stream": stream,
    }
    before = server.metric("requests_total", 'finish_reason="abort"')

    async def leave(after: float) -> None:
        async with httpx.AsyncClient() as http:
            task = asyncio.create_task(http.post(f"{server.base_url}/v1/chat/completions", json=body))
            await asyncio.sleep(after)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def storm() -> None:
        await asyncio.gather(*(leave(after) for after in (0.0, 0.05, 0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 1.5, 1.5)))

    asyncio.run(storm())
    server.wait_until_idle()
    assert server.metric("kv_cache_usage_perc") == 0
    assert server.metric("requests_total", 'finish_reason="abort"') > before


BAD = [
    ({"messages": []}, "messages", "empty_array"),
    ({"messages": [{"role": "user", "content": "x" * 200_000}]}, "messages", "context_length_exceeded"),
    ({"messages": [user("x ", *["word " * 400] * 6)]}, "messages", "context_length_exceeded"),
    ({"messages": [user("x")], "temperature": 3}, "temperature", None),
    ({"messages": [user("x")], "logit_bias": {"99999999": 1}}, "logit_bias", None),
    ({"messages": [user(*[picture("data:,x")] * 17)]}, "messages", "too_many_images"),
    (
        {"messages": [user("x", picture("data:image/png;base64,AAAA"))]},
        "messages[0].content[1].image_url.url",
        "invalid_image_format",
    ),
    (
        {"messages": [user(picture("data:image/png;base64,@@@@"))]},
        "messages[0].content[0].image_url.url",
        "invalid_base64_image",
    ),
    (
        {"messages": [user(picture("http://127.0.0.1/x.png"))]},
        "messages[0].content[0].image_url.url",
        "invalid_image_url",
    ),
    (
        {"messages": [user(picture("file:///etc/passwd"))]},
        "messages[0].content[0].image_url.url",
        "invalid_image_url",
    ),
    ({"messages": [user("x")], "n": 17}, "n", "integer_above_max_value"),
]


@pytest.mark.parametrize(("body", "param", "code"), BAD, ids=[f"{p}-{c}" for _, p, c in BAD])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_a_400_that_names_the_field(
    server: Server, body: dict[str, Any], param: str, code: str | None, stream: bool
) -> None:
    response = httpx.post(f"{server.base_url}/v1/chat/completions", json={**body, "stream": stream}, timeout=30)
    error = response.json()["error"]
    assert response.status_code == 400, error
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)
    assert code is None or error["code"] == code
    assert "xxxx" not in json.dumps(error)
    assert len(json.dumps(error)) < 600


def test_refused_pictures_are_counted_by_reason(server: Server) -> None:
    def count() -> float:
        found = re.findall(r'image_errors_total{[^}]*code="empty_image_file"[^}]*} (\S+)', metrics())
        return float(found[0]) if found else 0.0

    def metrics() -> str:
        return httpx.get(f"{server.base_url}/metrics").text

    before = count()
    body = {"messages": [user(picture("data:image/png;base64,"))]}
    assert httpx.post(f"{server.base_url}/v1/chat/completions", json=body).status_code == 400
    assert count() == before + 1


def test_streams_go_on_while_others_send_rubbish(server: Server, client: openai.OpenAI) -> None:
    alone = ask(client, user("Steady"), max_completion_tokens=200, extra_body={"ignore_eos": True})
    rubbish: list[bytes] = [b"{", b"", b"\xff", b"[]", json.dumps({"messages": 3}).encode(), b'{"messages": NaN}']

    def send(body: bytes) -> int:
        headers = {"content-type": "application/json"}
        return httpx.post(f"{server.base_url}/v1/chat/completions", content=body, headers=headers).status_code

    with ThreadPoolExecutor(4) as pool:
        steady = pool.submit(
            lambda: list(
                ask(client, user("Steady"), max_completion_tokens=200, extra_body={"ignore_eos": True}, stream=True)
            )
        )
        statuses = set(pool.map(send, rubbish * 20))
        content = "".join(chunk.choices[0].delta.content or "" for chunk in steady.result())
    assert statuses == {400}
    assert content == alone.choices[0].message.content


def test_thread_client_gives_the_same_answers(tiny_checkpoint: Path, tmp_path: Path, client: openai.OpenAI) -> None:
    message = user(picture(data_url(500, 400, seed=1)), "What is this?")
    wanted = ask(client, message).choices[0].message.content
    with running_server(tiny_checkpoint, tmp_path / "log", *SMALL, "--engine-client", "thread") as threaded:
        body = {"messages": [message], "temperature": 0, "max_tokens": 12}
        got = httpx.post(f"{threaded.base_url}/v1/chat/completions", json=body, timeout=30).json()
        assert got["choices"][0]["message"]["content"] == wanted
        assert threaded.stop() == 0


def test_sigterm_lets_a_running_stream_finish(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with running_server(tiny_checkpoint, tmp_path / "log", *SMALL) as server:
        body = {"messages": [user("Go")], "max_tokens": 100, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{server.base_url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            started = time.monotonic()
            server.process.terminate()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(20) == 0
        assert time.monotonic() - started < 20


def test_a_stream_that_outlasts_the_drain_ends_with_an_error_event(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with running_server(tiny_checkpoint, tmp_path / "log", *SMALL, "--shutdown-timeout", "0.5") as server:
        body = {"messages": [user("Go")], "max_tokens": 1900, "ignore_eos": True, "stream": True, "temperature": 0}
        with httpx.stream("POST", f"{server.base_url}/v1/chat/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.terminate()
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        error = json.loads(rest[-2].removeprefix("data: "))["error"]
        assert error["code"] == "server_shutting_down"
        assert server.process.wait(20) == 0


def test_a_config_json_alone_is_enough_for_dummy_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "only config"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    flags = (*SMALL, "--load-format", "dummy")
    with running_server(folder, tmp_path / "log", *flags, XDG_CACHE_HOME=str(tmp_path)) as server:
        body = {"messages": [user(picture(data_url(50, 60, seed=1)), "x")], "max_tokens": 3, "ignore_eos": True}
        answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=30).json()
        assert answer["usage"]["completion_tokens"] == 3
        assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 320


def run_cli(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args), cwd=ROOT, env=clean_environment(**environment), capture_output=True, text=True, timeout=120
    )


def test_a_start_that_cannot_work_says_why_in_one_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text("max_num_seq: 4\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (run_cli("serve", "--config", str(config)), "unknown key 'max_num_seq'; did you mean 'max_num_seqs'?"),
        (run_cli("serve", IDEFICS2_PROT="1"), "environment: unknown key 'prot'"),
        (run_cli("serve", "--prot", "1"), "unrecognized arguments: --prot"),
        (run_cli("serve", "--api-key-file", str(config)), f"{config}:1: behind the key"),
        (run_cli("serve", str(empty)), "config.json"),
        (run_cli("serve", "nobody/nothing"), "nobody/nothing"),
        (run_cli("serve", str(tiny_checkpoint), "--max-model-len", "65536"), "more than the model's 32768"),
        (run_cli("serve", str(tiny_checkpoint), "--kv-cache-memory-gb", "0.001", "--max-model-len", "8192"), "needs"),
    ]
    for done, message in cases:
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert "Traceback" not in done.stderr
