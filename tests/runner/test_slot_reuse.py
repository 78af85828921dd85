"""Canaries: many short requests through few blocks and slots, and none finds anything of another's in what it gets."""

from __future__ import annotations

import random
from pathlib import Path

from server.engine.core import EngineCore
from server.inputs.placeholders import PromptIds
from server.types import EngineRequest, SamplingParams
from tests.runner.faults import Told, make_core
from tests.runner.test_vision_runner import make_tile

NUM_REQUESTS = 250


def make_canary(rng: random.Random, index: int) -> EngineRequest:
    """Words of its own, and sometimes a picture of its own; most begin alike, so that they share blocks."""
    prompt = PromptIds(fake_token_id=32000, image_token_id=32001, rows_per_tile=64)
    prompt.add_ids([1, *range(50, 50 + rng.choice([0, 0, 16, 40]))])
    tiles = ()
    if rng.random() < 0.15:
        tiles = (make_tile(28, 28, index),)
        prompt.add_tiles(1)
    prompt.add_ids([rng.randrange(1000, 31000) for _ in range(rng.randint(2, 24))])
    return EngineRequest(
        request_id=f"canary {index}",
        prompt_token_ids=prompt.token_ids,
        sampling=SamplingParams(
            max_tokens=rng.randint(1, 5), temperature=rng.choice([0.0, 1.0]), seed=index, ignore_eos=True
        ),
        eos_token_ids=(2,),
        tiles=tiles,
        placeholders=tuple(prompt.placeholders),
    )


def churn(core: EngineCore, requests: list[EngineRequest], rng: random.Random) -> Told:
    """All requests, a few at a time; now and then one of them is cancelled and sent again at the end."""
    told = Told(core)
    waiting = list(requests)
    running: dict[str, EngineRequest] = {}
    while waiting or running:
        while waiting and len(running) < 8:
            request = waiting.pop(0)
            running[request.request_id] = request
            core.scheduler.add(request)
        if len(waiting) > 8 and rng.random() < 0.05:
            name = rng.choice(list(running))
            core.scheduler.abort([name])
            waiting.append(running.pop(name))
            told.forget(name)
        for name in told.step():
            del running[name]
    return told


def compare(folder: Path, count: int, seed: int) -> Told:
    """Serve so many canaries alone and in a crowd. Raises AssertionError where an answer differs."""
    rng = random.Random(seed)
    requests = [make_canary(rng, index) for index in range(count)]
    crowd = churn(make_core(folder, num_blocks=24, max_model_len=160, num_tile_slots=2), requests, rng)
    alone = Told(make_core(folder, max_num_seqs=1, enable_prefix_caching=False)).serve(requests)
    assert crowd.errors == alone.errors == {}
    differing = [name for name in alone.tokens if crowd.tokens[name] != alone.tokens[name]]
    assert differing == []
    assert len(crowd.ends) == count
    return crowd


def test_short_requests_at_high_churn_get_what_they_get_alone(tiny_checkpoint: Path) -> None:
    crowd = compare(tiny_checkpoint, NUM_REQUESTS, seed=4)
    blocks = [block for step, _ in crowd.steps for item in step.scheduled for block in item.new_block_ids]
    assert len(blocks) > 20 * len(set(blocks)), "blocks changed hands too rarely to mean anything"
    assert sum(end.num_cached_tokens > 0 for end in crowd.ends.values()) > 20, "none was shared"
