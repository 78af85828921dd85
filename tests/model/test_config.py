from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from server.errors import CheckpointError
from server.model.config import PixelNormalization, load_model_config
from server.types import ImageSettings

# What the published config.json says; all else is the config class's defaults.
PUBLISHED = {
    "architectures": ["Idefics2ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "evil.Config"},
    "image_token_id": 32001,
    "model_type": "idefics2",
    "perceiver_config": {"model_type": "idefics2"},
    "text_config": {
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "vocab_size": 32003,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.40.0.dev0",
    "use_cache": True,
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 980,
        "intermediate_size": 4304,
        "model_type": "idefics2",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
    },
}
IMAGE_PROCESSOR = {
    "do_image_splitting": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.1, 0.2, 0.3],
    "rescale_factor": 0.00392156862745098,
    "resample": 2,
    "size": {"longest_edge": 980, "shortest_edge": 378},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder laid out as the published one was in 2024."""
    write(tmp_path / "config.json", PUBLISHED)
    write(tmp_path / "preprocessor_config.json", IMAGE_PROCESSOR)
    write(tmp_path / "generation_config.json", {"eos_token_id": [2, 32002], "bad_words_ids": [[32000], [32001]]})
    return tmp_path


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def edit(folder: Path, dotted: str, value: Any) -> None:
    """Set one value of config.json, such as text_config.hidden_act."""
    content = json.loads((folder / "config.json").read_text())
    *parents, key = dotted.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    place[key] = value
    write(folder / "config.json", content)


def test_published_layout_is_the_8b_model(folder: Path) -> None:
    config = load_model_config(folder)
    text, vision, perceiver = config.text, config.vision, config.perceiver
    assert (text.hidden_size, text.intermediate_size, text.num_layers) == (4096, 14336, 32)
    assert (text.num_heads, text.num_kv_heads, text.head_dim) == (32, 8, 128)
    assert (text.vocab_size, text.max_position_embeddings, text.sliding_window) == (32003, 32768, 4096)
    assert (text.rms_norm_eps, text.rope_theta) == (1e-5, 10000.0)
    assert (vision.hidden_size, vision.intermediate_size, vision.num_layers) == (1152, 4304, 27)
    assert (vision.num_heads, vision.head_dim, vision.patch_size, vision.patches_per_side) == (16, 72, 14, 70)
    assert (perceiver.hidden_size, perceiver.num_latents, perceiver.depth) == (4096, 64, 3)
    assert (perceiver.num_heads, perceiver.num_kv_heads, perceiver.head_dim) == (16, 4, 96)
    assert config.image_token_id == 32001
    assert config.eos_token_ids == (2, 32002)
    assert config.suppressed_token_ids == (32000, 32001)
    assert config.dtype == torch.float32
    assert not config.tie_word_embeddings
    assert config.images == ImageSettings(shortest_edge=378, longest_edge=980, do_image_splitting=True)
    assert config.pixels == PixelNormalization(
        rescale_factor=0.00392156862745098, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)
    )


def test_newer_layout_wins_over_the_older(folder: Path) -> None:
    newer = IMAGE_PROCESSOR | {"do_image_splitting": False, "size": {"longest_edge": 700, "shortest_edge": 200}}
    write(folder / "processor_config.json", {"image_seq_len": 64, "image_processor": newer})
    images = load_model_config(folder).images
    assert images == ImageSettings(shortest_edge=200, longest_edge=700, do_image_splitting=False)


def test_processor_config_without_image_processor_falls_back(folder: Path) -> None:
    write(folder / "processor_config.json", {"image_seq_len": 64})
    assert load_model_config(folder).pixels.mean == (0.4, 0.5, 0.6)


def test_absent_image_values_are_the_image_processors_defaults(folder: Path) -> None:
    from transformers import Idefics2ImageProcessorPil

    write(folder / "preprocessor_config.json", {})
    config, defaults = load_model_config(folder), Idefics2ImageProcessorPil()
    assert list(config.pixels.mean) == list(defaults.image_mean)
    assert list(config.pixels.std) == list(defaults.image_std)
    assert config.pixels.rescale_factor == defaults.rescale_factor
    assert config.images.do_image_splitting == defaults.do_image_splitting
    assert config.images.shortest_edge == defaults.size["shortest_edge"]
    assert config.images.longest_edge == defaults.size["longest_edge"]


def test_written_checkpoints_read_back(tiny_checkpoint: Path, tied_checkpoint: Path) -> None:
    tiny, tied = load_model_config(tiny_checkpoint), load_model_config(tied_checkpoint)
    assert (tiny.tie_word_embeddings, tied.tie_word_embeddings) == (False, True)
    assert (tied.text.num_heads, tied.text.num_kv_heads, tied.vision.hidden_size) == (6, 3, 48)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"eos_token_id": 2}, (2,)),
        ({"eos_token_id": [32002, 2, 2]}, (2, 32002)),
        ({}, (2, 7, 32002)),
        (None, (2, 7, 32002)),
    ],
)
def test_eos(folder: Path, generation: dict[str, Any] | None, expected: tuple[int, ...]) -> None:
    edit(folder, "text_config.eos_token_id", 7)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        write(folder / "generation_config.json", generation)
    assert load_model_config(folder).eos_token_ids == expected


@pytest.mark.parametrize(
    ("bad_words", "expected"),
    [
        ([[32000], [5, 6], [9]], (9, 32000, 32001)),  # two words together are no single token
        (None, (32000, 32001)),
    ],
)
def test_suppressed_tokens(folder: Path, bad_words: list[list[int]] | None, expected: tuple[int, ...]) -> None:
    write(folder / "generation_config.json", {"bad_words_ids": bad_words})
    assert load_model_config(folder).suppressed_token_ids == expected


@pytest.mark.parametrize(
    ("stored", "expected"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), (None, torch.float32)]
)
def test_dtype(folder: Path, stored: str | None, expected: torch.dtype) -> None:
    edit(folder, "torch_dtype", stored)
    assert load_model_config(folder).dtype == expected


def test_rope_theta_in_either_place(folder: Path) -> None:
    edit(folder, "text_config.rope_theta", 500.0)
    assert load_model_config(folder).text.rope_theta == 500.0
    edit(folder, "text_config.rope_parameters", {"rope_type": "default", "rope_theta": 700.0})
    assert load_model_config(folder).text.rope_theta == 700.0


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llava", "model_type must be 'idefics2', found 'llava'"),
        ("quantization_config", {"quant_method": "awq"}, "quantization_config"),
        ("text_config.model_type", "llama", "text_config.model_type must be 'mistral', found 'llama'"),
        ("text_config.model_type", "no such model", "config.json"),
        ("text_config.hidden_act", "gelu", "text_config.hidden_act must be 'silu', found 'gelu'"),
        ("perceiver_config.hidden_act", "relu", "perceiver_config.hidden_act must be 'silu', found 'relu'"),
        ("vision_config.hidden_act", "gelu", "vision_config.hidden_act must be 'gelu_pytorch_tanh', found 'gelu'"),
        ("vision_config.num_channels", 1, "vision_config.num_channels must be 3, found 1"),
        ("vision_config.num_attention_heads", 7, "hidden_size over heads must divide evenly, found 1152 over 7"),
        ("vision_config.patch_size", [14, 14], r"vision_config.patch_size must be a positive integer"),
        ("text_config.num_hidden_layers", 0, "text_config.num_hidden_layers must be a positive integer, found 0"),
        ("text_config.num_hidden_layers", "many", "config.json: .*num_hidden_layers"),
        ("text_config.num_key_value_heads", 5, "text_config: heads over kv heads must divide evenly, found 32 over 5"),
        ("text_config.head_dim", 15, "even rotary dimension"),
        ("text_config.sliding_window", 0, "sliding_window must be positive or null, found 0"),
        (
            "text_config.rope_parameters",
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            "rope_type must be 'default', found 'linear'",
        ),
        ("text_config.rope_parameters", {"rope_type": "default", "rope_theta": -1.0}, "rope_theta must be a positive"),
        ("text_config.rope_scaling", {"type": "dynamic", "factor": 2.0}, "rope_type must be 'default'"),
        ("torch_dtype", "int8", "dtype must be float32, bfloat16 or float16, found torch.int8"),
        ("image_token_id", 32003, "token id 32003 is outside the vocabulary of 32003"),
        ("vision_config.image_size", 700, "must ascend, found 14, 378, 980, 700"),
        ("vision_config.image_size", 7, "image_size 7 is less than a patch"),
    ],
)
def test_odd_config_is_refused(folder: Path, key: str, value: Any, message: str) -> None:
    edit(folder, key, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model_config(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize must be true, found False"),
        ({"do_normalize": None}, "do_normalize must be true, found None"),
        ({"resample": 3}, r"resample must be 2 \(bilinear\), found 3"),
        ({"image_mean": [0.5, 0.5]}, "image_mean cannot be"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std cannot be"),
        ({"rescale_factor": "big"}, "rescale_factor cannot be 'big'"),
        ({"size": {"height": 980, "width": 980}}, "size cannot be"),
        ({"do_image_splitting": "yes"}, "do_image_splitting cannot be 'yes'"),
        ({"size": {"shortest_edge": 1000, "longest_edge": 980}}, "must ascend, found 14, 1000, 980, 980"),
    ],
)
def test_odd_image_processor_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    write(folder / "preprocessor_config.json", IMAGE_PROCESSOR | changes)
    with pytest.raises(CheckpointError, match=message):
        load_model_config(folder)


def test_image_seq_len_must_be_the_resamplers(folder: Path) -> None:
    write(folder / "processor_config.json", {"image_seq_len": 32, "image_processor": IMAGE_PROCESSOR})
    with pytest.raises(CheckpointError, match="image_seq_len must be the resampler's 64, found 32"):
        load_model_config(folder)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "</s>"}, "must hold token ids"),
        ({"bad_words_ids": [["<image>"]]}, "must hold token ids"),
        ({"eos_token_id": [2, 99999]}, "token id 99999 is outside the vocabulary"),
    ],
)
def test_odd_generation_config_is_refused(folder: Path, generation: dict[str, Any], message: str) -> None:
    write(folder / "generation_config.json", generation)
    with pytest.raises(CheckpointError, match=message):
        load_model_config(folder)


def test_missing_and_damaged_files_are_named(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither processor_config.json nor preprocessor_config.json"):
        load_model_config(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: is not JSON"):
        load_model_config(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config.json: must hold a JSON object"):
        load_model_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: there is no such file"):
        load_model_config(folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match=r"config.json: there is no such file"):
        load_model_config(folder)


def test_reading_warns_of_nothing(tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_model_config(tiny_checkpoint)
    assert not caplog.records
