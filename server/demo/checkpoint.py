"""Write Idefics2 checkpoints: the bundled demo model, and random weights for tests and for shapes to measure with.

The files are laid out as the published ones are, from the same tokenizer, chat template and processor values, so that
anything that reads an Idefics2 checkpoint reads these. What random weights say is noise, but noise that depends on
every pixel and word.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from server.errors import CheckpointError
from server.inputs.tokenizer import END_OF_UTTERANCE, FAKE_TOKEN, IMAGE_TOKEN
from server.model.config import load_model_config
from server.model.weight_map import LM_HEAD, TEXT_PREFIX, checkpoint_shapes, weight_spread

BUNDLED = Path(__file__).with_name("model")  # the weights that were trained, and what is said of them
BUNDLED_SIZE = "demo"
BUNDLED_DTYPE = torch.bfloat16
DEMO_VERSION = "demo-v2"  # to be raised when what is written beside the weights changes
MAX_SHARD_BYTES = 4 << 30

VOCAB_SIZE = 32003
BOUNDARY_TOKEN_ID, IMAGE_TOKEN_ID, END_OF_UTTERANCE_ID = 32000, 32001, 32002
BOS_ID, EOS_ID, PAD_ID = 1, 2, 0
PROCESSOR_CLASS = "Idefics2Processor"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# For engines that know the backbone alone: content is a string.
TEXT_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class TextSize:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int


@dataclass(frozen=True)
class VisionSize:
    hidden: int
    layers: int
    heads: int
    mlp: int
    image: int = 980


@dataclass(frozen=True)
class ResamplerSize:
    heads: int
    kv_heads: int
    head_dim: int
    depth: int = 3


@dataclass(frozen=True)
class ModelSize:
    """The shape of a checkpoint; what is not named here is as in the published model."""

    text: TextSize
    vision: VisionSize
    resampler: ResamplerSize
    tied: bool = False
    shortest_edge: int = 378
    longest_edge: int = 980


SIZES: Mapping[str, ModelSize] = {
    # Half of its parameters are the embedding of 32,003 tokens.
    "demo": ModelSize(
        TextSize(192, 5, 6, 2, 32, 512),
        VisionSize(192, 5, 6, 768, image=224),
        ResamplerSize(6, 2, 32, depth=3),
        tied=True,
        shortest_edge=84,
        longest_edge=224,
    ),
    "tiny": ModelSize(TextSize(128, 4, 8, 2, 16, 256), VisionSize(64, 3, 4, 128), ResamplerSize(4, 2, 16)),
    "tiny-tied": ModelSize(TextSize(96, 3, 6, 3, 16, 160), VisionSize(48, 2, 3, 80), ResamplerSize(6, 3, 8), tied=True),
    "bench": ModelSize(TextSize(1024, 12, 16, 4, 64, 3584), VisionSize(384, 12, 6, 1536), ResamplerSize(8, 2, 64)),
    "1b": ModelSize(TextSize(2048, 16, 32, 8, 64, 7168), VisionSize(768, 12, 12, 3072), ResamplerSize(16, 4, 96)),
    "8b": ModelSize(TextSize(4096, 32, 32, 8, 128, 14336), VisionSize(1152, 27, 16, 4304), ResamplerSize(16, 4, 96)),
}


def default_demo_folder() -> Path:
    """Where the bundled model lives once it is written; one of other weights or sizes would live elsewhere.

    Raises CheckpointError when the weights cannot be read.
    """
    weights = BUNDLED / "model.safetensors"
    try:
        with weights.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256")
    except OSError as error:
        raise CheckpointError(f"{weights}: the demo model's weights cannot be read: {error.strerror}") from None
    digest.update(repr(SIZES[BUNDLED_SIZE]).encode())
    return _cache_folder() / f"{DEMO_VERSION}-{digest.hexdigest()[:12]}"


def _cache_folder() -> Path:
    """$XDG_CACHE_HOME, or ~/.cache, then idefics2-server."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "idefics2-server"


def ensure_demo() -> Path:
    """The bundled model's folder, written first if there is none. It appears whole or not at all.

    Raises CheckpointError when it cannot be written.
    """
    folder = default_demo_folder()
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Beside its destination, because a rename is atomic only within a file system.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            written = Path(scratch) / "model"
            _write_bundled(written)
            try:
                written.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster, and its model is the same
                    raise
    except OSError as error:
        raise CheckpointError(f"{folder}: the demo model cannot be written: {error.strerror or error}") from None
    return folder


def _write_bundled(out: Path) -> None:
    out.mkdir()
    _write_configs(out, SIZES[BUNDLED_SIZE], BUNDLED_DTYPE)
    _write_processor(out, SIZES[BUNDLED_SIZE])
    for file in BUNDLED.iterdir():
        shutil.copyfile(file, out / file.name)


def with_processor(folder: Path) -> Path:
    """`folder` itself, or where it has no tokenizer a copy of its JSON files with the family's processor beside them.

    So that a config.json alone is enough for `load_format: dummy`. Raises CheckpointError when it cannot be written.
    """
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer.model").exists():
        return folder
    configs = [file for file in sorted(folder.glob("*.json")) if not file.name.endswith(".index.json")]
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in configs)).hexdigest()[:16]
    completed = _cache_folder() / f"config-{digest}"
    try:
        completed.mkdir(parents=True, exist_ok=True)
        _write_processor(completed, SIZES["8b"])
        for file in configs:
            shutil.copyfile(file, completed / file.name)
    except OSError as error:
        raise CheckpointError(f"{completed}: cannot be written: {error.strerror or error}") from None
    return completed


def write_checkpoint(
    out: Path,
    size: str,
    *,
    seed: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    shards: int | None = None,
    text_only: Path | None = None,
    weights: bool = True,
) -> None:
    """Write a checkpoint of `SIZES[size]` with weights drawn from `seed` into folder `out`.

    Weights are drawn in float32 and then rounded to `dtype`, in an order that does not depend on `shards`, the number
    of safetensors files (default: as few as keep each to about 4 GiB). `text_only` also gets the language model alone,
    as a MistralForCausalLM checkpoint with its tokenizer. Without `weights` all else is written, which is what
    `load_format: dummy` needs. Raises KeyError for an unknown size.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch_dtype: torch.dtype = getattr(torch, dtype)
    _write_configs(out, SIZES[size], torch_dtype)
    _write_processor(out, SIZES[size])
    if not weights:
        return
    shapes = checkpoint_shapes(load_model_config(out))
    total = sum(torch.Size(shape).numel() for shape in shapes.values()) * torch_dtype.itemsize
    groups = _split(shapes, shards or -(-total // MAX_SHARD_BYTES))
    generator = torch.Generator().manual_seed(seed)
    files = dict(zip(_shard_names(len(groups)), groups, strict=True))
    for file, group in files.items():
        _save(_draw(group, generator, torch_dtype), out / file)
    _write_index(out, files, total)
    if text_only is not None:
        _write_backbone(out, files, text_only)


def _write_configs(out: Path, size: ModelSize, dtype: torch.dtype) -> None:
    from transformers import Idefics2Config

    text, vision, resampler = size.text, size.vision, size.resampler
    Idefics2Config(
        architectures=["Idefics2ForConditionalGeneration"],
        dtype=dtype,
        image_token_id=IMAGE_TOKEN_ID,
        tie_word_embeddings=size.tied,
        text_config={
            "model_type": "mistral",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": text.hidden,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "num_key_value_heads": text.kv_heads,
            "head_dim": text.head_dim,
            "intermediate_size": text.mlp,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "tie_word_embeddings": size.tied,
            "pad_token_id": PAD_ID,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
        },
        vision_config={
            "hidden_size": vision.hidden,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp,
            "image_size": vision.image,
            "patch_size": 14,
        },
        perceiver_config={
            "hidden_size": text.hidden,
            "resampler_n_heads": resampler.heads,
            "num_key_value_heads": resampler.kv_heads,
            "resampler_head_dim": resampler.head_dim,
            "resampler_depth": resampler.depth,
        },
    ).save_pretrained(out)
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID, END_OF_UTTERANCE_ID],
        "pad_token_id": PAD_ID,
        "bad_words_ids": [[BOUNDARY_TOKEN_ID], [IMAGE_TOKEN_ID]],
    }
    _write_json(out / "generation_config.json", generation)


def _write_processor(out: Path, size: ModelSize) -> None:
    """Tokenizer, image processor and chat template, as transformers' Idefics2Processor saves them.

    Without that class: to import it takes several times as long as all that is written here.
    """
    import mistral_common
    from transformers import LlamaTokenizer

    shutil.copyfile(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", out / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(out, legacy=True, add_bos_token=True)
    for added in ([FAKE_TOKEN, IMAGE_TOKEN], [END_OF_UTTERANCE]):
        tokenizer.add_special_tokens({"additional_special_tokens": added})
    tokenizer.save_pretrained(out)
    _complete_tokenizer(out, processor_class=PROCESSOR_CLASS)
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    image_processor = {
        "do_convert_rgb": True,
        "do_image_splitting": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_processor_type": "Idefics2ImageProcessor",
        "image_std": [0.5] * 3,
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": size.longest_edge, "shortest_edge": size.shortest_edge},
    }
    processor = {"image_processor": image_processor, "image_seq_len": 64, "processor_class": PROCESSOR_CLASS}
    _write_json(out / "processor_config.json", processor)


def _complete_tokenizer(folder: Path, **entries: str) -> None:
    """Put `entries` into tokenizer_config.json, and the flags of Mistral's own that `save_pretrained` leaves out.

    Without `legacy` a reader tokenizes text after special tokens in another way.
    """
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, config | entries | {"legacy": True, "add_bos_token": True, "add_eos_token": False})


def _split(shapes: Mapping[str, tuple[int, ...]], count: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut the tensors, in order, into `count` groups, none empty, as even as whole tensors allow."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    remaining = sum(torch.Size(shape).numel() for shape in shapes.values())
    size = 0
    for index, (name, shape) in enumerate(shapes.items(), start=1):
        groups[-1][name] = shape
        size += torch.Size(shape).numel()
        groups_left = count - len(groups)
        if groups_left and (size * (groups_left + 1) >= remaining or len(shapes) - index == groups_left):
            remaining -= size
            size = 0
            groups.append({})
    return groups


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]


def _draw(shapes: Mapping[str, tuple[int, ...]], generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = {}
    for name, shape in shapes.items():
        mean, std = weight_spread(name, shape)
        tensors[name] = torch.empty(shape).normal_(mean, std, generator=generator).to(dtype)
    return tensors


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is as readable as its neighbours: `save_file` lets its owner alone read it."""
    save_file(tensors, path, metadata={"format": "pt"})
    shutil.copymode(path.parent / "config.json", path)


def _write_index(out: Path, groups: Mapping[str, Iterable[str]], total: int) -> None:
    """The index of several weight files; a single one has none."""
    if len(groups) > 1:
        weight_map = {name: file for file, names in groups.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(out / "model.safetensors.index.json", index)


def _write_backbone(source: Path, groups: Mapping[str, Iterable[str]], out: Path) -> None:
    """The language model of the checkpoint just written to `source`, as a text-only checkpoint of its own.

    `groups` gives the tensor names in each weight file of `source`.
    """
    from transformers import AutoTokenizer, Idefics2Config

    out.mkdir(parents=True, exist_ok=True)
    config = Idefics2Config.from_pretrained(source)
    text_config = config.text_config
    text_config.architectures = ["MistralForCausalLM"]
    text_config.dtype = config.dtype
    text_config.save_pretrained(out)
    _write_json(
        out / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": [EOS_ID, END_OF_UTTERANCE_ID], "pad_token_id": PAD_ID},
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = TEXT_CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    _complete_tokenizer(out)
    parts = [(file, backbone) for file, names in groups.items() if (backbone := _backbone_names(names))]
    renamed: dict[str, list[str]] = {}
    total = 0
    for target, (file, backbone) in zip(_shard_names(len(parts)), parts, strict=True):
        with safe_open(source / file, framework="pt") as stored:
            tensors = {new: stored.get_tensor(old) for old, new in backbone.items()}
            _save(tensors, out / target)
        renamed[target] = list(tensors)
        total += sum(tensor.nbytes for tensor in tensors.values())
    _write_index(out, renamed, total)


def _backbone_names(names: Iterable[str]) -> dict[str, str]:
    """Of a checkpoint's tensor names those of the language model, each with its name in a MistralForCausalLM."""
    renamed = {name: "model." + name.removeprefix(TEXT_PREFIX) for name in names if name.startswith(TEXT_PREFIX)}
    return renamed | {name: name for name in names if name == LM_HEAD}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
