"""What clients send is in no error and in no line of the log, however much is logged."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.inputs.pictures import noise_png
from tests.serving import Server, running_server

CANARY = "zqSeCrEt"
KEY = f"sk-{CANARY}-key"
HEADERS = {"authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("privacy") / "log"
    flags = ("--max-model-len", "512", "--max-body-mb", "1", "--inject-tools")
    settings = {"IDEFICS2_API_KEY": f"someone={KEY}", "PYTHONASYNCIODEBUG": "1"}
    with running_server(tiny_checkpoint, log, *flags, module="tests.talkative", **settings) as made:
        yield made


def chat(content: Any = f"Say {CANARY}", **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, **fields}


def picture(file: bytes, kind: str = "png") -> list[dict[str, Any]]:
    url = f"data:image/{kind};base64,{base64.b64encode(file).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": CANARY}]


def linked(url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}]


def tool(name: str = f"look_up_{CANARY}", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "description": CANARY, "parameters": parameters}}


GOOD_PICTURE = noise_png(40, 30)
SCHEMA = {"type": "object", "properties": {CANARY: {"enum": [CANARY]}}, "required": [CANARY]}

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", chat()),
    ("/v1/chat/completions", chat(stream=True)),
    ("/v1/chat/completions", chat(picture(GOOD_PICTURE))),
    ("/v1/chat/completions", chat(stop=[CANARY], user=CANARY, metadata={CANARY: CANARY}, cache_salt=CANARY)),
    ("/v1/chat/completions", chat(structured_outputs={"choice": [CANARY]}, max_tokens=20)),
    ("/v1/chat/completions", chat(guided_json=SCHEMA, max_tokens=30)),
    ("/v1/chat/completions", chat(tools=[tool()], tool_choice="auto", unknown=CANARY, repeat_penalty=CANARY)),
    ("/v1/completions", {"prompt": CANARY, "echo": True, "max_tokens": 2}),
    ("/v1/responses", {"input": CANARY, "instructions": CANARY, "max_output_tokens": 4}),
    ("/tokenize", {"prompt": CANARY}),
]
BAD: list[tuple[str, Any]] = [
    ("/v1/chat/completions", chat(picture(GOOD_PICTURE[:40] + CANARY.encode() * 9))),
    ("/v1/chat/completions", chat(picture(CANARY.encode() * 50))),
    ("/v1/chat/completions", chat(picture(CANARY.encode(), kind=CANARY))),
    ("/v1/chat/completions", chat(linked(f"data:image/png;base64,{CANARY}!"))),
    ("/v1/chat/completions", chat(linked(f"http://127.0.0.1:1/{CANARY}?key={CANARY}"))),
    ("/v1/chat/completions", chat(linked(f"http://{CANARY}:{CANARY}@10.0.0.1/"))),
    ("/v1/chat/completions", chat(linked(f"http://{CANARY}.invalid/"))),
    ("/v1/chat/completions", chat(linked(f"file:///{CANARY}"))),
    ("/v1/chat/completions", chat(role=1, temperature=CANARY)),
    ("/v1/chat/completions", chat(stop=[CANARY] * 9)),
    ("/v1/chat/completions", chat(logit_bias={CANARY: 1})),
    ("/v1/chat/completions", chat(model=CANARY)),
    ("/v1/chat/completions", chat(cache_salt=f"{CANARY}@")),
    ("/v1/chat/completions", chat(tool_choice=CANARY)),
    ("/v1/chat/completions", chat(tools=[tool(f"{CANARY} {CANARY}")])),
    ("/v1/chat/completions", chat(tools=[tool(type=CANARY)], tool_choice="required")),
    ("/v1/chat/completions", chat(tools=[tool()], tool_choice={"type": "function", "function": {"name": CANARY}})),
    ("/v1/chat/completions", chat(regex=f"{CANARY}(")),
    ("/v1/chat/completions", chat(guided_grammar=f"start: {CANARY} /{CANARY}(/")),
    ("/v1/chat/completions", chat(guided_json={"$ref": f"#/{CANARY}"})),
    ("/v1/chat/completions", chat(guided_json={"type": "string", "pattern": f"{CANARY}("})),
    ("/v1/chat/completions", chat(guided_json=f"{{{CANARY}")),
    ("/v1/chat/completions", chat(regex="a?" * 9_000 + "a" * 9_000 + CANARY)),
    ("/v1/chat/completions", chat(chat_template=f"{{{{ {CANARY} }}}}")),
    ("/v1/chat/completions", chat(CANARY * 1_000)),
    ("/v1/chat/completions", {"messages": [{"role": CANARY, "content": CANARY}]}),
    ("/v1/chat/completions", {"messages": CANARY}),
    ("/v1/chat/completions", {"messages": [CANARY]}),
    ("/v1/completions", {"prompt": {CANARY: CANARY}}),
    ("/v1/responses", {"input": [{"type": CANARY, CANARY: CANARY}]}),
    ("/v1/responses", {"input": CANARY, "metadata": {CANARY: 5}}),
    ("/v1/responses", {"input": CANARY, "previous_response_id": CANARY}),
    ("/detokenize", {"tokens": [CANARY]}),
    ("/v1/chat/completions", f'{{"messages": "{CANARY}'),
    ("/v1/chat/completions", f"{CANARY}"),
    ("/v1/chat/completions", "x" + CANARY * 200_000),
    (f"/v1/chat/completions?{CANARY}={CANARY}", {}),
    (f"/tokenize?key={CANARY}", chat(n=CANARY)),
]


def post(server: Server, path: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, str) else json.dumps(body)
    kind = {"content-type": "application/json"}
    return httpx.post(server.base_url + path, content=content, headers={**kind, **HEADERS, **headers}, timeout=60)


def test_nothing_of_a_request_is_in_an_error_or_in_the_log(server: Server) -> None:
    for path, body in GOOD:
        answer = post(server, path, body)
        assert answer.status_code == 200, (body, answer.text)
    for path, body in BAD:
        answer = post(server, path, body)
        assert 400 <= answer.status_code < 500, (body, answer.text)
        assert CANARY not in answer.text
        assert CANARY not in str(answer.headers)
    for key in (f"sk-{CANARY}", CANARY, f"{KEY}{CANARY}"):
        answer = post(server, "/v1/chat/completions", chat(), authorization=f"Bearer {key}")
        assert answer.status_code == 401
        assert CANARY not in answer.text
    strange = dict.fromkeys(("content-type", "cookie", "x-forwarded-for", "user-agent", "referer"), CANARY)
    assert post(server, "/v1/chat/completions", chat(), **strange).status_code == 415
    with (
        httpx.Client(base_url=server.base_url, headers=HEADERS) as http,
        http.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=400, ignore_eos=True)) as stream,
    ):
        next(stream.iter_bytes())  # and then it leaves
    server.stop()
    log = server.log.read_text(errors="replace")
    assert " DEBUG " in log
    assert "POST /v1/chat/completions 400" in log
    told = [line for line in log.splitlines() if CANARY.lower() in line.lower()]
    assert told == []
    pixels = base64.b64encode(GOOD_PICTURE).decode()
    assert pixels[40:80] not in log
