"""A real server under hostile grammars: each is answered soon, nothing piles up, and other people's streams go on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import Server, running_server

CHAT = "/v1/chat/completions"
STORY = {"messages": [{"role": "user", "content": "Tell"}], "max_tokens": 60, "ignore_eos": True, "temperature": 0}
# Generous: what is shown is that none takes minutes. A check has a second of processor time.
ANSWER_SECONDS = 30.0


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that a server may take for a place to keep files in."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    places = {name: str(home) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_DATA_HOME")}
    log = tmp_path_factory.mktemp("log") / "log"
    with running_server(tiny_checkpoint, log, "--max-model-len", "256", OMP_NUM_THREADS="1", **places) as made:
        yield made


def ask(http: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **fields}
    return http.post(CHAT, json=body, timeout=ANSWER_SECONDS)


def tell_story(http: httpx.Client) -> str:
    """A stream's whole text. It ends by itself."""
    text, ended = "", False
    with http.stream("POST", CHAT, json={**STORY, "stream": True}, timeout=ANSWER_SECONDS) as stream:
        for line in stream.iter_lines():
            ended |= line == "data: [DONE]"
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content") or ""
    assert ended
    return text


class Storyteller(threading.Thread):
    """Somebody else, who asks for the same story again and again."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self._url = server.base_url
        self._enough = threading.Event()
        self.stories: list[str] = []

    def run(self) -> None:
        with httpx.Client(base_url=self._url) as http:
            while not self._enough.is_set():
                self.stories.append(tell_story(http))

    def stop(self) -> list[str]:
        self._enough.set()
        self.join()
        return self.stories


@pytest.fixture
def undisturbed(server: Server, home: Path) -> Iterator[None]:
    """Meanwhile others get their answers, the same as ever; afterwards nothing is left of it."""
    with httpx.Client(base_url=server.base_url) as http:
        expected = tell_story(http)
        ask(http, regex="[a-z]")  # whatever is made once is there now
        before = files(home), open_files(server)
        other = Storyteller(server)
        other.start()
        try:
            yield
        finally:
            stories = other.stop()
        assert stories
        assert set(stories) == {expected}
        server.wait_until_idle()
        # A replaced child's pipes have other numbers, but are not more.
        assert files(home) == before[0]
        assert open_files(server) <= before[1] + 6
        assert server.process.poll() is None


def files(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def open_files(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


HOSTILE: dict[str, dict[str, Any]] = {
    "backtracking": {"regex": "(a+)+$"},
    "a million repetitions": {"regex": "a{1,1000000}"},
    "a million repetitions in a schema": {"guided_json": {"type": "string", "pattern": "^a{1,1000000}$"}},
    "nested repetitions": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "alternatives that multiply": {"regex": "a?" * 10_000 + "a" * 10_000},
    "a schema that is itself": {"guided_json": {"$ref": "#"}},
    "a tree of itself": {"guided_json": {"type": "object", "additionalProperties": {"$ref": "#"}}},
    "references in a circle": {
        "guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    },
    "five thousand values": {"guided_json": {"enum": [f"value {index}" for index in range(5_000)]}},
    "four thousand choices": {"guided_choice": [f"choice {index}" for index in range(4_000)]},
    "thousands of optional properties": {
        "guided_json": {
            "minProperties": 1,
            "additionalProperties": False,
            "properties": {f"{index}": {} for index in range(3_000)},
        }
    },
    "a grammar that doubles": {
        "guided_grammar": "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(40)) + "A40: /y/\nstart: A0"
    },
    "an ambiguous grammar": {"guided_grammar": 'start: s\ns: s s | s s s | "a" | ""'},
}


@pytest.mark.usefixtures("undisturbed")
def test_each_hostile_grammar_is_answered_soon(server: Server) -> None:
    with httpx.Client(base_url=server.base_url) as http:
        for name, fields in HOSTILE.items():
            answer = ask(http, **fields)
            assert answer.status_code in (200, 400), (name, answer.text)
            if answer.status_code == 400:
                assert answer.json()["error"]["param"] in (*fields, "structured_outputs"), name


@pytest.mark.usefixtures("undisturbed")
def test_a_flood_of_schemas_that_are_all_different(server: Server) -> None:
    def schema(index: int) -> dict[str, Any]:
        properties = {f"a{index}": {"type": "string", "maxLength": index % 50}, "b": {"enum": [index, "x"]}}
        return {"type": "object", "properties": properties, "required": ["b"]}

    with httpx.Client(base_url=server.base_url) as http, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: ask(http, guided_json=schema(index)), range(400)))
    assert {answer.status_code for answer in answers} == {200}
