"""The runner with a real model: how a prompt is cut, where its blocks lie and who runs beside it change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.core import EngineCore
from server.engine.step import ModelRunnerOutput, NewRequest, ScheduledRequest, SchedulerOutput, TileToEncode
from server.inputs.placeholders import PromptIds
from server.runner.model_runner import ModelRunner
from server.types import EngineRequest, FinishReason, PlaceholderRange, SamplingParams, Tile
from tests.engines import real_core, record_first_logits
from tests.runner.states import make_new
from tests.runner.test_vision_runner import make_tile

TOLERANCE = 1e-4
SLOTS = 4


class Bench:
    """A runner of its own, driven by steps written by hand."""

    def __init__(self, folder: Path, block_size: int) -> None:
        core = real_core(
            folder, block_size=block_size, max_model_len=512, kv_cache_memory_gb=0.01, encoder_cache_tiles=SLOTS
        )
        assert isinstance(core.executor, ModelRunner)
        self.runner = core.executor
        self.logits = record_first_logits(core)
        self.block_size = block_size
        # From the end and in steps of three: neighbours in a request are not neighbours in the cache.
        self.blocks = [block for start in range(3) for block in range(core.info.num_blocks - 1 - start, -1, -3)]

    def take_blocks(self, num_tokens: int) -> list[int]:
        """Blocks for so many tokens, last used first: what they held stays in them."""
        return self.blocks[: -(-num_tokens // self.block_size)]

    def execute(
        self,
        scheduled: Sequence[ScheduledRequest],
        new: Sequence[NewRequest] = (),
        tiles: Sequence[TileToEncode] = (),
        finished: Sequence[str] = (),
    ) -> ModelRunnerOutput:
        return self.runner.execute(
            SchedulerOutput(
                scheduled=list(scheduled), new_requests=list(new), tiles=list(tiles), finished=list(finished)
            )
        )

    def prefill(self, request: NewRequest, cuts: Sequence[int], slots: dict[int, int] | None = None) -> Tensor:
        """Compute a prompt in chunks that end at `cuts`; the logits [vocab] of its last token."""
        ends = [*cuts, len(request.prompt_token_ids)]
        table = self.take_blocks(ends[-1])
        start = held = 0
        for end in ends:
            needed = -(-end // self.block_size)
            touched = {
                index: slot
                for index, slot in (slots or {}).items()
                if request.placeholders[index].offset < end and request.placeholders[index].end > start
            }
            item = ScheduledRequest(request.request_id, start, end - start, table[held:needed], start == 0, touched)
            result = self.execute([item], new=[request] if start == 0 else [])
            assert bool(result.sampled) is (end == ends[-1])
            assert not result.failed
            start, held = end, needed
        self.runner.forget([request.request_id])
        return self.logits.pop(request.request_id)


def picture_prompt(*, num_tiles: int) -> tuple[list[int], PromptIds, tuple[Tile, ...]]:
    """A few words, pictures in a row, and a few words."""
    prompt = PromptIds(fake_token_id=32000, image_token_id=32001, rows_per_tile=64)
    prompt.add_ids([1, 400, 401])
    tiles = tuple(make_tile(42, 56, seed) for seed in range(num_tiles))
    prompt.add_tiles(num_tiles)
    prompt.add_ids([500, 501, 502, 503])
    return prompt.token_ids, prompt, tiles


@pytest.fixture(scope="module", params=[1, 3, 16])
def bench(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Bench:
    return Bench(tiny_checkpoint, request.param)


def text_request(name: str, count: int = 37) -> NewRequest:
    return make_new([1, *range(600, 600 + count - 1)], request_id=name, max_tokens=4, temperature=0.0)


def test_text_cut_anywhere_equals_text_in_one_piece(bench: Bench) -> None:
    whole = bench.prefill(text_request("whole"), [])
    for cut in range(1, 37):
        logits = bench.prefill(text_request(f"cut {cut}"), [cut])
        torch.testing.assert_close(logits, whole, atol=TOLERANCE, rtol=0)
    for cuts in ([1, 2, 3, 4], [5, 20, 21], list(range(1, 37)), [36]):
        logits = bench.prefill(text_request("many"), cuts)
        torch.testing.assert_close(logits, whole, atol=TOLERANCE, rtol=0)


def encode_tiles(bench: Bench, tiles: tuple[Tile, ...]) -> dict[int, int]:
    """Put tiles into the slab, last slot first: {tile index: slot}."""
    holder = make_new(request_id="holder", tiles=tiles)
    slots = {index: SLOTS - 1 - index for index in range(len(tiles))}
    work = [TileToEncode("holder", index, slot, tiles[index].key) for index, slot in slots.items()]
    result = bench.execute([], new=[holder], tiles=work)
    assert result.encode_seconds > 0
    bench.runner.forget(["holder"])
    return slots


def test_a_prompt_with_pictures_cut_anywhere_equals_one_piece(bench: Bench) -> None:
    ids, prompt, tiles = picture_prompt(num_tiles=2)
    slots = encode_tiles(bench, tiles)

    def request(name: str) -> NewRequest:
        placeholders = tuple(prompt.placeholders)
        return make_new(ids, request_id=name, tiles=tiles, placeholders=placeholders, max_tokens=4, temperature=0.0)

    whole = bench.prefill(request("whole"), [], slots)
    for cut in range(1, len(ids)):
        logits = bench.prefill(request(f"cut {cut}"), [cut], slots)
        torch.testing.assert_close(logits, whole, atol=TOLERANCE, rtol=0)
    logits = bench.prefill(request("many"), [2, 10, 40, 69, 70, 100, 133], slots)
    torch.testing.assert_close(logits, whole, atol=TOLERANCE, rtol=0)
    swapped = bench.prefill(request("swapped"), [], {0: slots[1], 1: slots[0]})
    assert not torch.allclose(swapped, whole, atol=1e-2), "the tolerance above could not tell the pictures apart"


def test_decodes_and_prompts_beside_each_other_equal_alone(bench: Bench) -> None:
    """Three requests in one step: a decode, a chunk behind a cached context, and a whole prompt."""
    names = ["decode", "chunk", "prompt"]
    alone = {name: bench.prefill(text_request(name, count), []) for name, count in zip(names, (9, 30, 17), strict=True)}
    tables: dict[str, list[int]] = {}
    used = 0
    for name, count in zip(names, (9, 30, 17), strict=True):
        needed = -(-count // bench.block_size)
        tables[name] = bench.blocks[used : used + needed]
        used += needed
    first = [
        ScheduledRequest("decode", 0, 8, tables["decode"], True, {}),
        ScheduledRequest("chunk", 0, 11, tables["chunk"], True, {}),
    ]
    assert not bench.execute(first, new=[text_request("decode", 9), text_request("chunk", 30)]).sampled
    second = [
        ScheduledRequest("decode", 8, 1, [], False, {}),
        ScheduledRequest("chunk", 11, 19, [], False, {}),
        ScheduledRequest("prompt", 0, 17, tables["prompt"], True, {}),
    ]
    result = bench.execute(second, new=[text_request("prompt", 17)])
    assert result.sampled == {name: int(alone[name].argmax()) for name in names}
    for name in names:
        torch.testing.assert_close(bench.logits.pop(name), alone[name], atol=TOLERANCE, rtol=0)
    bench.runner.forget(names)


def test_an_answer_goes_on_after_a_preemption_as_before(bench: Bench) -> None:
    """Blocks taken away and others given: prompt and answer so far are computed again."""

    def decode(request: NewRequest, position: int, blocks: list[int], new: list[NewRequest]) -> int:
        item = ScheduledRequest(request.request_id, position, 1, blocks, False, {})
        return bench.execute([item], new=new).sampled[request.request_id]

    request = text_request("r", 10)
    table = bench.take_blocks(16)
    first = ScheduledRequest("r", 0, 10, table, True, {})
    answer = [bench.execute([first], new=[request]).sampled["r"]]
    answer += [decode(request, 10 + index, [], []) for index in range(4)]

    again = text_request("again", 10)
    state_tokens = [bench.execute([ScheduledRequest("again", 0, 10, table, True, {})], new=[again]).sampled["again"]]
    state_tokens += [decode(again, 10, [], [])]
    others = bench.blocks[len(table) : 2 * len(table)]
    resumed = ScheduledRequest("again", 0, 12, others, True, {})
    state_tokens.append(bench.execute([resumed]).sampled["again"])
    state_tokens += [decode(again, 12 + index, [], []) for index in range(2)]
    assert state_tokens == answer
    bench.runner.forget(["r", "again"])


def test_what_ended_is_forgotten(bench: Bench) -> None:
    bench.execute([ScheduledRequest("a", 0, 5, bench.take_blocks(5), True, {})], new=[text_request("a", 5)])
    bench.execute([ScheduledRequest("b", 0, 5, bench.take_blocks(5), True, {})], new=[text_request("b", 5)])
    assert set(bench.runner._states) == {"a", "b"}
    # The same id may come back in the step that says it ended.
    again = text_request("a", 6)
    item = ScheduledRequest("a", 0, 6, bench.take_blocks(6), True, {})
    assert set(bench.execute([item], new=[again], finished=["a"]).sampled) == {"a"}
    assert bench.runner._states["a"].source is again
    bench.runner.forget(["a", "b", "never known"])
    assert not bench.runner._states


def test_a_bad_tile_fails_those_who_need_it_in_this_step(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    ids, prompt, tiles = picture_prompt(num_tiles=1)
    bad = Tile(b"bad", 42, 56, b"")
    pictured = {
        name: make_new(
            ids, request_id=name, tiles=(tile,), placeholders=tuple(prompt.placeholders), max_tokens=2, temperature=0.0
        )
        for name, tile in (("good", tiles[0]), ("bad", bad), ("shares", bad))
    }
    per_request = -(-len(ids) // bench.block_size)
    slots = {"good": 0, "bad": 1, "shares": 1, "words": 0}
    scheduled = [
        ScheduledRequest(
            name, 0, len(ids), bench.blocks[index * per_request : (index + 1) * per_request], True, {0: slots[name]}
        )
        for index, name in enumerate(pictured)
    ]
    words = text_request("words", 5)
    scheduled.append(ScheduledRequest("words", 0, 5, bench.blocks[4 * per_request :][:5], True, {}))
    tile_work = [TileToEncode("good", 0, 0, tiles[0].key), TileToEncode("bad", 0, 1, bad.key)]
    result = bench.execute(scheduled, new=[*pictured.values(), words], tiles=tile_work)
    assert set(result.failed) == {"bad", "shares"}
    assert result.failed_slots == {1}
    assert set(result.sampled) == {"good", "words"}
    bench.logits.clear()
    alone = bench.prefill(make_new(ids, request_id="alone", placeholders=tuple(prompt.placeholders)), [], {0: 0})
    assert result.sampled["good"] == int(alone.argmax())
    bench.runner.forget([*pictured, "words"])
    assert "encoding a tile" in caplog.text


def test_a_tile_that_breaks_half_way_fails_whom_it_is_for(bench: Bench) -> None:
    """No chunk touches its slot yet: the request waits for it, or computes what comes before it."""
    bad = Tile(b"bad", 42, 56, b"")
    for name, scheduled in (
        ("waits", []),
        ("goes on", [ScheduledRequest("goes on", 0, 5, bench.blocks[:5], True, {})]),
    ):
        new = make_new(list(range(5, 25)), request_id=name, tiles=(bad,), placeholders=(PlaceholderRange(6, 4),))
        result = bench.execute(scheduled, new=[new], tiles=[TileToEncode(name, 0, 0, bad.key, 0.25)])
        assert set(result.failed) == result.crashed == {name}
        assert result.failed_slots == {0}
        assert not result.sampled
        bench.runner.forget([name])


# -- a request whose numbers break ----------------------------------------------------------------------------------

POISON = 777  # a token whose embedding is not a number


def poisoned_core(folder: Path) -> EngineCore:
    core = real_core(
        folder, block_size=16, max_num_batched_tokens=256, max_num_seqs=4, kv_cache_memory_gb=0.001, max_model_len=256
    )
    assert isinstance(core.executor, ModelRunner)
    with torch.inference_mode():
        core.executor._model.text.embedding.weight[POISON] = torch.nan
    return core


def ends(core: EngineCore, prompts: dict[str, list[int]], *, max_tokens: int) -> dict[str, FinishReason | None]:
    """Run these requests together: how each ended."""
    for name, ids in prompts.items():
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        core.scheduler.add(EngineRequest(request_id=name, prompt_token_ids=ids, sampling=sampling, eos_token_ids=(2,)))
    found = {}
    while core.scheduler.has_work:
        found.update({output.request_id: output.finish_reason for output in core.step().outputs})
    return found


def test_a_request_without_finite_logits_fails(tiny_checkpoint: Path) -> None:
    core = poisoned_core(tiny_checkpoint)
    assert ends(core, {"bad": [1, POISON, 5]}, max_tokens=2) == {"bad": FinishReason.ERROR}
    assert core.scheduler.holds_nothing


def test_numbers_that_break_in_an_earlier_chunk_fail_the_request_too(tiny_checkpoint: Path) -> None:
    core = poisoned_core(tiny_checkpoint)
    prompt = [1, POISON, *range(300, 300 + 253 - 2), 5]
    beside = list(range(100, 200))  # takes part of the budget, so that the prompt is cut in two
    expected = {"beside": FinishReason.LENGTH, "bad": FinishReason.ERROR}
    assert ends(core, {"beside": beside, "bad": prompt}, max_tokens=2) == expected
    # Nor may the cache offer to anybody what it stored for it.
    assert ends(core, {"again": prompt}, max_tokens=2) == {"again": FinishReason.ERROR}


def test_nobody_after_it_fails_with_it(tiny_checkpoint: Path) -> None:
    core = poisoned_core(tiny_checkpoint)
    ends(core, {"bad": [1, *[POISON] * 9]}, max_tokens=2)
    assert ends(core, {"after": [300, 301, 302]}, max_tokens=6) == {"after": FinishReason.LENGTH}


def test_nobody_beside_it_fails_with_it(tiny_checkpoint: Path) -> None:
    core = poisoned_core(tiny_checkpoint)
    prompts = {"bad": [POISON] * 40, "short": list(range(100, 105)), "long": list(range(200, 290))}
    expected = {"bad": FinishReason.ERROR, "short": FinishReason.LENGTH, "long": FinishReason.LENGTH}
    assert ends(core, prompts, max_tokens=3) == expected


def test_a_step_of_nothing_is_no_failure(bench: Bench) -> None:
    result = bench.execute([])
    assert (result.sampled, result.failed) == ({}, {})
