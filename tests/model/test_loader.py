from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.demo.checkpoint import write_checkpoint
from server.errors import CheckpointError
from server.model.idefics2 import Idefics2Model
from server.model.loader import resolve_model
from tests.model.twins import Pair, load, run

FC1 = "model.vision_model.encoder.layers.0.mlp.fc1.weight"
LATENTS = "model.connector.perceiver_resampler.latents"
EMBEDDING = "model.text_model.embed_tokens.weight"
HEAD = "lm_head.weight"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def edited(source: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint whose tensors `change` has altered."""
    shutil.copytree(source, out)
    tensors = load_file(out / WEIGHTS)
    change(tensors)
    save_file(tensors, out / WEIGHTS)
    return out


def assert_same(model: Idefics2Model, other: Idefics2Model) -> None:
    first, second = dict(model.named_parameters()), dict(other.named_parameters())
    assert first.keys() == second.keys()
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name


def test_each_shard_is_in_its_rows(pair: Pair) -> None:
    theirs = dict(pair.reference.named_parameters())
    prefix, layer = "model.text_model.layers.1.", pair.ours.text.layers[1]
    stacked = torch.cat([theirs[f"{prefix}self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(layer.attention.qkv.weight, stacked)
    stacked = torch.cat([theirs[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(layer.mlp.gate_up.weight, stacked)


def test_missing_tensors_are_listed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint, tmp_path / "m", lambda tensors: [tensors.pop(FC1), tensors.pop(LATENTS)])
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value).splitlines() == [
        f"{folder}: the weights do not fit config.json:",
        f"  missing {FC1}, expected [128, 64]",
        f"  missing {LATENTS}, expected [64, 128]",
    ]


def test_unexpected_and_misshapen_and_mistyped_tensors_are_listed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.extra.weight"] = torch.zeros(2, 3)
        tensors[FC1] = tensors[FC1].T.contiguous()  # as many elements, in another shape
        tensors[LATENTS] = tensors[LATENTS].to(torch.int32)

    folder = edited(tiny_checkpoint, tmp_path / "m", change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert set(str(caught.value).splitlines()[1:]) == {
        "  unexpected model.extra.weight, found [2, 3]",
        f"  misshapen {FC1}, expected [128, 64], found [64, 128]",
        f"  mistyped {LATENTS}, expected one of F64, F32, F16, BF16, found I32",
    }


def test_a_long_list_is_cut(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint, tmp_path / "m", lambda tensors: [tensors.pop(name) for name in list(tensors)[:20]])
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    lines = str(caught.value).splitlines()
    assert len(lines) == 7
    assert lines[-1] == "  and 15 more"


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_truncated_file_is_named(tiny_checkpoint: Path, tmp_path: Path, keep: float) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated or not a safetensors file"):
        load(folder)


def test_missing_files_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {FC1: "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors: there is no such file"):
        load(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be read as an index"),
        (json.dumps({"metadata": {}}), "cannot be read as an index"),
        (json.dumps({"weight_map": {FC1: "../secret.safetensors"}}), "'../secret.safetensors' is not a file name"),
    ],
)
def test_odd_index_is_refused(tiny_checkpoint: Path, tmp_path: Path, index: str, message: str) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(folder)


def test_shards_equal_the_single_file(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny", shards=3)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert_same(load(tmp_path), load(tiny_checkpoint))


def test_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny", shards=2)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    tensors = load_file(second)
    tensors |= {name: load_file(first)[name] for name in (FC1,)}
    save_file(tensors, second)
    with pytest.raises(CheckpointError, match=f"duplicate {re.escape(FC1)} in {first.name} and {second.name}"):
        load(tmp_path)


def test_bfloat16_file_in_a_float32_model(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny", dtype="bfloat16")
    model, original = load(tmp_path), load(tiny_checkpoint)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, original.get_parameter(name).bfloat16().float()), name


def test_dtype_reaches_every_parameter_and_no_table(tiny_checkpoint: Path) -> None:
    model = load(tiny_checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.text.rotary.table.dtype == torch.float32
    assert model.vision.patches.buckets.dtype == torch.int64
    assert model.normalizer.scale.dtype == torch.float32


def test_nothing_is_left_unfilled(pair: Pair) -> None:
    """Buffers that no file holds are computed, and nothing stays on the meta device."""
    for name, buffer in pair.ours.named_buffers():
        assert not buffer.is_meta, name
    assert pair.ours.text.rotary.table[0, 0].eq(1).all()
    assert pair.ours.vision.patches.buckets[70].tolist() == list(range(70))
    assert pair.ours.normalizer.shift.tolist() == [-1, -1, -1]


def test_tied_head_may_be_absent_or_equal_but_not_other(tied_checkpoint: Path, tmp_path: Path) -> None:
    plain = load(tied_checkpoint)
    assert plain.lm_head is None

    def repeat(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING].clone()

    def alter(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING] + 1

    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[HEAD] = tensors[EMBEDDING][:-1].clone()

    assert_same(load(edited(tied_checkpoint, tmp_path / "same", repeat)), plain)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        load(edited(tied_checkpoint, tmp_path / "other", alter))
    with pytest.raises(
        CheckpointError, match=r"misshapen lm_head\.weight, expected \[32003, 96\], found \[32002, 96\]"
    ):
        load(edited(tied_checkpoint, tmp_path / "cut", cut))


def test_untied_head_is_required(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = edited(tiny_checkpoint, tmp_path / "m", lambda tensors: tensors.pop(HEAD))
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight, expected \[32003, 128\]"):
        load(folder)


def test_dummy_weights_need_no_files_and_follow_the_seed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    model = load(folder, load_format="dummy", seed=5)
    assert_same(model, load(folder, load_format="dummy", seed=5))
    embedding = model.text.embedding.weight
    assert not torch.equal(embedding, load(folder, load_format="dummy", seed=6).text.embedding.weight)
    assert embedding.std().item() == pytest.approx(0.05, rel=0.01)
    assert model.text.layers[0].mlp.gate_up.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert model.text.norm.weight.mean().item() == pytest.approx(1.0, abs=0.05)
    with torch.inference_mode():
        assert run(model, model.embed(torch.arange(9))).isfinite().all()


def test_progress_bar_counts_bytes(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(tiny_checkpoint)
    assert capsys.readouterr().err == ""
    load(tiny_checkpoint, progress=True)
    error = capsys.readouterr().err
    assert "Loading weights: 100%" in error
    assert "39.8M/39.8M" in error


def test_model_is_a_folder_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(repo=repo, **options)
        return str(tmp_path)

    monkeypatch.setattr("server.model.loader.snapshot_download", download)
    assert resolve_model(str(tmp_path)) == tmp_path
    assert not asked
    assert resolve_model("HuggingFaceM4/idefics2-8b", "main") == tmp_path
    assert asked["repo"] == "HuggingFaceM4/idefics2-8b"
    assert asked["revision"] == "main"
    assert set(asked["allow_patterns"]) == {"*.json", "*.jinja", "*.safetensors", "tokenizer.model"}


@pytest.mark.parametrize("model", ["/no/such/folder", "./none", "~/none-of-that-name"])
def test_missing_folder_is_said_to_be_missing(model: str) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        resolve_model(model)


def test_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no revision 'v2'"):
        resolve_model(str(tmp_path), "v2")


def test_hub_errors_are_one_line() -> None:
    """HF_HUB_OFFLINE is set for tests, so that the hub fails by itself."""
    with pytest.raises(CheckpointError, match="the hub cannot be reached or HF_HUB_OFFLINE is set") as caught:
        resolve_model("nobody/no-such-model-here")
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__
    with pytest.raises(CheckpointError, match="is neither a folder nor a hub id"):
        resolve_model("a/b/c/d")


def test_other_download_errors_keep_their_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise OSError("\nNo space left on device\nmore words")

    monkeypatch.setattr("server.model.loader.snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"^a/b: cannot be downloaded: No space left on device$"):
        resolve_model("a/b")
