"""Train the demo model from nothing, by the very modules that serve it: the loop, what it keeps, and what it gives."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from server.demo.canvas import COLORS
from server.demo.curriculum import Batch
from server.demo.drawers import Drawers, Shelf
from server.demo.lexicon import WORDS
from server.demo.pupil import Losses
from server.demo.scenes.talk import NO_PICTURE
from server.demo.shapes import KINDS
from server.demo.trainer import Plan, Trainer, fastest_dtype
from server.errors import ConfigError
from server.inputs.tokenizer import END_OF_UTTERANCE, Tokenizer
from server.model.config import load_model_config
from server.model.layers.linear import FusedLinear
from server.model.weight_map import weight_targets

logger = logging.getLogger(__name__)

NUM_NEGATIVES = 512  # tokens drawn anew each step, of those that no answer has: they too must learn to be unlikely
LOG_STEPS = 50
UNTYPICAL_STEPS = 50  # at the beginning, when drawers and devices start
PUNCTUALITY = 0.96  # of the steps that the time left seems to suffice for, those that are planned


class Vocabulary:
    """Among which tokens an answer's next one is sought: all that answers have, and some of the others.

    On a CPU the whole table costs more than the rest of the language model.
    """

    def __init__(self, answers: Collection[int], size: int, seed: int) -> None:
        self._answers = torch.tensor(sorted(answers))
        self._size = size
        self._seed = seed

    def at(self, step: int, batch: Batch) -> Tensor:
        """Ascending token ids, the batch's answers among them."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        others = torch.randint(3, self._size, (NUM_NEGATIVES,), generator=generator)
        tokens: Tensor = torch.unique(torch.cat((self._answers, others, batch.answers)))
        return tokens


def train(
    folder: Path,
    plan: Plan,
    *,
    keep: Path,
    device: Literal["cpu", "cuda"] = "cpu",
    num_drawers: int = 1,
    keep_minutes: float = 5.0,
    minutes: float = float("inf"),
) -> Plan:
    """Train the checkpoint in `folder`, whose weights are replaced at the end, keeping a state to resume in `keep`.

    After `minutes` it is over, with the decay begun in time. Returns the plan as it was carried out. Raises
    ConfigError when what is kept there belongs to another plan, or there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training on cuda: there is no such device")
    began = time.monotonic()
    config = load_model_config(folder)
    chosen = torch.device(device)
    trainer = Trainer(config, plan, word_tokens=word_tokens(folder), device=chosen, dtype=fastest_dtype(chosen))
    keep.mkdir(parents=True, exist_ok=True)
    _resume(trainer, keep)
    first = trainer.step
    vocabulary = Vocabulary(answer_tokens(folder), config.text.vocab_size, plan.seed)
    drawers = Drawers(folder, plan, num_processes=num_drawers, first=first)
    shelf = Shelf(drawers.take, plan, first=first, device=chosen)
    kept, diary = time.monotonic(), _Diary(keep / "log.jsonl")
    try:
        while trainer.step < trainer.plan.steps and time.monotonic() < began + 60 * minutes:
            asked = time.monotonic()
            batches = shelf.at(trainer.step)
            diary.waited += time.monotonic() - asked
            all_tokens = chosen.type == "cuda"
            seen = [None if all_tokens else vocabulary.at(trainer.step, batch) for batch in batches]
            losses = trainer.learn(batches, seen)
            now = time.monotonic()
            diary.note(trainer, losses, sum(len(batch.token_ids) for batch in batches))
            if trainer.plan is plan and trainer.step >= first + 2 * UNTYPICAL_STEPS:
                left = (began + 60 * minutes - now) / diary.seconds_a_step
                if PUNCTUALITY * left < plan.decay_steps:
                    trainer.plan = plan.ending_at(min(plan.steps, trainer.step + int(PUNCTUALITY * left)))
            if now - kept > 60 * keep_minutes:
                kept = now
                _keep(trainer, keep)
    finally:
        _keep(trainer, keep)  # first: drawers end what they have begun
        drawers.close()
    export(trainer, folder)
    return trainer.plan


class _Diary:
    """Mean losses and speed, a line every LOG_STEPS steps. `waited`: the seconds that drawing kept learning waiting."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._since = time.monotonic()
        self._losses: list[Losses] = []
        self._pictures = 0
        self.waited = 0.0
        self._steps = 0
        self._typical_since = self._since

    @property
    def seconds_a_step(self) -> float:
        """Over all steps but the first UNTYPICAL_STEPS."""
        return (time.monotonic() - self._typical_since) / max(self._steps - UNTYPICAL_STEPS, 1)

    def note(self, trainer: Trainer, losses: Losses, pictures: int) -> None:
        self._losses.append(losses)
        self._pictures += pictures
        self._steps += 1
        if self._steps == UNTYPICAL_STEPS:
            self._typical_since = time.monotonic()
        if trainer.step % LOG_STEPS and trainer.step != trainer.plan.steps:
            return
        means = torch.stack([torch.stack(tuple(losses)) for losses in self._losses]).mean(0).tolist()
        seconds = time.monotonic() - self._since
        shown = {name: round(value, 4) for name, value in zip(Losses._fields, means, strict=True)}
        speed = {"pictures_per_second": round(self._pictures / seconds, 1), "waited": round(self.waited / seconds, 3)}
        line = json.dumps({"step": trainer.step, "rate": round(trainer.plan.rate(trainer.step), 4), **shown, **speed})
        logger.info("%s", line)
        with self._path.open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        self._since, self._losses, self._pictures = time.monotonic(), [], 0
        self.waited = 0.0


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
        weights[name] = weight.detach().reshape(target.shape).to("cpu", torch.bfloat16).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")


def word_tokens(folder: Path) -> Tensor:
    """[words of the lexicon]: the token that each is, in the order of the lexicon."""
    tokenizer = Tokenizer(folder)
    return torch.tensor([tokenizer.encode(f"\nAssistant: {word}", first=False)[-1] for word in WORDS])


def answer_tokens(folder: Path) -> set[int]:
    """The tokens that answers are made of."""
    tokenizer = Tokenizer(folder)
    said = [*WORDS, *COLORS, *KINDS, "0123456789.", "yes no a total", NO_PICTURE]
    opening = len(tokenizer.encode("\nAssistant:", first=False))
    tokens = {tokenizer.special_tokens[END_OF_UTTERANCE]}
    for text in said:
        tokens.update(tokenizer.encode(f"\nAssistant: {text}", first=False)[opening:])
    return tokens
