"""Tokenizers take a second each to load: one of a kind for all tests of this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from server.inputs.tokenizer import Tokenizer
from tests.inputs.checkpoints import VARIANTS, make_variant


@pytest.fixture(scope="session")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


@dataclass(frozen=True)
class Variant:
    """A checkpoint's folder, our tokenizer of it and transformers' own."""

    name: str
    folder: Path
    ours: Tokenizer
    reference: Any


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    from transformers import AutoTokenizer

    folder = make_variant(request.param, tiny_checkpoint, tmp_path_factory.mktemp("variant"))
    return Variant(request.param, folder, Tokenizer(folder), AutoTokenizer.from_pretrained(folder))
