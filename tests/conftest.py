"""Fixtures that tests of several packages share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported: no test may need a network
# Read when a kernel is defined: what is written for CUDA is interpreted, on whatever machine.
os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end one process would work on them alone."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights, in float32. To be read only."""
    from server.demo.checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, "tiny")
    return folder


@pytest.fixture(scope="session")
def tied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another shape in every dimension, whose head is its embedding; float32. To be read only."""
    from server.demo.checkpoint import write_checkpoint

    folder = tmp_path_factory.mktemp("tied")
    write_checkpoint(folder, "tiny-tied", seed=1)
    return folder
