"""Copies of a checkpoint's tokenizer and processor files, changed as other releases write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")


def copy_tokenizer(source: Path, out: Path, **changes: Any) -> Path:
    """The files of `source` without its weights; `changes` go to tokenizer_config.json."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, "config.json", "generation_config.json"):
        shutil.copyfile(source / name, out / name)
    edit_json(out / "tokenizer_config.json", **changes)
    return out


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def with_prepending_normalizer(folder: Path) -> Path:
    """tokenizer.json as releases before transformers 5 wrote it: spaces replaced by a normaliser."""
    edit_json(
        folder / "tokenizer.json",
        pre_tokenizer=None,
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
    )
    return folder


VARIANTS = ("legacy", "not legacy", "prepending normalizer")


def make_variant(name: str, source: Path, out: Path) -> Path:
    if name == "not legacy":
        return copy_tokenizer(source, out, legacy=False)
    copy = copy_tokenizer(source, out)
    return with_prepending_normalizer(copy) if name == "prepending normalizer" else copy
