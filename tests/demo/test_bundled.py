"""The bundled model as `make serve` serves it: real processes, real HTTP, right answers to the letter.

The pictures are the exam's: drawn as the test runs, in typefaces that training never saw. How often the model is right
is measured elsewhere; what is guarded here is the way from a picture's bytes to its answer, so everything asked is what
the model answers right and surely. After another training, `python -m tests.demo.pick` prints PICKS and CONVERSATION
anew.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import openai
import pytest

from server.demo.exam import EXERCISES, Exercise, Item, draw_items
from server.demo.scenes.ledgers import table
from server.demo.scenes.studio import Scene, Studio
from server.demo.scenes.talk import NO_PICTURE
from server.demo.typefaces import held_out_typefaces
from tests.conformance import sabotage
from tests.engines import png
from tests.inputs.loopback import answer
from tests.inputs.pictures import as_data_url
from tests.serving import ROOT, Server, running_server

SEED = 11
SAMPLES = ROOT / "server" / "web" / "samples"
CONFIG = ROOT / "configs" / "demo.yaml"

# Which of an exercise's items.
PICKS: Mapping[str, int] = {
    "numbers of one to four digits": 0,
    "words of the lexicon": 23,
    "colors and shapes": 16,
    "counting to five": 0,
    "looking up in tables and receipts": 17,
    "lines of text": 54,
    "two pictures compared": 0,
    "small print, 5 tiles": 3,
    "colors and shapes, large, 1 tile": 35,
    "colors and shapes, large, 5 tiles": 35,
}
CONVERSATION = 0  # the seed of a table

Message = dict[str, Any]


def picked() -> list[tuple[Exercise, Item]]:
    exercises = {exercise.name: exercise for exercise in EXERCISES}
    return [(exercises[name], draw_items(exercises[name], at + 1, seed=SEED)[at]) for name, at in PICKS.items()]


def table_to_talk_about(seed: int) -> Scene:
    """A table with three questions."""
    for attempt in itertools.count():
        chance = random.Random(f"{seed}/{attempt}")
        scene = table(Studio(chance, held_out_typefaces(), width=200, height=150))
        if scene is not None and len(scene.questions) == 3:
            return scene
    raise AssertionError("not reached")


def user(text: str, urls: Sequence[str] = (), detail: str = "low") -> Message:
    pictures = [{"type": "image_url", "image_url": {"url": url, "detail": detail}} for url in urls]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def ask(client: openai.OpenAI, *messages: Message, **options: Any) -> Any:
    return client.chat.completions.create(
        model="idefics2-demo", messages=list(messages), max_completion_tokens=64, temperature=0, **options
    )


def whole(client: openai.OpenAI, *messages: Message) -> str:
    choice = ask(client, *messages).choices[0]
    assert choice.finish_reason == "stop"
    return choice.message.content.strip()


def streamed(client: openai.OpenAI, *messages: Message) -> str:
    chunks = list(ask(client, *messages, stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`make serve`, with nothing in its cache; it may fetch pictures from 127.0.0.2, on any port."""
    log = tmp_path_factory.mktemp("server") / "log"
    cache = str(tmp_path_factory.mktemp("cache"))
    options = ("--config", str(CONFIG))
    with running_server(None, log, *options, module=sabotage.__name__, XDG_CACHE_HOME=cache) as running:
        yield running
        assert running.stop() == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


@pytest.mark.parametrize(("exercise", "item"), picked(), ids=PICKS)
def test_a_picture_is_answered_right(client: openai.OpenAI, exercise: Exercise, item: Item) -> None:
    inline = [as_data_url(picture) for picture in item.pictures]
    files = {f"/{number}.png": answer(picture) for number, picture in enumerate(item.pictures)}
    with sabotage.web(files) as web:
        fetched = [f"http://{sabotage.PUBLIC}:{web.port}{path}" for path in files]
        for urls in (inline, fetched):
            question = user(item.question, urls, exercise.detail)
            assert (streamed(client, question), whole(client, question)) == (item.answer, item.answer)
        assert {seen.target for seen in web.requests} == set(files)


def test_a_conversation_about_a_picture(client: openai.OpenAI) -> None:
    scene = table_to_talk_about(CONVERSATION)
    messages: list[Message] = []
    for question in scene.questions:
        urls = [] if messages else [as_data_url(png(canvas.image)) for canvas in scene.canvases]
        messages.append(user(question.text, urls))
        said = whole(client, *messages)
        assert said == question.answer
        messages.append({"role": "assistant", "content": said})


@pytest.mark.parametrize("sample", json.loads((SAMPLES / "index.json").read_text()), ids=lambda sample: sample["file"])
def test_the_playgrounds_samples_are_answered_right(client: openai.OpenAI, sample: dict[str, Any]) -> None:
    url = as_data_url((SAMPLES / sample["file"]).read_bytes())
    said = [streamed(client, user(question, [url], "high")) for question in sample["questions"]]
    assert said == sample["answers"]


def test_small_print_takes_splitting(client: openai.OpenAI) -> None:
    """What the caption of that sample says."""
    (sample,) = (sample for sample in json.loads((SAMPLES / "index.json").read_text()) if sample["file"] == "page.png")
    url = as_data_url((SAMPLES / sample["file"]).read_bytes())
    assert whole(client, user(sample["questions"][0], [url], "low")) != sample["answers"][0]


@pytest.mark.parametrize("question", ["What number is this?", "What does it say?", "How many shapes are there?"])
def test_without_a_picture_the_model_says_so(client: openai.OpenAI, question: str) -> None:
    assert whole(client, user(question)) == streamed(client, user(question)) == NO_PICTURE


def test_a_picture_may_come_later(client: openai.OpenAI) -> None:
    exercise, item = picked()[0]
    first = user(item.question)
    refusal = {"role": "assistant", "content": whole(client, first)}
    assert refusal["content"] == NO_PICTURE
    second = user(item.question, [as_data_url(picture) for picture in item.pictures], exercise.detail)
    assert whole(client, first, refusal, second) == item.answer
