"""What test_bundled.py asks: `python -m tests.demo.pick` prints PICKS and CONVERSATION for the bundled model as it is.

Of each exercise's first items that are answered right, and no token of it with a probability below SURE, it is the one
with the longest answer.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import openai

from server.demo.exam import EXERCISES, draw_items
from tests.demo.test_bundled import CONFIG, PICKS, SEED, Message, ask, table_to_talk_about, user
from tests.engines import png
from tests.inputs.pictures import as_data_url
from tests.serving import running_server

ITEMS = 60
SURE = 0.9


def is_right_and_sure(client: openai.OpenAI, messages: list[Message], answer: str) -> bool:
    choice = ask(client, *messages, logprobs=True).choices[0]
    least = min(math.exp(token.logprob) for token in choice.logprobs.content)
    return choice.message.content.strip() == answer and least >= SURE


def picks(client: openai.OpenAI) -> dict[str, int]:
    found = {}
    for exercise in EXERCISES:
        if exercise.name not in PICKS:
            continue
        items = draw_items(exercise, ITEMS, seed=SEED)
        asked = [[user(item.question, [as_data_url(p) for p in item.pictures], exercise.detail)] for item in items]
        right = [at for at, item in enumerate(items) if is_right_and_sure(client, asked[at], item.answer)]
        print(f"{exercise.name}: {len(right)} of {ITEMS} right and sure", file=sys.stderr)
        found[exercise.name] = max(right, key=lambda at: len(items[at].answer), default=-1)
    return found


def conversation(client: openai.OpenAI) -> int:
    for seed in range(ITEMS):
        scene = table_to_talk_about(seed)
        messages: list[Message] = []
        for question in scene.questions:
            urls = [] if messages else [as_data_url(png(canvas.image)) for canvas in scene.canvases]
            messages.append(user(question.text, urls))
            if not is_right_and_sure(client, messages, question.answer):
                break
            messages.append({"role": "assistant", "content": question.answer})
        else:
            return seed
    return -1


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running_server(None, log, "--config", str(CONFIG), XDG_CACHE_HOME=folder) as server:
            client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY")
            for name, at in picks(client).items():
                print(f'    "{name}": {at},')
            print(f"CONVERSATION = {conversation(client)}")


if __name__ == "__main__":
    main()
