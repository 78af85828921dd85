"""Recorded decodes against steps that are computed anew, by the kernels for CUDA in Triton's interpreter.

What records here computes again at each replay, into the same tensors: as a CUDA graph does, but for the device.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engine.core import EngineCore
from server.runner.decode_graphs import NO_SLOT, Decoded, DecodeInputs, Recorder, graph_sizes
from server.runner.hardware import record_decodes
from server.runner.input_batch import InputBatch
from server.runner.model_runner import ModelRunner
from server.types import EngineRequest, SamplingParams
from tests.engines import Answers, drive, real_core

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter

CPU = torch.device("cpu")
MAX_LEN = 96


class Repeating:
    """Records by computing again; `replays` has the batch size of each replay."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, compute: Callable[[], Decoded]) -> tuple[Callable[[], None], Decoded]:
        decoded = Decoded(*(tensor.clone() for tensor in compute()))

        def replay() -> None:
            self.replays.append(len(decoded.hidden))
            for kept, new in zip(decoded, compute(), strict=True):
                kept.copy_(new)

        return replay, decoded


def make_core(folder: Path, *, max_num_seqs: int, **settings: object) -> EngineCore:
    return real_core(folder, max_num_seqs=max_num_seqs, max_model_len=MAX_LEN, block_size=8, **settings)


def record(core: EngineCore, recorder: Recorder, *, max_num_seqs: int) -> None:
    assert isinstance(core.executor, ModelRunner)
    core.executor.record_decodes(recorder, max_num_seqs=max_num_seqs, max_model_len=MAX_LEN)


def requests(count: int) -> list[EngineRequest]:
    rng = random.Random(7)
    return [
        EngineRequest(
            request_id=f"r{index}",
            prompt_token_ids=[rng.randrange(3, 900) for _ in range(rng.randint(1, 40))],
            sampling=SamplingParams(
                max_tokens=rng.randint(2, 7), temperature=rng.choice([0.0, 1.0]), seed=index, ignore_eos=True
            ),
            eos_token_ids=(),
        )
        for index in range(count)
    ]


def answers(core: EngineCore, count: int) -> Answers:
    return drive(core, requests(count))


def test_recorded_decodes_answer_as_steps_that_are_computed_anew(tiny_checkpoint: Path) -> None:
    """Answers of different lengths, so that batches shrink and what a larger one left must not be seen."""
    recorder = Repeating()
    recorded = make_core(tiny_checkpoint, max_num_seqs=5, attention_backend="triton")
    record(recorded, recorder, max_num_seqs=5)
    plain = make_core(tiny_checkpoint, max_num_seqs=5)
    found, expected = answers(recorded, 7), answers(plain, 7)
    assert found.tokens == expected.tokens
    assert set(recorder.replays) >= {1, 2, 4, 5}
    assert recorded.scheduler.holds_nothing


def test_a_step_with_a_prompt_in_it_is_not_replayed(tiny_checkpoint: Path) -> None:
    recorder = Repeating()
    core = make_core(tiny_checkpoint, max_num_seqs=2, attention_backend="triton")
    record(core, recorder, max_num_seqs=2)
    first, second = requests(2)
    core.handle(first)
    core.step()
    assert recorder.replays == []
    core.step()
    assert recorder.replays == [1]
    core.handle(second)  # its prompt is computed beside the first one's decode
    core.step()
    assert recorder.replays == [1]


def batch_of(seq_lens: list[int], block_size: int) -> InputBatch:
    num_blocks = [-(-length // block_size) + 1 for length in seq_lens]  # one more than is needed, as is usual
    tables = [list(range(10 * row, 10 * row + count)) for row, count in enumerate(num_blocks)]
    nothing = torch.empty(0, dtype=torch.int64)
    return InputBatch(
        token_ids=torch.tensor([100 + row for row in range(len(seq_lens))]),
        positions=torch.tensor([length - 1 for length in seq_lens]),
        image_positions=nothing,
        image_rows=nothing,
        logits_indices=torch.arange(len(seq_lens)),
        sampled=[],
        query_lens=[1] * len(seq_lens),
        seq_lens=seq_lens,
        block_tables=tables,
    )


def test_inputs_say_where_each_decode_stands_and_that_the_others_are_not_there() -> None:
    inputs = DecodeInputs(4, 3, CPU)
    views = (inputs.token_ids, inputs.positions, inputs.slot_mapping, inputs.seq_lens, inputs.block_tables)
    inputs.fill(batch_of([24, 17, 1, 8], 8), 8)
    assert inputs.slot_mapping.tolist() == [2 * 8 + 7, 12 * 8, 20 * 8, 30 * 8 + 7]
    assert inputs.block_tables.tolist() == [[0, 1, 2], [10, 11, 12], [20, 0, 0], [30, 0, 0]]
    inputs.fill(batch_of([9, 2], 8), 8)
    assert inputs.token_ids.tolist() == [100, 101, 0, 0]
    assert inputs.positions.tolist() == [8, 1, 0, 0]
    assert inputs.slot_mapping.tolist() == [8, 81, NO_SLOT, NO_SLOT]
    assert inputs.seq_lens.tolist() == [9, 2, 0, 0]
    assert inputs.block_tables.tolist() == [[0, 1, 0], [10, 0, 0], [0, 0, 0], [0, 0, 0]]
    now = (inputs.token_ids, inputs.positions, inputs.slot_mapping, inputs.seq_lens, inputs.block_tables)
    assert [view.data_ptr() for view in now] == [view.data_ptr() for view in views]


def test_rows_that_only_fill_a_batch_up_write_nothing(tiny_checkpoint: Path) -> None:
    core = make_core(tiny_checkpoint, max_num_seqs=8, attention_backend="triton")
    runner = core.executor
    assert isinstance(runner, ModelRunner)
    for layer in runner._caches:
        for tensor in layer:
            tensor.fill_(7.0)
    record(core, Repeating(), max_num_seqs=8)
    assert all(bool((tensor == 7.0).all()) for layer in runner._caches for tensor in layer)
    assert runner._graphs is not None
    with torch.inference_mode():
        decoded = runner._graphs.run(batch_of([1, 1, 1], 8))
    assert decoded.hidden.shape == (3, 128)
    written = (runner._caches[0].key != 7.0).flatten(2).any(-1).nonzero()
    assert written.tolist() == [[0, 0], [10, 0], [20, 0]]
    assert bool(decoded.logits.isfinite().all())


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (2, [1, 2]),
        (5, [1, 2, 4, 5]),
        (8, [1, 2, 4, 8]),
        (20, [1, 2, 4, 8, 16, 20]),
        (32, [1, 2, 4, 8, 16, 24, 32]),
    ],
)
def test_sizes_reach_up_to_the_largest_batch(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes


def test_attention_that_reads_the_host_cannot_be_recorded(tiny_checkpoint: Path) -> None:
    core = make_core(tiny_checkpoint, max_num_seqs=2)
    assert isinstance(core.executor, ModelRunner)
    assert not core.executor.can_record_decodes
    record_decodes(core.executor, max_num_seqs=2, max_model_len=MAX_LEN)
    assert core.executor._graphs is None
    with pytest.raises(ValueError, match="on the host"):
        record(core, Repeating(), max_num_seqs=2)


def test_a_recording_that_fails_leaves_an_engine_that_answers(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_recorder() -> Recorder:
        def fail(compute: Callable[[], Decoded]) -> tuple[Callable[[], None], Decoded]:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        return fail

    monkeypatch.setattr("server.runner.hardware.cuda_recorder", no_recorder)
    core = make_core(tiny_checkpoint, max_num_seqs=2, attention_backend="triton")
    assert isinstance(core.executor, ModelRunner)
    with caplog.at_level(logging.WARNING):
        record_decodes(core.executor, max_num_seqs=2, max_model_len=MAX_LEN)
    assert "decodes are not recorded: operation not permitted when stream is capturing" in caplog.text
    assert answers(core, 1).tokens == answers(make_core(tiny_checkpoint, max_num_seqs=2), 1).tokens
