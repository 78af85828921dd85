"""What a checkpoint folder says about its model, read once, checked, and frozen.

`config.json` goes through transformers' own config class, because published files name only what differs from that
class's defaults. Nothing in a folder is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import Idefics2Config

from server.errors import CheckpointError
from server.types import ImageSettings

# The published model's: end of sequence and <end_of_utterance>. They hold where a checkpoint names none of its own.
DEFAULT_EOS_TOKEN_IDS = (2, 32002)

# Idefics2ImageProcessor's, for keys that a preprocessor file leaves out.
DEFAULT_IMAGE_PROCESSOR: dict[str, Any] = {
    "size": {"shortest_edge": 378, "longest_edge": 980},
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_image_splitting": False,
    "resample": 2,
    "rescale_factor": 1 / 255,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
BILINEAR = 2  # Pillow's number of the filter

T = TypeVar("T")


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `image_size` is the longest side in pixels that its position table covers."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class PerceiverConfig:
    """The resampler. `num_latents` is how many rows a tile becomes."""

    hidden_size: int
    num_latents: int
    depth: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float


@dataclass(frozen=True)
class TextConfig:
    """The language model. `sliding_window` counts the tokens a query sees, itself included; None is all."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int | None
    rms_norm_eps: float
    rope_theta: float


@dataclass(frozen=True)
class PixelNormalization:
    """What the tower sees of a byte: (byte * rescale_factor - mean) / std, one mean and std a channel."""

    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class ModelConfig:
    """Everything the rest of the server needs to know from a checkpoint folder besides weights and tokenizer.

    `suppressed_token_ids` are never to be sampled: the image token and the boundary beside it.
    `dtype` is the type that the weights are said to be stored in.
    """

    vision: VisionConfig
    perceiver: PerceiverConfig
    text: TextConfig
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    suppressed_token_ids: tuple[int, ...]
    tie_word_embeddings: bool
    dtype: torch.dtype
    pixels: PixelNormalization
    images: ImageSettings


def load_model_config(folder: Path) -> ModelConfig:
    """Read config.json, generation_config.json and the image processor's file of a checkpoint folder.

    Raises CheckpointError naming the file for one that is missing, unreadable, of another model, or holds a value
    that this server does not support.
    """
    config = _read_config(folder)
    text, vision, perceiver = config.text_config, config.vision_config, config.perceiver_config
    for refused, problem in _unsupported(config):
        if refused:
            raise CheckpointError(f"{folder / 'config.json'}: {problem}")
    eos_token_ids, suppressed_token_ids = _special_token_ids(folder, config)
    pixels, images = _image_processor(folder, image_rows=perceiver.resampler_n_latents)
    result = ModelConfig(
        vision=VisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_layers=vision.num_hidden_layers,
            num_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.layer_norm_eps,
        ),
        perceiver=PerceiverConfig(
            hidden_size=perceiver.hidden_size,
            num_latents=perceiver.resampler_n_latents,
            depth=perceiver.resampler_depth,
            num_heads=perceiver.resampler_n_heads,
            num_kv_heads=perceiver.num_key_value_heads,
            head_dim=perceiver.resampler_head_dim,
            rms_norm_eps=perceiver.rms_norm_eps,
        ),
        text=TextConfig(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=text.head_dim,
            vocab_size=text.vocab_size,
            max_position_embeddings=text.max_position_embeddings,
            sliding_window=text.sliding_window,
            rms_norm_eps=text.rms_norm_eps,
            rope_theta=float(text.rope_parameters["rope_theta"]),
        ),
        image_token_id=config.image_token_id,
        eos_token_ids=eos_token_ids,
        suppressed_token_ids=suppressed_token_ids,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=config.dtype or torch.float32,
        pixels=pixels,
        images=images,
    )
    _check_together(folder, result)
    return result


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return content


def _read_config(folder: Path) -> Any:
    """config.json as transformers' Idefics2Config."""
    path = folder / "config.json"
    raw = _read_json(path)
    if raw is None:
        raise CheckpointError(f"{path}: there is no such file; is this an Idefics2 checkpoint?")
    if raw.get("model_type") != "idefics2":
        raise CheckpointError(f"{path}: model_type must be 'idefics2', found {raw.get('model_type')!r}")
    if raw.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: has a quantization_config; only unquantised weights are supported")
    try:
        return Idefics2Config.from_dict(raw)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: {_one_line(error)}") from None


def _unsupported(config: Any) -> Iterator[tuple[bool, str]]:
    """Pairs of (is the config at fault, what is wrong), cheapest first; later ones rely on earlier ones."""
    text, vision, perceiver = config.text_config, config.vision_config, config.perceiver_config
    yield text.model_type != "mistral", f"text_config.model_type must be 'mistral', found {text.model_type!r}"
    rope = text.rope_parameters or {}
    rope_type = rope.get("rope_type")
    yield rope_type != "default", f"rope_type must be 'default', found {rope_type!r}"
    theta = rope.get("rope_theta")
    yield not isinstance(theta, int | float) or theta <= 0, f"rope_theta must be a positive number, found {theta!r}"
    for name, given, wanted in (
        ("text_config.hidden_act", text.hidden_act, "silu"),
        ("perceiver_config.hidden_act", perceiver.hidden_act, "silu"),
        ("vision_config.hidden_act", vision.hidden_act, "gelu_pytorch_tanh"),
        ("vision_config.num_channels", vision.num_channels, 3),
    ):
        yield given != wanted, f"{name} must be {wanted!r}, found {given!r}"
    for name, given in _sizes(config):
        wrong = not isinstance(given, int) or given < 1
        yield wrong, f"{name} must be a positive integer, found {given!r}"
    for name, whole, part in (
        ("text_config: heads over kv heads", text.num_attention_heads, text.num_key_value_heads),
        ("perceiver_config: heads over kv heads", perceiver.resampler_n_heads, perceiver.num_key_value_heads),
        ("vision_config: hidden_size over heads", vision.hidden_size, vision.num_attention_heads),
    ):
        yield whole % part != 0, f"{name} must divide evenly, found {whole} over {part}"
    yield vision.image_size < vision.patch_size, f"vision_config.image_size {vision.image_size} is less than a patch"
    window = text.sliding_window
    yield window is not None and window < 1, f"text_config.sliding_window must be positive or null, found {window}"
    types = (None, torch.float32, torch.bfloat16, torch.float16)
    yield config.dtype not in types, f"dtype must be float32, bfloat16 or float16, found {config.dtype}"


def _sizes(config: Any) -> Iterator[tuple[str, Any]]:
    """Every number of the config that must be a positive integer, with its name."""
    sizes = {
        "text_config": "vocab_size max_position_embeddings hidden_size intermediate_size num_hidden_layers "
        "num_attention_heads num_key_value_heads head_dim",
        "vision_config": "hidden_size intermediate_size num_hidden_layers num_attention_heads image_size patch_size",
        "perceiver_config": "hidden_size resampler_n_latents resampler_depth resampler_n_heads num_key_value_heads "
        "resampler_head_dim",
    }
    for part, names in sizes.items():
        for name in names.split():
            yield f"{part}.{name}", getattr(getattr(config, part), name)


def _check_together(folder: Path, config: ModelConfig) -> None:
    """What must hold between values that come from different files."""
    vocab_size = config.text.vocab_size
    for token_id in (config.image_token_id, *config.eos_token_ids, *config.suppressed_token_ids):
        if not 0 <= token_id < vocab_size:
            raise CheckpointError(f"{folder}: token id {token_id} is outside the vocabulary of {vocab_size}")
    images, vision = config.images, config.vision
    if not vision.patch_size <= images.shortest_edge <= images.longest_edge <= vision.image_size:
        raise CheckpointError(
            f"{folder}: patch size, shortest edge, longest edge and image size must ascend, found "
            f"{vision.patch_size}, {images.shortest_edge}, {images.longest_edge}, {vision.image_size}"
        )


def _special_token_ids(folder: Path, config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that end an answer, and those that must never be sampled.

    The former are generation_config.json's; where it names none, the published model's and config.json's together.
    The latter are the image token and every bad word of one token; where there is none, the image boundary, which is
    the token before the image token.
    """
    path = folder / "generation_config.json"
    generation = _read_json(path) or {}
    try:
        ends = _as_ids(generation.get("eos_token_id"))
        bad_words = [_as_ids(word) for word in generation.get("bad_words_ids") or ()]
    except TypeError:
        raise CheckpointError(f"{path}: eos_token_id and bad_words_ids must hold token ids") from None
    ends = ends or [*DEFAULT_EOS_TOKEN_IDS, *_as_ids(config.text_config.eos_token_id)]
    suppressed = [word[0] for word in bad_words if len(word) == 1] or [config.image_token_id - 1]
    return tuple(sorted(set(ends))), tuple(sorted({config.image_token_id, *suppressed}))


def _as_ids(value: Any) -> list[int]:
    """One id, a list of them or None, as a list. Raises TypeError for anything else."""
    if value is None:
        return []
    ids = [value] if isinstance(value, int) else list(value)
    if not all(isinstance(token_id, int) for token_id in ids):
        raise TypeError
    return ids


def _image_processor(folder: Path, *, image_rows: int) -> tuple[PixelNormalization, ImageSettings]:
    """The image processor's values, from the newer layout of files or the older."""
    newer, older = folder / "processor_config.json", folder / "preprocessor_config.json"
    processor = _read_json(newer) or {}
    if processor.get("image_seq_len", image_rows) != image_rows:
        raise CheckpointError(
            f"{newer}: image_seq_len must be the resampler's {image_rows}, found {processor['image_seq_len']!r}"
        )
    path, values = newer, processor.get("image_processor")
    if values is None:
        path, values = older, _read_json(older)
    if values is None:
        raise CheckpointError(f"{folder}: neither {newer.name} nor {older.name} describes the image processor")
    given = DEFAULT_IMAGE_PROCESSOR | values
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if given[key] is not True:
            raise CheckpointError(f"{path}: {key} must be true, found {given[key]!r}")
    if given["resample"] != BILINEAR:
        raise CheckpointError(f"{path}: resample must be {BILINEAR} (bilinear), found {given['resample']!r}")

    def checked(key: str, read: Callable[[Any], T]) -> T:
        try:
            return read(given[key])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: {key} cannot be {given[key]!r}") from None

    pixels = PixelNormalization(
        rescale_factor=checked("rescale_factor", _positive),
        mean=checked("image_mean", _triple),
        std=checked("image_std", lambda value: _triple([_positive(x) for x in value])),
    )
    images = ImageSettings(
        shortest_edge=checked("size", lambda size: _whole(size["shortest_edge"])),
        longest_edge=checked("size", lambda size: _whole(size["longest_edge"])),
        do_image_splitting=checked("do_image_splitting", _flag),
    )
    return pixels, images


def _positive(value: Any) -> float:
    if not float(value) > 0:
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _triple(values: Sequence[Any]) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
