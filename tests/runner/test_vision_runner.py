"""Tiles into the slab with a real model: together as alone, and a bad one spoils only its own slot."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.step import TileToEncode
from server.model.idefics2 import Idefics2Model
from server.runner.input_batch import RequestState
from server.runner.vision_runner import UnfilledSlots, VisionRunner
from server.types import PlaceholderRange, Tile
from tests.model.twins import load
from tests.runner.states import make_new

CPU = torch.device("cpu")
SLOTS = 6


def make_tile(height: int, width: int, seed: int) -> Tile:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy().tobytes()
    return Tile(key=hashlib.sha256(pixels).digest(), height=height, width=width, pixels=pixels)


def make_state(name: str, *tiles: Tile) -> RequestState:
    placeholders = tuple(PlaceholderRange(64 * index, 64) for index in range(len(tiles)))
    return RequestState(source=make_new(request_id=name, tiles=tiles, placeholders=placeholders), token_ids=[])


class Counted:
    """The model, noting the shape of each batch of pixels."""

    def __init__(self, model: Idefics2Model) -> None:
        self.model = model
        self.shapes: list[tuple[int, ...]] = []

    def parameters(self) -> object:
        return self.model.parameters()

    def encode_tiles(self, pixels: Tensor) -> Tensor:
        self.shapes.append(tuple(pixels.shape))
        return self.model.encode_tiles(pixels)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Idefics2Model:
    return load(tiny_checkpoint)


def make_runner(model: Idefics2Model | Counted) -> VisionRunner:
    runner = VisionRunner(model, num_slots=SLOTS, rows_per_tile=64, hidden=128, device=CPU)  # type: ignore[arg-type]
    assert not runner.slab.any()
    runner.slab.fill_(7.0)  # an old content, so that a slot that is not written shows
    return runner


def encode(runner: VisionRunner, work: list[tuple[RequestState, int, int]]) -> set[int]:
    """Encode (request, tile index, slot)s, for which there is memory. Returns the slots of broken tiles."""
    unfilled = encode_some(runner, work)
    assert unfilled.starved == set()
    return unfilled.broken


@torch.inference_mode()
def encode_some(runner: VisionRunner, work: list[tuple[RequestState, int, int]]) -> UnfilledSlots:
    tiles = [
        TileToEncode(state.source.request_id, index, slot, state.source.tiles[index].key) for state, index, slot in work
    ]
    return runner.encode(tiles, {state.source.request_id: state for state, _, _ in work})


@torch.inference_mode()
def encode_share(runner: VisionRunner, state: RequestState, index: int, slot: int, until: float) -> UnfilledSlots:
    name = state.source.request_id
    return runner.encode([TileToEncode(name, index, slot, state.source.tiles[index].key, until)], {name: state})


@torch.inference_mode()
def alone(model: Idefics2Model, tile: Tile) -> Tensor:
    pixels = torch.frombuffer(bytearray(tile.pixels), dtype=torch.uint8).view(1, tile.height, tile.width, 3)
    return model.encode_tiles(pixels)[0]


def test_tiles_together_equal_tiles_one_by_one(model: Idefics2Model) -> None:
    """Sizes mixed and interleaved, two requests, slots in no order."""
    tiles = [make_tile(*size, seed) for seed, size in enumerate([(56, 70), (70, 56), (56, 70), (42, 42), (56, 70)])]
    first, second = make_state("a", *tiles[:3]), make_state("b", *tiles[3:])
    counted = Counted(model)
    runner = make_runner(counted)
    work = [(first, 0, 4), (first, 1, 0), (second, 0, 5), (first, 2, 2), (second, 1, 1)]
    assert encode(runner, work) == set()
    assert sorted(counted.shapes) == [(1, 42, 42, 3), (1, 70, 56, 3), (3, 56, 70, 3)]  # never padded to the largest
    for state, index, slot in work:
        expected = alone(model, state.source.tiles[index])
        torch.testing.assert_close(runner.slab[slot], expected, atol=1e-4, rtol=1e-4)
    assert (runner.slab[3] == 7.0).all()
    assert not torch.allclose(runner.slab[4], runner.slab[2], atol=1e-2)


def test_rows_are_the_slab_laid_flat(model: Idefics2Model) -> None:
    runner = make_runner(model)
    encode(runner, [(make_state("a", make_tile(42, 42, 1)), 0, 3)])
    assert runner.rows.shape == (SLOTS * 64, 128)
    assert torch.equal(runner.rows[3 * 64 + 5], runner.slab[3, 5])
    assert runner.rows.data_ptr() == runner.slab.data_ptr()


def test_pixels_are_read_row_by_row_in_colour(model: Idefics2Model) -> None:
    """A tile and its mirror image, its transpose and its colours swapped are four different pictures."""
    tile = make_tile(42, 42, 1)
    pixels = torch.frombuffer(bytearray(tile.pixels), dtype=torch.uint8).view(42, 42, 3)
    others = [pixels.flip(1), pixels.transpose(0, 1), pixels.flip(2)]
    tiles = [tile, *(Tile(b"", 42, 42, other.contiguous().numpy().tobytes()) for other in others)]
    state, runner = make_state("a", *tiles), make_runner(model)
    encode(runner, [(state, index, index) for index in range(4)])
    for index, other in enumerate([pixels, *others]):
        with torch.inference_mode():
            torch.testing.assert_close(runner.slab[index], model.encode_tiles(other[None])[0], atol=1e-4, rtol=1e-4)
    assert len({runner.slab[index].numpy().tobytes() for index in range(4)}) == 4


BAD = {
    "no whole patch": Tile(b"", 13, 42, bytes(13 * 42 * 3)),
    "more patches than the table": Tile(b"", 14, 71 * 14, bytes(14 * 71 * 14 * 3)),
    "fewer pixels than its size": Tile(b"", 42, 42, bytes(100)),
    "more pixels than its size": Tile(b"", 42, 42, bytes(42 * 42 * 3 + 3)),
    "no pixels": Tile(b"", 42, 42, b""),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_tile_fails_its_slot_and_no_other(
    model: Idefics2Model, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = [make_tile(42, 42, 1), make_tile(42, 42, 2), make_tile(56, 42, 3)]
    mine, other = make_state("bad", good[0], BAD[kind], good[1]), make_state("good", good[2])
    runner = make_runner(model)
    assert encode(runner, [(mine, 0, 0), (mine, 1, 1), (other, 0, 2), (mine, 2, 3)]) == {1}
    for slot, tile in ((0, good[0]), (3, good[1]), (2, good[2])):
        torch.testing.assert_close(runner.slab[slot], alone(model, tile), atol=1e-4, rtol=1e-4)
    assert (runner.slab[1] == 7.0).all()
    assert "encoding a tile of" in caplog.text


def test_several_bad_tiles_are_all_named(model: Idefics2Model, caplog: pytest.LogCaptureFixture) -> None:
    state = make_state("a", BAD["no pixels"], make_tile(42, 42, 1), BAD["fewer pixels than its size"])
    assert encode(make_runner(model), [(state, 0, 5), (state, 1, 4), (state, 2, 3)]) == {3, 5}


# -- some layers a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [[0.5, 1.0], [0.01, 0.02, 0.5, 0.9, 1.0], [0.2, 0.2, 0.6, 0.6, 1.0], [0.999, 1.0]])
def test_a_tile_in_shares_equals_the_tile_in_one_go(model: Idefics2Model, shares: list[float]) -> None:
    """Bit for bit: the same layers over the same rows."""
    state, runner = make_state("a", make_tile(56, 70, 1)), make_runner(model)
    for until in shares:
        assert (runner.slab[2] == 7.0).all(), "written before its last layer"
        assert encode_share(runner, state, 0, 2, until) == UnfilledSlots()
    assert torch.equal(runner.slab[2], alone(model, state.source.tiles[0]))


def test_each_share_computes_its_part_of_the_layers(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint)
    state, runner = make_state("a", make_tile(56, 70, 1)), make_runner(model)
    num_parts = model.num_encoding_parts(56, 70)
    assert num_parts == len(model.vision.layers) + 1 + len(model.connector.resampler.layers)
    calls: list[str] = []
    for name, module in [*model.vision.layers.named_children(), ("projection", model.connector.projection)]:
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    for layer in model.connector.resampler.layers:
        layer.register_forward_hook(lambda *_: calls.append("resampler"))
    for done in range(1, num_parts + 1):
        encode_share(runner, state, 0, 2, done / num_parts)
        assert len(calls) == done
    assert len(set(calls)) == len(model.vision.layers) + 2


def test_rows_are_projected_in_pieces_and_the_pieces_are_parts(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = load(tiny_checkpoint), make_state("a", make_tile(56, 70, 1))  # 20 patches
    whole = alone(model, state.source.tiles[0])
    parts = model.num_encoding_parts(56, 70)
    monkeypatch.setattr("server.model.perceiver.PROJECTED_ROWS", 6)
    assert model.num_encoding_parts(56, 70) == parts + 3
    torch.testing.assert_close(alone(model, state.source.tiles[0]), whole, atol=1e-5, rtol=1e-5)


def test_a_tile_that_takes_another_ones_slot_half_way_begins_anew(model: Idefics2Model) -> None:
    state, runner = make_state("a", make_tile(56, 70, 1), make_tile(56, 70, 2)), make_runner(model)
    encode_share(runner, state, 0, 2, 0.6)
    encode_share(runner, state, 1, 2, 0.3)
    encode_share(runner, state, 1, 2, 1.0)
    assert torch.equal(runner.slab[2], alone(model, state.source.tiles[1]))
    encode_share(runner, state, 0, 3, 0.3)
    encode(runner, [(state, 0, 4), (state, 1, 5)])  # whole ones beside it
    encode_share(runner, state, 0, 3, 1.0)
    for slot, index in ((3, 0), (4, 0), (5, 1)):
        torch.testing.assert_close(runner.slab[slot], alone(model, state.source.tiles[index]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_tile_in_shares_fails_its_slot(model: Idefics2Model, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    state, runner = make_state("a", BAD[kind], make_tile(42, 42, 1)), make_runner(model)
    assert encode_share(runner, state, 0, 1, 0.5) == UnfilledSlots(broken={1})
    encode_share(runner, state, 1, 1, 0.5)
    assert encode_share(runner, state, 1, 1, 1.0) == UnfilledSlots()
    assert torch.equal(runner.slab[1], alone(model, state.source.tiles[1]))


def test_a_share_that_has_no_memory_is_tried_anew_and_then_told(
    model: Idefics2Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, runner = make_state("a", make_tile(56, 70, 1)), make_runner(model)
    encode_share(runner, state, 0, 1, 0.4)
    layer = model.vision.layers[-1]
    forward, failures = layer.forward, iter([True, False])

    def short(hidden: Tensor) -> Tensor:
        if next(failures):
            raise MemoryError
        return forward(hidden)

    monkeypatch.setattr(layer, "forward", short)
    assert encode_share(runner, state, 0, 1, 1.0) == UnfilledSlots()
    monkeypatch.setattr(layer, "forward", forward)
    assert torch.equal(runner.slab[1], alone(model, state.source.tiles[0]))
    failures = iter([True, True])
    monkeypatch.setattr(layer, "forward", short)
    assert encode_share(runner, state, 0, 2, 1.0) == UnfilledSlots(starved={2})


def test_nothing_to_encode_is_no_failure(model: Idefics2Model) -> None:
    assert encode(make_runner(model), []) == set()
