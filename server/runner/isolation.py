"""Finds out whose an exception is: what fails for many together runs again in halves, down to those that fail alone.

Knows exceptions, and what the device's libraries put into them; knows nothing of what is computed.
"""

from __future__ import annotations

import enum
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch

from server.errors import EngineBrokenError

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

# What PyTorch's CPU allocator says (c10/core/impl/alloc_cpu.cpp), on Linux and elsewhere; the CUDA runtime where no
# allocator of PyTorch's stands between; cuBLAS and cuDNN for their own workspaces.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "_STATUS_ALLOC_FAILED")


class Cause(enum.Enum):
    ITEM = enum.auto()  # something that was computed, or two things that were computed together
    MEMORY = enum.auto()  # too little is free now
    DEVICE = enum.auto()  # every later call would fail too


@dataclass
class Isolated(Generic[Item, Result]):
    """Each item is in one run of `results`, or failed alone: for lack of memory in `starved`, else in `broken`."""

    results: list[Result] = field(default_factory=list)
    broken: list[Item] = field(default_factory=list)
    starved: list[Item] = field(default_factory=list)
    num_runs: int = 0


def isolate(
    items: Sequence[Item], run: Callable[[Sequence[Item]], Result], name: Callable[[Item], str]
) -> Isolated[Item, Result]:
    """Run for all items at once; where that raises, for each half, and so on.

    Groups keep their order, and halve ceil(log2 B) times at most, so that one bad item among B costs 2 * that + 1 runs;
    B bad ones cost 2 * B - 1. What can be freed is freed when memory first runs out, and that run is tried once more.
    `run` must be repeatable. `name` is for the log. Raises EngineBrokenError for a device that is of no use any more.
    """
    found: Isolated[Item, Result] = Isolated()
    has_freed = False
    groups = [list(items)] if items else []
    while groups:
        group = groups.pop()
        cause = _attempt(group, run, name, found)
        if cause is None:
            continue
        if cause is Cause.MEMORY and not has_freed:
            has_freed = True
            free_memory()
            groups.append(group)
        elif len(group) > 1:
            middle = len(group) // 2
            groups += [group[middle:], group[:middle]]
        else:
            (found.starved if cause is Cause.MEMORY else found.broken).append(group[0])
    if found.num_runs > 1:
        logger.warning(
            "%d runs for %d at once: failed alone: %s; out of memory: %s",
            found.num_runs,
            len(items),
            ", ".join(map(name, found.broken)) or "none",
            ", ".join(map(name, found.starved)) or "none",
        )
    return found


def _attempt(
    group: list[Item],
    run: Callable[[Sequence[Item]], Result],
    name: Callable[[Item], str],
    found: Isolated[Item, Result],
) -> Cause | None:
    """One run; None if it came to its end. The exception ends here: its frames hold the tensors of the run."""
    found.num_runs += 1
    try:
        found.results.append(run(group))
    except Exception as error:
        cause = cause_of(error)
        if cause is Cause.DEVICE:
            raise EngineBrokenError(f"the device is of no use any more: {_first_line(error)}") from error
        if cause is Cause.ITEM and len(group) == 1 and not found.broken:  # one traceback tells of them all, mostly
            logger.error("%s failed", name(group[0]), exc_info=error)
        return cause
    return None


def cause_of(error: Exception) -> Cause:
    """What an exception of a run tells about whose it is."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Cause.MEMORY
    if isinstance(error, RuntimeError):
        text = str(error)
        if any(phrase in text for phrase in OUT_OF_MEMORY):
            return Cause.MEMORY
        # The CUDA runtime reports an illegal access or a failed assertion again at each later call of the process.
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in text:
            return Cause.DEVICE
    return Cause.ITEM


def free_memory() -> None:
    """Give back what nobody uses: garbage in cycles first, whose tensors the device's cache then gets."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where no CUDA device is used


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
