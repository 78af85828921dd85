from __future__ import annotations

import json
import logging
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from server.demo import checkpoint
from server.demo.checkpoint import SIZES, default_demo_folder, ensure_demo, write_checkpoint
from server.errors import CheckpointError
from server.model.config import load_model_config
from server.model.weight_map import checkpoint_shapes, weight_spread

FILES = {
    *("chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
}


def test_files_are_those_of_a_published_checkpoint(tiny_checkpoint: Path) -> None:
    assert {path.name for path in tiny_checkpoint.iterdir()} == FILES
    assert len({path.stat().st_mode for path in tiny_checkpoint.iterdir()}) == 1


def test_tensors_are_those_of_the_layout_and_spread(tiny_checkpoint: Path) -> None:
    tensors = load_file(tiny_checkpoint / "model.safetensors")
    shapes = checkpoint_shapes(load_model_config(tiny_checkpoint))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    for name, tensor in tensors.items():
        mean, std = weight_spread(name, tuple(tensor.shape))
        slack = 6 * std * tensor.numel() ** -0.5
        assert tensor.mean().item() == pytest.approx(mean, abs=slack), name
        assert tensor.std().item() == pytest.approx(std, abs=slack), name


def test_weights_follow_the_seed_alone(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "same", "tiny", seed=0)
    write_checkpoint(tmp_path / "other", "tiny", seed=1)
    original = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert (tmp_path / "same" / "model.safetensors").read_bytes() == original
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != original


def test_transformers_reads_tokenizer_template_and_processor(tiny_checkpoint: Path) -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(tiny_checkpoint, backend="pil")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "User:<image>What?<end_of_utterance>\nAssistant:"
    token_ids = processor.tokenizer("a<end_of_utterance>\n")["input_ids"]
    assert token_ids == [1, 264, 32002, 28705, 13]  # 28705 is what `legacy` adds after a special token
    assert processor.tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"]) == [32000, 32001]
    assert processor.image_processor.do_image_splitting


def test_processor_is_what_transformers_own_class_saves(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import Idefics2ImageProcessorPil, Idefics2Processor, LlamaTokenizer

    (tmp_path / "tokenizer.model").write_bytes((tiny_checkpoint / "tokenizer.model").read_bytes())
    Idefics2Processor(
        Idefics2ImageProcessorPil(
            size={"shortest_edge": 378, "longest_edge": 980},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            do_image_splitting=True,
        ),
        LlamaTokenizer.from_pretrained(tmp_path, legacy=True, add_bos_token=True),
        image_seq_len=64,
        chat_template=checkpoint.CHAT_TEMPLATE,
    ).save_pretrained(tmp_path)
    checkpoint._complete_tokenizer(tmp_path)
    for theirs in tmp_path.iterdir():
        ours = tiny_checkpoint / theirs.name
        if theirs.suffix == ".json":
            assert json.loads(ours.read_bytes()) == json.loads(theirs.read_bytes()), theirs.name
        else:
            assert ours.read_bytes() == theirs.read_bytes(), theirs.name
    assert {path.name for path in tmp_path.iterdir()} == FILES - {
        *("config.json", "generation_config.json", "model.safetensors")
    }


def test_writing_and_reading_is_quiet_and_quick(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path / "first", "tiny")  # imports and thread pools
    capfd.readouterr()
    started = time.process_time()  # not the clock: tests may share their cores
    with caplog.at_level(logging.WARNING):
        write_checkpoint(tmp_path / "second", "tiny", text_only=tmp_path / "text")
    assert time.process_time() - started < 5
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize(("size", "shards"), [("tiny", 1), ("tiny", 3), ("tiny-tied", 2)])
def test_backbone_alone_gives_the_same_logits(size: str, shards: int, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, Idefics2ForConditionalGeneration, MistralForCausalLM

    write_checkpoint(tmp_path / "whole", size, shards=shards, text_only=tmp_path / "text")
    whole = Idefics2ForConditionalGeneration.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    text, report = MistralForCausalLM.from_pretrained(tmp_path / "text", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    token_ids = torch.arange(3, 30)[None]
    with torch.inference_mode():
        torch.testing.assert_close(text(token_ids).logits, whole(input_ids=token_ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "text")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "User: Hi<end_of_utterance>\nAssistant:"


def test_shards_have_an_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "tiny", shards=3)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {path.name: load_file(path) for path in tmp_path.glob("model-*.safetensors")}
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensors in files.values() for tensor in tensors.values()
    )
    assert sorted(files) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_8b_has_the_published_shape(tmp_path: Path) -> None:
    """From its config alone: 8.4 billion parameters."""
    checkpoint._write_configs(tmp_path, SIZES["8b"], torch.bfloat16)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    shapes = checkpoint_shapes(load_model_config(tmp_path))
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count == 8_402_768_112
    groups = checkpoint._split(shapes, 5)
    sizes = [sum(torch.Size(shape).numel() for shape in group.values()) for group in groups]
    assert len(groups) == 5
    assert max(sizes) < 1.1 * min(sizes)
    assert [name for group in groups for name in group] == list(shapes)


def test_demo_folder_follows_xdg_and_what_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = default_demo_folder()
    assert folder.parent == tmp_path / "idefics2-server"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_demo_folder() == tmp_path / "home" / ".cache" / "idefics2-server" / folder.name
    monkeypatch.setattr(checkpoint, "BUNDLED_SIZE", "tiny")
    assert default_demo_folder().name != folder.name
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"an update's")
    assert default_demo_folder().name != folder.name
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="the demo model's weights cannot be read: No such file"):
        ensure_demo()


def test_bundled_weights_are_small() -> None:
    """A clone of the repository brings them along."""
    weights = checkpoint.BUNDLED / "model.safetensors"
    assert weights.stat().st_size <= 25_000_000
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}


def test_demo_is_written_once_and_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = ensure_demo()
    bundled = list(checkpoint.BUNDLED.iterdir())
    assert {path.name for path in folder.iterdir()} == FILES | {path.name for path in bundled}
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in bundled)
    assert load_model_config(folder).text.hidden_size == SIZES["demo"].text.hidden
    assert list(folder.parent.iterdir()) == [folder]
    monkeypatch.setattr(checkpoint, "_write_bundled", lambda out: pytest.fail("written again"))
    assert ensure_demo() == folder


def test_demo_of_a_faster_process_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def write_both(out: Path) -> None:
        for folder, content in ((out, "ours"), (default_demo_folder(), "theirs")):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(content)

    monkeypatch.setattr(checkpoint, "_write_bundled", write_both)
    assert (ensure_demo() / "config.json").read_text() == "theirs"
    assert list(default_demo_folder().parent.iterdir()) == [default_demo_folder()]


def test_broken_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(out: Path) -> None:
        out.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_bundled", fail)
    with pytest.raises(CheckpointError, match="the demo model cannot be written: No space left on device"):
        ensure_demo()
    assert not list(default_demo_folder().parent.iterdir())
