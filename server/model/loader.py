"""From a checkpoint folder to a model that is complete or refused.

Weights are read through memory mapping and cast tensor by tensor while they are copied, so that there are never two
copies of the model in memory. Names and shapes are all checked before the first byte is copied.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from server.errors import CheckpointError
from server.model.attention.base import AttentionBackend
from server.model.config import ModelConfig
from server.model.idefics2 import Idefics2Model
from server.model.layers.linear import FusedLinear, Linear
from server.model.layers.packed import Packing
from server.model.weight_map import EMBEDDING, LM_HEAD, WeightTarget, weight_spread, weight_targets

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model")
WEIGHT_FILES = ("*.safetensors",)
FLOAT_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # safetensors' names and their bytes
MAX_PROBLEMS = 5  # how many an error lists


class StoredTensor(NamedTuple):
    """A tensor as the header of its file describes it; `dtype` is safetensors' name."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * FLOAT_TYPES[self.dtype]


def resolve_model(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a checkpoint: `model` itself if there is such a folder, else a download of that hub id.

    Without `weights` only the small files are downloaded.

    HF_HUB_OFFLINE and the other variables of huggingface_hub hold. Raises CheckpointError with the cause in a line.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CheckpointError(f"{model} is a folder and has no revision {revision!r}; revisions are for hub ids")
        return folder
    if folder.exists() or folder.is_absolute() or model.startswith((".", "~")):
        raise CheckpointError(f"{model}: there is no such folder")
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=[*SMALL_FILES, *(WEIGHT_FILES if weights else ())]
            )
        )
    except HFValidationError:
        raise CheckpointError(f"{model}: is neither a folder nor a hub id like 'owner/name'") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise CheckpointError(
            f"{model}: there is no such folder and no earlier download of that hub id, and the hub cannot be reached "
            "or HF_HUB_OFFLINE is set"
        ) from None
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        cause = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(f"{model}: cannot be downloaded: {cause}") from None


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    attention: AttentionBackend,
    device: torch.device,
    dtype: torch.dtype,
    packing: Packing | None = None,
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
    progress: bool = False,
) -> Idefics2Model:
    """Build the model of `config` on `device` in `dtype`, fill it, and pack its matrices if a `packing` is given.

    "auto" reads the folder's safetensors files, of whatever float type; "dummy" reads nothing and draws random weights
    from `seed`. `progress` shows a bar of bytes on stderr. Raises CheckpointError when a file is missing or damaged, or
    when its tensors are not exactly those of the model.
    """
    targets = weight_targets(config)
    stored = {} if load_format == "dummy" else _read_headers(folder)
    if load_format == "auto":
        _check_complete(folder, stored, targets, tied=config.tie_word_embeddings)
    with torch.device("meta"):
        model = Idefics2Model(config, attention)
    _allocate(model, device, dtype, matrix_dtype=dtype if packing is None else packing.matrix_dtype)
    model.fill_buffers(device)
    if load_format == "dummy":
        _fill_random(model, targets, seed=seed)
    else:
        _copy_weights(model, stored, targets, progress=progress)
    if packing is not None:
        model.pack(packing)
    return model.eval()


def _allocate(model: nn.Module, device: torch.device, dtype: torch.dtype, *, matrix_dtype: torch.dtype) -> None:
    """Give every parameter of a model that was built on the meta device memory, as it finds it.

    `to_empty` would do it too, and first import torch's symbolic algebra: a fifth of the demo model's loading.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, Linear) and name == "weight"
            empty = torch.empty(parameter.shape, dtype=matrix_dtype if is_matrix else dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint's files, from their headers alone."""
    found: dict[str, StoredTensor] = {}
    duplicates: list[str] = []
    for file in _weight_files(folder):
        with _opened(file) as source:
            for name in source.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name in found:
                    duplicates.append(f"duplicate {name} in {found[name].file.name} and {file.name}")
                entry = source.get_slice(name)
                found[name] = StoredTensor(file, tuple(entry.get_shape()), entry.get_dtype())
    if duplicates:
        raise CheckpointError(_summary(folder, duplicates))
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The checkpoint's safetensors files: the single one, or those that the index names."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return [single]
    if not index.exists():
        raise CheckpointError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: cannot be read as an index of weight files") from None
    for name in names:
        if Path(name).name != name:  # an index names its neighbours, never a path out of the folder
            raise CheckpointError(f"{index}: {name!r} is not a file name")
    return [folder / name for name in sorted(names)]


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file, memory mapped. Raises CheckpointError naming it when it is missing or damaged."""
    try:
        with safe_open(file, framework="pt", device="cpu") as source:
            yield source
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is truncated or not a safetensors file: {error}") from None


def _check_complete(
    folder: Path, stored: Mapping[str, StoredTensor], targets: Mapping[str, WeightTarget], *, tied: bool
) -> None:
    """Raise CheckpointError unless the stored tensors are exactly the wanted ones, in shape too."""
    wanted = {name: target.shape for name, target in targets.items()}
    if tied and LM_HEAD in stored:
        wanted[LM_HEAD] = wanted[EMBEDDING]
    problems = [f"missing {name}, expected {list(shape)}" for name, shape in wanted.items() if name not in stored]
    for name, tensor in stored.items():
        if name not in wanted:
            problems.append(f"unexpected {name}, found {list(tensor.shape)}")
        elif tensor.shape != wanted[name]:
            problems.append(f"misshapen {name}, expected {list(wanted[name])}, found {list(tensor.shape)}")
        elif tensor.dtype not in FLOAT_TYPES:
            problems.append(f"mistyped {name}, expected one of {', '.join(FLOAT_TYPES)}, found {tensor.dtype}")
    if problems:
        raise CheckpointError(_summary(folder, problems))


def _summary(folder: Path, problems: list[str]) -> str:
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    lines = [f"{folder}: the weights do not fit config.json:", *problems[:MAX_PROBLEMS], *more]
    return "\n  ".join(lines)


def _slot(model: Idefics2Model, target: WeightTarget) -> Tensor:
    """The part of a parameter that a checkpoint tensor fills."""
    parameter = model.get_parameter(target.parameter)
    if target.shard is None:
        return parameter
    layer = model.get_submodule(target.parameter.rpartition(".")[0])
    if not isinstance(layer, FusedLinear):
        raise TypeError(f"{target.parameter} has no shards")
    return parameter[layer.shard_rows(target.shard)]


def _copy_weights(
    model: Idefics2Model, stored: Mapping[str, StoredTensor], targets: Mapping[str, WeightTarget], *, progress: bool
) -> None:
    """Copy every tensor to its slot, cast on the way."""
    by_file: dict[Path, list[str]] = {}
    for name, tensor in stored.items():
        by_file.setdefault(tensor.file, []).append(name)
    total = sum(tensor.num_bytes for tensor in stored.values())
    # The default lock is a named semaphore shared between processes, which outlives an engine process that is killed.
    tqdm.set_lock(threading.RLock())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights", disable=not progress) as bar:
        for file, names in by_file.items():
            with _opened(file) as source:
                for name in names:
                    if name in targets:
                        slot = _slot(model, targets[name])
                        slot.copy_(source.get_tensor(name).view(slot.shape))
                    bar.update(stored[name].num_bytes)
    if model.lm_head is None and LM_HEAD in stored:
        _check_tied(model, stored[LM_HEAD].file)


def _check_tied(model: Idefics2Model, file: Path) -> None:
    """Raise CheckpointError if a stored head differs from the embedding that stands in for it."""
    embedding = model.text.embedding.weight
    with _opened(file) as source:
        if not torch.equal(source.get_tensor(LM_HEAD).to(embedding), embedding):
            raise CheckpointError(f"{file}: {LM_HEAD} differs from the embedding, but config.json ties them")


def _fill_random(model: Idefics2Model, targets: Mapping[str, WeightTarget], *, seed: int) -> None:
    """Draw every tensor on the device that it lives on."""
    generator = torch.Generator(model.text.embedding.weight.device).manual_seed(seed)
    for name, target in targets.items():
        mean, std = weight_spread(name, target.shape)
        _slot(model, target).normal_(mean, std, generator=generator)
