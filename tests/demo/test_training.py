"""The loop that trains the demo model: the serving modules' own mathematics, resumed exactly, exported as published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.demo.checkpoint import IMAGE_TOKEN_ID, write_checkpoint
from server.demo.curriculum import LETTERS, READING, Batch, draw_batch
from server.demo.examples import IGNORED, ExampleMaker
from server.demo.pupil import WholeSequences
from server.demo.training import Plan, Trainer, Vocabulary, answer_tokens, export
from server.demo.typefaces import training_typefaces
from server.model.attention.base import LayerCache
from server.model.attention.sdpa import SdpaAttention
from server.model.config import ModelConfig, load_model_config
from server.model.loader import load_model

LAST_STAGE = LETTERS.steps + READING.steps
PLAN = Plan(steps=100, decay_steps=10, pictures=8, warm_up_steps=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pupil")
    write_checkpoint(folder, "demo", dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return load_model_config(folder)


@pytest.fixture(scope="module")
def batches(folder: Path, config: ModelConfig) -> list[Batch]:
    maker = ExampleMaker(folder, images=config.images, rows_per_tile=64, patch_size=config.vision.patch_size)
    return [
        draw_batch(
            step, 0, seed=1, pictures=4, maker=maker, typefaces=training_typefaces(), image_token_id=IMAGE_TOKEN_ID
        )
        for step in (LAST_STAGE, LAST_STAGE + 1)
    ]


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary(answer_tokens(folder), 32003, seed=0)


def test_attention_over_whole_sequences_is_the_servers() -> None:
    count, length, heads, kv_heads, size = 3, 20, 6, 2, 8
    query, key, value = (torch.randn(count * length, n, size) for n in (heads, kv_heads, kv_heads))
    backend = SdpaAttention(sliding_window=None)
    cache = LayerCache(*(torch.zeros(count * 2, 16, kv_heads, size) for _ in range(2)))
    metadata = backend.build_metadata(
        query_lens=[length] * count,
        seq_lens=[length] * count,
        block_tables=[[2 * index, 2 * index + 1] for index in range(count)],
        block_size=16,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    expected = backend.forward(query, key, value, cache, metadata)
    whole = WholeSequences()
    found = whole.forward(query, key, value, cache, whole.build_metadata(seq_lens=[length] * count))
    torch.testing.assert_close(found, expected)


def test_the_loss_falls_on_what_it_has_seen(config: ModelConfig, batches: list[Batch], vocabulary: Vocabulary) -> None:
    trainer = Trainer(config, PLAN)
    losses = [trainer.learn(batches, [vocabulary.at(0, batch) for batch in batches]) for _ in range(12)]
    assert losses[-1]["answers"] < 0.8 * losses[0]["answers"]
    assert losses[-1]["patches"] < 0.8 * losses[0]["patches"]


EYES = ("model.vision.", "model.connector.", "patch_head.", "cell_head.")


@pytest.mark.parametrize(("step", "loss"), [(0, "cells"), (LETTERS.steps, "answers")])
def test_eyes_learn_their_letters_first_and_then_the_reader_to_read(
    folder: Path, config: ModelConfig, vocabulary: Vocabulary, step: int, loss: str
) -> None:
    maker = ExampleMaker(folder, images=config.images, rows_per_tile=64, patch_size=14)
    batch = draw_batch(
        step, 0, seed=1, pictures=4, maker=maker, typefaces=training_typefaces(), image_token_id=IMAGE_TOKEN_ID
    )
    trainer = Trainer(config, PLAN)
    before = {name: master.clone() for name, master in trainer.masters.items()}
    losses = [trainer.learn([batch, batch], [vocabulary.at(0, batch)] * 2)[loss] for _ in range(4)]
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, master in trainer.masters.items() if not torch.equal(master, before[name])}
    assert changed == {name for name in before if name.startswith(EYES) == (step == 0)}


def test_a_run_that_was_kept_goes_on_as_if_it_had_not_stopped(
    config: ModelConfig, batches: list[Batch], vocabulary: Vocabulary
) -> None:
    words = [vocabulary.at(0, batch) for batch in batches]
    first = Trainer(config, PLAN)
    first.learn(batches, words)
    second = Trainer(config, PLAN)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()}, first.step)
    assert first.learn(batches, words) == second.learn(batches, words)
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_what_is_exported_is_what_was_trained(folder: Path, config: ModelConfig) -> None:
    trainer = Trainer(config, PLAN)
    export(trainer, folder)
    assert (folder / "model.safetensors").stat().st_size <= 25_000_000
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(folder / "model.safetensors").values())
    model = load_model(
        folder, config, attention=SdpaAttention(sliding_window=None), device=torch.device("cpu"), dtype=torch.bfloat16
    )
    trained = dict(trainer.pupil.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name]), name


def test_every_answer_is_in_its_vocabulary_and_others_change(batches: list[Batch], vocabulary: Vocabulary) -> None:
    for batch in batches:
        tokens = set(vocabulary.at(0, batch).tolist())
        assert set(batch.labels[batch.labels != IGNORED].tolist()) <= tokens
        assert tokens != set(vocabulary.at(1, batch).tolist())


def test_the_same_step_is_drawn_the_same(folder: Path, config: ModelConfig, batches: list[Batch]) -> None:
    maker = ExampleMaker(folder, images=config.images, rows_per_tile=64, patch_size=14)
    again = draw_batch(
        LAST_STAGE + 1,
        0,
        seed=1,
        pictures=4,
        maker=maker,
        typefaces=training_typefaces(),
        image_token_id=IMAGE_TOKEN_ID,
    )
    assert (again.token_ids == batches[1].token_ids).all()
    assert all((a.tiles == b.tiles).all() for a, b in zip(again.groups, batches[1].groups, strict=True))
