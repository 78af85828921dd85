"""Pictures for the training, drawn ahead of it by processes of their own, and read more than once where learning is
faster than drawing."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from server.demo.checkpoint import IMAGE_TOKEN_ID
from server.demo.curriculum import Batch, Learners, TileGroup, draw_batch, stage_at
from server.demo.examples import ExampleMaker
from server.demo.trainer import Plan
from server.demo.typefaces import training_typefaces
from server.model.config import load_model_config

SHELF = 256  # steps whose pictures are kept to be read again


class Drawers:
    """Processes that draw the batches of coming steps while this one learns from the present one.

    Batches come as files: through a pipe, pictures for a fast device would cost this process more than learning.
    """

    def __init__(self, folder: Path, plan: Plan, *, num_processes: int, first: int) -> None:
        memory = Path("/dev/shm")
        self._scratch = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
        context = multiprocessing.get_context("spawn")
        arguments = (folder, plan, Path(self._scratch.name))
        self._pool = ProcessPoolExecutor(num_processes, context, _prepare_drawing, arguments)
        self._parts = plan.parts
        self._steps = itertools.count(first, plan.readings)
        self._coming: deque[list[Future[Path]]] = deque()
        for _ in range(2 * num_processes):
            self._order()

    def _order(self) -> None:
        step = next(self._steps)
        self._coming.append([self._pool.submit(_draw, step, part) for part in range(self._parts)])

    def take(self) -> list[Batch]:
        """The next batches, of one step."""
        self._order()
        return [_unpacked(future.result()) for future in self._coming.popleft()]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._scratch.cleanup()


class Shelf:
    """Batches on the device, each to be read `plan.readings` times: first when it is new, then now and then."""

    def __init__(self, take: Callable[[], list[Batch]], plan: Plan, *, first: int, device: torch.device) -> None:
        self._take = take
        self._plan = plan
        self._device = device
        self._first = first
        self._kept: deque[list[Batch]] = deque(maxlen=SHELF)

    def at(self, step: int) -> list[Batch]:
        """The batches of this step. Steps are asked for one after the other."""
        if (step - self._first) % self._plan.readings == 0 or not self._suits(step):
            batches = [batch.to(self._device) for batch in self._take()]
            if self._plan.readings > 1:
                self._kept.append(batches)
            return batches
        return random.Random(f"{self._plan.seed}/{step}").choice(self._kept)

    def _suits(self, step: int) -> bool:
        """Whether anything is kept for those who learn now; what others learnt from is given away."""
        learners = stage_at(step * self._plan.pictures).learners
        while self._kept and self._kept[0][0].learners != learners:
            self._kept.popleft()
        return bool(self._kept)


_drawing: Callable[[int, int], Path]  # in a process that draws


def _prepare_drawing(folder: Path, plan: Plan, scratch: Path) -> None:
    global _drawing
    os.nice(5)
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    config = load_model_config(folder)
    maker = ExampleMaker(
        folder,
        images=config.images,
        rows_per_tile=config.perceiver.num_latents,
        patch_size=config.vision.patch_size,
    )
    typefaces = training_typefaces()

    def draw(step: int, part: int) -> Path:
        batch = draw_batch(
            step,
            part,
            parts=plan.parts,
            seed=plan.seed,
            pictures=plan.pictures,
            maker=maker,
            typefaces=typefaces,
            image_token_id=IMAGE_TOKEN_ID,
        )
        return _packed(batch, scratch / f"{step}-{part}.safetensors")

    _drawing = draw


def _leave_with_parent() -> None:
    """A pool's process waits for work for ever when what gave it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _draw(step: int, part: int) -> Path:
    return _drawing(step, part)


def _packed(batch: Batch, path: Path) -> Path:
    tensors: dict[str, Tensor] = {name: getattr(batch, name) for name in ("token_ids", "asked", "answers")}
    for index, group in enumerate(batch.groups):
        tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in vars(group).items()}
    save_file(tensors, path, metadata={"learners": batch.learners, "groups": str(len(batch.groups))})
    return path


def _unpacked(path: Path) -> Batch:
    """The batch in this file, which is gone then."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path.unlink()
    learners: Learners = metadata["learners"]
    return Batch(
        groups=[_group(tensors, index) for index in range(int(metadata["groups"]))],
        token_ids=tensors["token_ids"],
        asked=tensors["asked"],
        answers=tensors["answers"],
        learners=learners,
    )


def _group(tensors: dict[str, Tensor], index: int) -> TileGroup:
    names: Sequence[str] = ("tiles", "patches", "cells", "words", "marks", "positions")
    return TileGroup(**{name: tensors[f"{index}.{name}"] for name in names})
