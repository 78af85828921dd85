"""Checkpoints that cannot be served stop the start, whichever process finds out, and say why."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.config import ServerConfig
from server.errors import CheckpointError, ConfigError
from server.launch import build_inputs
from server.observability.metrics import ServerMetrics
from tests.engines import real_core
from tests.serving import ROOT, SMALL, clean_environment, command

WEIGHTS = "model.safetensors"
LONGEST_START_SECONDS = 120.0  # on a machine that does ten other things


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def norm(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith("input_layernorm.weight"))


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def drop_shard(folder: Path) -> None:
    names = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shards = dict.fromkeys(names, first) | {norm(names): second}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))


def misshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[norm(tensors)] = torch.ones(7)


def mistype(tensors: dict[str, torch.Tensor]) -> None:
    tensors[norm(tensors)] = tensors[norm(tensors)].to(torch.int32)


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[norm(tensors)].fill_(torch.nan)


def add_token(folder: Path) -> None:
    """As the tokenizer of a model that was trained further may have."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 32_003, "content": "<end_of_turn>"})
    file.write_text(json.dumps(content), encoding="utf-8")


def move_image_token(folder: Path) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["image_token_id"] = 31_000
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, f"{WEIGHTS}: is truncated or not a safetensors file"),
        (drop_shard, "model-00002-of-00002.safetensors: there is no such file"),
        (
            lambda folder: change_weights(folder, misshape),
            "misshapen .*input_layernorm.weight, expected .128., found .7.",
        ),
        (lambda folder: change_weights(folder, mistype), "mistyped .*input_layernorm.weight, .* found I32"),
    ],
    ids=["truncated", "a shard is missing", "a tensor of another shape", "a tensor of another type"],
)
def test_weights_that_do_not_fit(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        real_core(folder)


def test_weights_that_are_no_numbers_are_found_by_the_warm_up(folder: Path) -> None:
    change_weights(folder, poison)
    with pytest.raises(ConfigError, match=r"warm-up: a step of .* failed: the model's numbers broke down"):
        real_core(folder, warm_up=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (add_token, "the tokenizer has ids up to 32003, the model only 32003 of them"),
        (move_image_token, "the tokenizer's image token is 32001, the model's 31000"),
    ],
)
def test_a_tokenizer_of_another_model(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        build_inputs(ServerConfig(model=str(folder)), folder, ServerMetrics("test"))
    assert "\n" not in str(caught.value)


def test_the_server_leaves_with_one_line(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    truncate(folder)
    move_image_token(other)
    started = [
        subprocess.Popen(
            command("serve", str(checkpoint), *SMALL, "--port", "0"),
            cwd=ROOT,
            env=clean_environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for checkpoint in (folder, other)
    ]
    for process, message in zip(started, (f"{WEIGHTS}: is truncated", "the tokenizer's image token is"), strict=True):
        try:
            _, said = process.communicate(timeout=LONGEST_START_SECONDS)
        finally:
            process.kill()
        assert process.returncode == 2, said
        assert "Traceback" not in said
        assert [line for line in said.splitlines() if line.startswith("idefics2-server: ")] == [said.splitlines()[-1]]
        assert message in said.splitlines()[-1]
