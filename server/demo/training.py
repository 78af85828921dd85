"""Train the demo model from nothing, by the very modules that serve it.

Weights and activations are bfloat16, the optimizers' copy of the weights is float32. Matrices are trained by Muon, all
else by AdamW. The rate rises, stays, and falls to nothing in the last steps, so that a run can be resumed and ended at
any step.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from server.demo.canvas import COLORS
from server.demo.checkpoint import IMAGE_TOKEN_ID
from server.demo.curriculum import Batch, draw_batch
from server.demo.examples import IGNORED, ExampleMaker
from server.demo.lexicon import WORDS
from server.demo.pupil import PlainAttention, Pupil, initialize
from server.demo.scenes.talk import NO_PICTURE
from server.demo.shapes import KINDS
from server.demo.typefaces import training_typefaces
from server.errors import ConfigError
from server.inputs.tokenizer import END_OF_UTTERANCE, Tokenizer
from server.model.config import ModelConfig, load_model_config
from server.model.layers.linear import FusedLinear
from server.model.weight_map import weight_targets

logger = logging.getLogger(__name__)

PARTS = 2  # batches, each of one size of tile, that make up a step
LETTERS_WEIGHT = 0.5
NUM_NEGATIVES = 512  # tokens drawn anew each step, of those that no answer has: they too must learn to be unlikely
LOG_STEPS = 50


@dataclass(frozen=True)
class Plan:
    """How long and how fast. Rates are of Muon and AdamW; `pictures` is a step's, in tiles of 112 × 112 pixels."""

    steps: int
    decay_steps: int
    seed: int = 0
    pictures: int = 64
    warm_up_steps: int = 200
    matrix_rate: float = 0.003
    other_rate: float = 1e-3
    weight_decay: float = 0.01
    max_norm: float = 1.0

    def rate(self, step: int) -> float:
        """The share of the full rate at a step."""
        left = (self.steps - step) / max(self.decay_steps, 1)
        return min(1.0, (step + 1) / self.warm_up_steps, max(left, 0.0))


class Trainer:
    """The pupil, float32 copies of its weights, and the optimizers of those."""

    def __init__(self, config: ModelConfig, plan: Plan, *, compiled: bool = False) -> None:
        self.plan = plan
        self.step = 0
        # One core each. Threads within an operation would wait for one another at the end of each of thousands.
        torch.set_num_threads(1)
        self._threads = ThreadPoolExecutor(PARTS)
        self.pupil = Pupil(config, compiled=compiled)
        initialize(self.pupil, plan.seed)
        self.masters = {name: p.detach().clone().float() for name, p in self.pupil.named_parameters()}
        self.pupil.to(torch.bfloat16)
        self.pupil.model.fill_buffers(torch.device("cpu"))
        matrices = [master for name, master in self.masters.items() if _is_matrix(name, master)]
        others = [master for name, master in self.masters.items() if not _is_matrix(name, master)]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (
                torch.optim.Muon(
                    matrices, lr=0.0, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw", ns_steps=4
                ),
                plan.matrix_rate,
            ),
            (torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True), plan.other_rate),
        ]

    def learn(self, batches: Sequence[Batch], vocabularies: Sequence[Tensor]) -> dict[str, float]:
        """One step of all optimizers over these batches, each in a thread of its own. Returns mean losses."""
        found = list(self._threads.map(self._study, batches, vocabularies))
        for index, master in enumerate(self.masters.values()):
            parts = [part for gradients, _ in found if (part := gradients[index]) is not None]
            master.grad = torch.stack([part.float() for part in parts]).sum(0) / len(batches) if parts else None
        torch.nn.utils.clip_grad_norm_(self.masters.values(), self.plan.max_norm)
        for optimizer, rate in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * self.plan.rate(self.step)
            optimizer.step()
        with torch.no_grad():
            for name, parameter in self.pupil.named_parameters():
                parameter.copy_(self.masters[name])
        self.step += 1
        return {name: sum(seen[name] for _, seen in found) / len(found) for name in found[0][1]}

    def _study(self, batch: Batch, vocabulary: Tensor) -> tuple[tuple[Tensor | None, ...], dict[str, float]]:
        with PlainAttention():
            losses = self.pupil(batch, vocabulary)
        loss = losses.answers + LETTERS_WEIGHT * (losses.patches + losses.cells)
        gradients = torch.autograd.grad(loss, list(self.pupil.parameters()), allow_unused=True)
        return gradients, {name: value.item() for name, value in losses._asdict().items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that a run goes on from, as named tensors."""
        names = {id(master): name for name, master in self.masters.items()}
        state = {f"weight/{name}": master.detach() for name, master in self.masters.items()}
        for optimizer, _ in self._optimizers:
            for master, values in optimizer.state.items():
                state |= {f"{key}/{names[id(master)]}": torch.as_tensor(value) for key, value in values.items()}
        return state

    def restore(self, state: dict[str, Tensor], step: int) -> None:
        """Go on from what `state` gave at this step."""
        self.step = step
        masters = self.masters
        with torch.no_grad():
            for name, parameter in self.pupil.named_parameters():
                masters[name].copy_(state[f"weight/{name}"])
                parameter.copy_(masters[name])
        names = {id(master): name for name, master in masters.items()}
        for optimizer, _ in self._optimizers:
            for group in optimizer.param_groups:
                for master in group["params"]:
                    suffix = f"/{names[id(master)]}"
                    kept = {key.removesuffix(suffix): value for key, value in state.items() if key.endswith(suffix)}
                    optimizer.state[master] = {key: value.clone() for key, value in kept.items() if key != "weight"}


def _is_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon trains it: not tables, and not what stands at the ends."""
    ends = ("embedding.weight", "position.weight", "latents", "patches.projection.weight", "_head.weight")
    return weight.ndim == 2 and not name.endswith(ends)


class Drawers:
    """Processes that draw the batches of coming steps while this one learns from the present one."""

    def __init__(self, folder: Path, plan: Plan, *, num_processes: int, first: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(num_processes, context, _prepare_drawing, (folder, plan))
        self._next = first
        self._coming: deque[Future[list[Batch]]] = deque()
        for _ in range(num_processes + 1):
            self._order()

    def _order(self) -> None:
        self._coming.append(self._pool.submit(_draw, self._next))
        self._next += 1

    def take(self) -> list[Batch]:
        """The batches of the next step."""
        self._order()
        return self._coming.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


_drawing: Callable[[int], list[Batch]]  # in a process that draws


def _prepare_drawing(folder: Path, plan: Plan) -> None:
    global _drawing
    os.nice(5)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    config = load_model_config(folder)
    maker = ExampleMaker(
        folder,
        images=config.images,
        rows_per_tile=config.perceiver.num_latents,
        patch_size=config.vision.patch_size,
    )
    typefaces = training_typefaces()

    def draw(step: int) -> list[Batch]:
        return [
            draw_batch(
                step,
                part,
                seed=plan.seed,
                pictures=plan.pictures // PARTS,
                maker=maker,
                typefaces=typefaces,
                image_token_id=IMAGE_TOKEN_ID,
            )
            for part in range(PARTS)
        ]

    _drawing = draw


def _leave_with_parent() -> None:
    """A pool's process waits for work for ever when what gave it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _draw(step: int) -> list[Batch]:
    return _drawing(step)


class Vocabulary:
    """Among which tokens an answer's next one is sought: all that answers have, and some of the others."""

    def __init__(self, answers: Collection[int], size: int, seed: int) -> None:
        self._answers = torch.tensor(sorted(answers))
        self._size = size
        self._seed = seed

    def at(self, step: int, batch: Batch) -> Tensor:
        """Ascending token ids, the batch's answers among them."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        others = torch.randint(3, self._size, (NUM_NEGATIVES,), generator=generator)
        labels = torch.from_numpy(batch.labels)
        tokens: Tensor = torch.unique(torch.cat((self._answers, others, labels[labels != IGNORED])))
        return tokens


def train(folder: Path, plan: Plan, *, keep: Path, num_drawers: int = 1, keep_minutes: float = 5.0) -> None:
    """Train the checkpoint in `folder`, whose weights are replaced at the end, keeping a state to resume in `keep`.

    Raises ConfigError when what is kept there belongs to another plan.
    """
    config = load_model_config(folder)
    trainer = Trainer(config, plan, compiled=True)
    keep.mkdir(parents=True, exist_ok=True)
    _resume(trainer, keep)
    vocabulary = Vocabulary(answer_tokens(folder), config.text.vocab_size, plan.seed)
    drawers = Drawers(folder, plan, num_processes=num_drawers, first=trainer.step)
    kept = logged = time.monotonic()
    means: list[dict[str, float]] = []
    pictures = 0
    try:
        while trainer.step < plan.steps:
            batches = drawers.take()
            means.append(trainer.learn(batches, [vocabulary.at(trainer.step, batch) for batch in batches]))
            pictures += sum(len(batch.token_ids) for batch in batches)
            if trainer.step % LOG_STEPS == 0 or trainer.step == plan.steps:
                seconds, logged = time.monotonic() - logged, time.monotonic()
                shown = {key: round(sum(mean[key] for mean in means) / len(means), 4) for key in means[0]}
                line = {"step": trainer.step, **shown, "pictures_per_second": round(pictures / seconds, 1)}
                logger.info("%s", json.dumps(line))
                with (keep / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                means, pictures = [], 0
            if time.monotonic() - kept > 60 * keep_minutes:
                kept = time.monotonic()
                _keep(trainer, keep)
    finally:
        drawers.close()
        _keep(trainer, keep)
    export(trainer, folder)


def _keep(trainer: Trainer, folder: Path) -> None:
    """The state and its step appear together or not at all."""
    scratch = folder / "state.tmp"
    save_file(trainer.state(), scratch, metadata={"step": str(trainer.step), "seed": str(trainer.plan.seed)})
    scratch.replace(folder / "state.safetensors")


def _resume(trainer: Trainer, folder: Path) -> None:
    file = folder / "state.safetensors"
    if not file.exists():
        return
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
        if metadata["seed"] != str(trainer.plan.seed):
            raise ConfigError(f"{file}: was trained from seed {metadata['seed']}, not {trainer.plan.seed}")
        trainer.restore({name: stored.get_tensor(name) for name in stored.keys()}, int(metadata["step"]))  # noqa: SIM118
    logger.info("going on at step %d", trainer.step)


def export(trainer: Trainer, folder: Path) -> None:
    """Write the weights as they are now into the checkpoint `folder`, in bfloat16, under the published names."""
    weights = {}
    for name, target in weight_targets(load_model_config(folder)).items():
        weight = trainer.masters[f"model.{target.parameter}"]
        if target.shard is not None:
            module = trainer.pupil.model.get_submodule(target.parameter.rpartition(".")[0])
            weight = weight[cast("FusedLinear", module).shard_rows(target.shard)]
        weights[name] = weight.detach().reshape(target.shape).to(torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def answer_tokens(folder: Path) -> set[int]:
    """The tokens that answers are made of."""
    tokenizer = Tokenizer(folder)
    said = [*WORDS, *COLORS, *KINDS, "0123456789.", "yes no a total", NO_PICTURE]
    opening = len(tokenizer.encode("\nAssistant:", first=False))
    tokens = {tokenizer.special_tokens[END_OF_UTTERANCE]}
    for text in said:
        tokens.update(tokenizer.encode(f"\nAssistant: {text}", first=False)[opening:])
    return tokens
