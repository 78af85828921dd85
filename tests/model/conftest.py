"""Our model beside transformers', at two sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.model.twins import Pair, load


@pytest.fixture(scope="session", params=["tiny_checkpoint", "tied_checkpoint"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="session")
def pair(checkpoint: Path) -> Pair:
    from transformers import Idefics2ForConditionalGeneration

    reference = Idefics2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    return Pair(load(checkpoint), reference.eval())
