"""The loop that trains the demo model: the serving modules' own mathematics, resumed exactly, exported as published."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.demo.checkpoint import IMAGE_TOKEN_ID, write_checkpoint
from server.demo.curriculum import ALL, LETTERS, READING, STAGES, Batch, Stage, draw_batch
from server.demo.drawers import Shelf, _packed, _unpacked
from server.demo.examples import ExampleMaker
from server.demo.pupil import WholeSequences
from server.demo.trainer import Plan, Trainer, orthogonal
from server.demo.training import Vocabulary, answer_tokens, export, train, word_tokens
from server.demo.typefaces import training_typefaces
from server.errors import ConfigError
from server.model.attention.base import LayerCache
from server.model.attention.sdpa import SdpaAttention
from server.model.config import ModelConfig, load_model_config
from server.model.loader import load_model

Draw = Callable[[int], Batch]
PLAN = Plan(steps=100, decay_steps=10, pictures=8, warm_up_steps=1)
CPU = torch.device("cpu")


def first_step(stage: Stage) -> int:
    """The first step of PLAN that belongs to this stage."""
    before = sum(other.pictures for other in STAGES[: STAGES.index(stage)])
    return math.ceil(before / PLAN.pictures)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pupil")
    write_checkpoint(folder, "demo", dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> ModelConfig:
    return load_model_config(folder)


@pytest.fixture(scope="module")
def draw(folder: Path, config: ModelConfig) -> Draw:
    maker = ExampleMaker(folder, images=config.images, rows_per_tile=64, patch_size=config.vision.patch_size)

    def drawn(step: int) -> Batch:
        return draw_batch(
            step,
            0,
            parts=2,
            seed=1,
            pictures=PLAN.pictures,
            maker=maker,
            typefaces=training_typefaces(),
            image_token_id=IMAGE_TOKEN_ID,
        )

    return drawn


@pytest.fixture(scope="module")
def batches(draw: Draw) -> list[Batch]:
    """Two of small pictures, so that a step takes a second."""
    drawn = (draw(step) for step in itertools.count(first_step(ALL)))
    return list(itertools.islice((batch for batch in drawn if num_pixels(batch) < 4 * 140**2), 2))


@pytest.fixture(scope="module")
def split(draw: Draw) -> Batch:
    """One of pictures that were split into tiles of two sizes."""
    return next(batch for step in itertools.count(first_step(ALL)) if len((batch := draw(step)).groups) == 2)


def num_pixels(batch: Batch) -> int:
    return sum(group.tiles[..., 0].numel() for group in batch.groups)


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return Vocabulary(answer_tokens(folder), 32003, seed=0)


@pytest.fixture(scope="module")
def make_trainer(folder: Path, config: ModelConfig) -> Callable[[], Trainer]:
    """Trainers in float32, which every CPU multiplies."""
    tokens = word_tokens(folder)
    return lambda: Trainer(config, PLAN, word_tokens=tokens, device=CPU, dtype=torch.float32)


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


def test_the_loss_falls_on_what_it_has_seen(
    make_trainer: Callable[[], Trainer], batches: list[Batch], vocabulary: Vocabulary
) -> None:
    trainer = make_trainer()
    losses = [trainer.learn(batches, [vocabulary.at(0, batch) for batch in batches]) for _ in range(6)]
    assert losses[-1].answers < 0.8 * losses[0].answers
    assert losses[-1].patches < 0.9 * losses[0].patches
    assert losses[-1].words < 0.9 * losses[0].words


EYES = ("model.vision.", "model.connector.", "patch_head.", "cell_head.", "mark_head.", "word_head.", "no_word_head.")


@pytest.mark.parametrize(("stage", "loss"), [(LETTERS, "cells"), (READING, "answers")])
def test_eyes_learn_their_letters_first_and_then_the_reader_to_read(
    make_trainer: Callable[[], Trainer], draw: Draw, stage: Stage, loss: str
) -> None:
    batch = draw(first_step(stage))
    trainer = make_trainer()
    before = {name: master.clone() for name, master in trainer.masters.items()}
    losses = [getattr(trainer.learn([batch], [None]), loss) for _ in range(3)]
    assert losses[-1] < losses[0]
    changed = {name for name, master in trainer.masters.items() if not torch.equal(master, before[name])}
    tables = {"model.text.embedding.weight"}  # words in pictures are told by it too
    expected = {name for name in before if name.startswith(EYES) == (stage is LETTERS)} | tables
    assert changed == expected


def test_every_weight_of_the_pupil_is_a_part_of_what_is_trained(make_trainer: Callable[[], Trainer]) -> None:
    trainer = make_trainer()
    for weights in trainer.weights:
        weights.student.fill_(0.5)
    assert all(bool((parameter == 0.5).all()) for parameter in trainer.pupil.parameters())
    sizes = sum(master.numel() for master in trainer.masters.values())
    assert sizes == sum(parameter.numel() for parameter in trainer.pupil.parameters())


@pytest.mark.parametrize("shape", [(3, 8, 20), (3, 20, 8), (2, 12, 12)])
def test_orthogonal_updates_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices, dtype=torch.float32)
    assert found.shape == matrices.shape
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.3  # five steps do not bring the smallest all the way
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    nearest = u @ v
    assert torch.cosine_similarity(found.flatten(1), nearest.flatten(1)).min() > 0.95


def test_a_run_that_was_kept_goes_on_as_if_it_had_not_stopped(
    make_trainer: Callable[[], Trainer], batches: list[Batch], vocabulary: Vocabulary
) -> None:
    words = [vocabulary.at(0, batch) for batch in batches]
    first, second = make_trainer(), make_trainer()
    first.learn(batches, words)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()}, first.step)
    assert first.learn(batches, words) == second.learn(batches, words)
    for name, tensor in first.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_what_is_exported_is_what_was_trained(
    folder: Path, config: ModelConfig, make_trainer: Callable[[], Trainer]
) -> None:
    trainer = make_trainer()
    export(trainer, folder)
    assert (folder / "model.safetensors").stat().st_size <= 25_000_000
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(folder / "model.safetensors").values())
    model = load_model(folder, config, attention=SdpaAttention(sliding_window=None), device=CPU, dtype=torch.bfloat16)
    trained = dict(trainer.pupil.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name].bfloat16()), name


def test_every_answer_is_in_its_vocabulary_and_others_change(batches: list[Batch], vocabulary: Vocabulary) -> None:
    for batch in batches:
        tokens = set(vocabulary.at(0, batch).tolist())
        assert set(batch.answers.tolist()) <= tokens
        assert tokens != set(vocabulary.at(1, batch).tolist())


def test_the_same_step_is_drawn_the_same(draw: Draw) -> None:
    first, again, other = (draw(first_step(ALL) + step) for step in (0, 0, 1))
    assert torch.equal(again.token_ids, first.token_ids)
    assert all(torch.equal(a.tiles, b.tiles) for a, b in zip(again.groups, first.groups, strict=True))
    assert not torch.equal(other.token_ids, first.token_ids)


def test_answers_follow_the_places_that_ask_for_them(batches: list[Batch], split: Batch) -> None:
    for batch in [*batches, split]:
        assert torch.equal(batch.token_ids.flatten()[batch.asked + 1], batch.answers)


def test_pictures_come_back_from_a_drawer_as_they_were_drawn(
    tmp_path: Path, batches: list[Batch], split: Batch
) -> None:
    for number, batch in enumerate([*batches, split]):
        path = _packed(batch, tmp_path / str(number))
        found = _unpacked(path)
        assert not path.exists()
        assert found.learners == batch.learners
        for name in ("token_ids", "asked", "answers"):
            assert torch.equal(getattr(found, name), getattr(batch, name))
        for group, expected in zip(found.groups, batch.groups, strict=True):
            assert all(torch.equal(getattr(group, name), value) for name, value in vars(expected).items())


def test_each_picture_is_read_as_often_as_planned(draw: Draw) -> None:
    plan = dataclasses.replace(PLAN, readings=3)
    start = first_step(ALL)
    fresh = iter([draw(start + number)] for number in range(4))
    taken: list[list[Batch]] = []

    def take() -> list[Batch]:
        taken.append(next(fresh))
        return taken[-1]

    shelf = Shelf(take, plan, first=start, device=CPU)
    seen = [shelf.at(start + step)[0].token_ids for step in range(9)]
    assert len(taken) == 3
    known = [batches[0].token_ids for batches in taken]
    for step, ids in enumerate(seen):
        assert any(torch.equal(ids, other) for other in known[: step // 3 + 1])


def test_what_others_learnt_from_is_not_read_again(draw: Draw) -> None:
    plan = dataclasses.replace(PLAN, readings=1_000_000)
    last = first_step(READING) - 1
    steps = iter((last, last + 1))
    shelf = Shelf(lambda: [draw(next(steps))], plan, first=last, device=CPU)
    assert shelf.at(last)[0].learners == "eyes"
    assert shelf.at(last + 1)[0].learners == "reader"


def test_the_rate_rises_stays_and_falls_to_nothing_at_the_end() -> None:
    plan = Plan(steps=1000, decay_steps=100, warm_up_steps=10)
    assert plan.rate(0) == pytest.approx(0.1)
    assert plan.rate(9) == plan.rate(899) == 1.0
    assert plan.rate(950) == pytest.approx(0.5)
    assert plan.rate(1000) == 0.0
    earlier = plan.ending_at(500)
    assert earlier.rate(450) == pytest.approx(0.5)


@pytest.mark.slow
def test_a_run_ends_in_time_is_kept_and_goes_on(tmp_path: Path, folder: Path) -> None:
    out, keep = tmp_path / "model", tmp_path / "keep"
    shutil.copytree(folder, out)
    plan = dataclasses.replace(PLAN, steps=2, parts=1)
    train(out, plan, keep=keep)
    first = load_file(out / "model.safetensors")
    assert load_file(keep / "state.safetensors").keys() > {"weight/patch_head.weight"}
    train(out, dataclasses.replace(plan, steps=3), keep=keep)
    lines = [json.loads(line) for line in (keep / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3]
    assert any(not torch.equal(weight, first[name]) for name, weight in load_file(out / "model.safetensors").items())
    with pytest.raises(ConfigError, match="seed"):
        train(out, dataclasses.replace(plan, seed=5), keep=keep)
