"""One step of learning: the pupil's losses and gradients, and the optimizers.

The pupil's weights and activations have the trainer's type; the optimizers' copy of the weights is float32. Matrices
are trained by Muon, all else by Adam. Weights that are trained alike are one tensor, of which the pupil and the
optimizers see parts: by itself each of 250 small weights would cost a fast device more time to be asked for than to be
computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.demo.curriculum import Batch
from server.demo.pupil import Losses, PlainAttention, Pupil, initialize
from server.model.config import ModelConfig

LETTERS_WEIGHT = 0.5
MOMENTUM = 0.95  # of Muon
BETAS, EPSILON = (0.9, 0.98), 1e-8  # of Adam
ALIGNMENT = 64  # numbers: where each weight among others begins, for the sake of matrix kernels


@dataclass(frozen=True)
class Plan:
    """How long and how fast. Rates are of Muon and Adam; `pictures` is a step's, in tiles of 112 × 112 pixels, in as
    many `parts` of one size of tile each.

    The rate rises, stays, and falls to nothing in the last `decay_steps`, so that a run may be ended at any step.
    Each picture is learnt from `readings` times.
    """

    steps: int
    decay_steps: int
    seed: int = 0
    pictures: int = 64
    parts: int = 2
    readings: int = 1
    warm_up_steps: int = 200
    matrix_rate: float = 0.003
    other_rate: float = 1e-3
    weight_decay: float = 0.01
    max_norm: float = 1.0

    def rate(self, step: int) -> float:
        """The share of the full rate at a step."""
        left = (self.steps - step) / max(self.decay_steps, 1)
        return min(1.0, (step + 1) / self.warm_up_steps, max(left, 0.0))

    def ending_at(self, step: int) -> Plan:
        """The same plan with its decay moved so that it is over at `step`."""
        return dataclasses.replace(self, steps=step)


def usual_plan(device: Literal["cpu", "cuda"], *, seed: int = 0, steps: int | None = None) -> Plan:
    """As the bundled model was trained, on either device from about as many pictures.

    Small steps suit a CPU, whose cores each take a part. A GPU has more to do in a step of one part, and learns from
    pictures faster than a machine's cores draw them.
    """
    if device == "cuda":
        steps = steps or 8_000
        return Plan(steps=steps, decay_steps=steps * 2 // 5, seed=seed, pictures=1024, parts=1, readings=3)
    steps = steps or 128_000
    return Plan(steps=steps, decay_steps=steps * 2 // 5, seed=seed, pictures=64)


def fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it, else float32: emulated, it is many times as slow."""
    if device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32


class _Weights:
    """Weights that are trained alike: matrices of one shape, as a stack of them, or all others end to end.

    master: float32; student: the same in the pupil's type, whose parts are the pupil's parameters
    gradient: float32, or None where there is none in this step
    state: what the optimizer keeps beside it, of the same shape
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, dtype: torch.dtype, matrices: bool) -> None:
        self.matrices = matrices
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.master = self._joined([parameter.detach() for parameter in parameters.values()]).float()
        self.student = self.master.to(dtype)
        for parameter, part in zip(parameters.values(), self.parts(self.student).values(), strict=True):
            parameter.data = part
        self.gradient: Tensor | None = None
        self.state = {key: torch.zeros_like(self.master) for key in (("momentum",) if matrices else ("mean", "square"))}
        self.steps = 0

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        if self.matrices:
            return torch.stack(list(parts))
        return torch.cat([F.pad(part.flatten(), (0, -part.numel() % ALIGNMENT)) for part in parts])

    def parts(self, whole: Tensor) -> dict[str, Tensor]:
        """Views of a tensor of the group's shape, by the weights' names."""
        if self.matrices:
            return dict(zip(self.shapes, whole.unbind(), strict=True))
        parts, start = {}, 0
        for name, shape in self.shapes.items():
            parts[name] = whole[start : start + shape.numel()].view(shape)
            start += shape.numel() + -shape.numel() % ALIGNMENT
        return parts

    def take(self, gradients: Sequence[Mapping[str, Tensor | None]]) -> None:
        """Set the mean of these gradients; those of a batch that has some and not others are 0 where it has none."""
        self.gradient = None
        for found in gradients:
            if all(found[name] is None for name in self.shapes):
                continue
            mine = [
                torch.zeros(shape, dtype=self.student.dtype, device=self.master.device) if part is None else part
                for name, shape in self.shapes.items()
                for part in (found[name],)
            ]
            joined = self._joined(mine).float() / len(gradients)
            self.gradient = joined if self.gradient is None else self.gradient + joined

    def learn(self, rate: float, weight_decay: float) -> None:
        """One step of Muon or Adam."""
        if self.gradient is None:
            return
        self.steps += 1
        if self.matrices:
            momentum = self.state["momentum"].lerp_(self.gradient, 1 - MOMENTUM)
            update = orthogonal(self.gradient.lerp(momentum, MOMENTUM), dtype=self.student.dtype)
            rows, columns = self.master.shape[1:]
            # As large as one of Adam: https://arxiv.org/abs/2502.16982, section 2.2.
            self.master.mul_(1 - rate * weight_decay).add_(update, alpha=-rate * 0.2 * math.sqrt(max(rows, columns)))
        else:
            mean = self.state["mean"].lerp_(self.gradient, 1 - BETAS[0])
            square = self.state["square"].lerp_(self.gradient.square(), 1 - BETAS[1])
            root = (square / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPSILON)
            self.master.addcdiv_(mean, root, value=-rate / (1 - BETAS[0] ** self.steps))
        self.student.copy_(self.master)


def orthogonal(matrices: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Of each of [N, rows, columns] nearly the nearest orthogonal one, by five steps of Newton and Schulz.

    Coefficients and method: Keller Jordan, "Muon: an optimizer for hidden layers", 2024.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        product = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(product, product, product, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


class Trainer:
    """The pupil and how its weights change."""

    def __init__(
        self, config: ModelConfig, plan: Plan, *, word_tokens: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.plan = plan
        self.step = 0
        self.device = device
        self.pupil = Pupil(config, word_tokens)
        initialize(self.pupil, plan.seed)
        self.pupil.to(device)
        self.pupil.model.fill_buffers(device)
        self._threads: ThreadPoolExecutor | None = None
        if device.type == "cpu":
            # One core each. Threads within an operation would wait for one another at the end of each of thousands.
            torch.set_num_threads(1)
            self._threads = ThreadPoolExecutor(plan.parts)
        else:
            # It makes a plan for each new shape, and nearly every batch has one.
            torch.backends.cuda.enable_cudnn_sdp(False)
        grouped: dict[tuple[bool, tuple[int, ...]], dict[str, nn.Parameter]] = {}
        for name, parameter in self.pupil.named_parameters():
            shape = tuple(parameter.shape) if _is_matrix(name, parameter) else ()
            grouped.setdefault((name.startswith("model.text."), shape), {})[name] = parameter
        self.weights = [
            _Weights(parameters, dtype=dtype, matrices=bool(shape)) for (_, shape), parameters in grouped.items()
        ]

    @property
    def masters(self) -> dict[str, Tensor]:
        """The float32 weights by name."""
        return {name: part for weights in self.weights for name, part in weights.parts(weights.master).items()}

    @torch.no_grad()
    def learn(self, batches: Sequence[Batch], vocabularies: Sequence[Tensor | None]) -> Losses:
        """One step of all optimizers over these batches, which are on the device. Returns mean losses, there too."""
        studies = map if self._threads is None else self._threads.map
        found = list(studies(self._study, batches, vocabularies))
        for weights in self.weights:
            weights.take([gradients for gradients, _ in found])
        self._clip()
        share = self.plan.rate(self.step)
        for weights in self.weights:
            rate = self.plan.matrix_rate if weights.matrices else self.plan.other_rate
            weights.learn(share * rate, self.plan.weight_decay)
        self.step += 1
        return Losses(*(torch.stack(seen).mean() for seen in zip(*(losses for _, losses in found), strict=True)))

    def _study(self, batch: Batch, vocabulary: Tensor | None) -> tuple[dict[str, Tensor | None], Losses]:
        with torch.enable_grad():
            if self.device.type == "cpu":
                with PlainAttention():
                    losses = self.pupil(batch, vocabulary)
            else:
                losses = self.pupil(batch, vocabulary)
            letters = losses.patches + losses.cells + losses.words + losses.marks
            names, parameters = zip(*self.pupil.named_parameters(), strict=True)
            gradients = torch.autograd.grad(losses.answers + LETTERS_WEIGHT * letters, parameters, allow_unused=True)
        return dict(zip(names, gradients, strict=True)), Losses(*(value.detach() for value in losses))

    def _clip(self) -> None:
        gradients = [weights.gradient for weights in self.weights if weights.gradient is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        factor = (self.plan.max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor)

    def state(self) -> dict[str, Tensor]:
        """Everything that a run goes on from, as named tensors."""
        state: dict[str, Tensor] = {}
        for weights in self.weights:
            steps = torch.tensor(weights.steps)
            for key, whole in ({"weight": weights.master} | weights.state).items():
                state |= {f"{key}/{name}": part.contiguous() for name, part in weights.parts(whole).items()}
            state |= {f"steps/{name}": steps.clone() for name in weights.shapes}
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go on from what `state` gave at this step; where that is weights alone, the optimizers begin anew."""
        self.step = step
        for weights in self.weights:
            for key, whole in ({"weight": weights.master} | weights.state).items():
                for name, part in weights.parts(whole).items():
                    if key == "weight" or f"{key}/{name}" in state:
                        part.copy_(state[f"{key}/{name}"])
            weights.steps = int(state.get(f"steps/{next(iter(weights.shapes))}", 0))
            weights.student.copy_(weights.master)


def _is_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon trains it: not tables, and not what stands at the ends."""
    ends = ("embedding.weight", "position.weight", "latents", "patches.projection.weight", "_head.weight")
    return weight.ndim == 2 and not name.endswith(ends)
