"""What is watched while training, on the device, so that nothing waits for it: losses, norms, what is not finite."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.world import World


class Diverged(RuntimeError):
    """The loss is not a number or ran away. The message names step, tensor and the checkpoint that is good."""


class Window:
    """What happened since the last log line; the sums stay on the device."""

    def __init__(self, device: torch.device):
        self.nats = torch.zeros((), dtype=torch.float64, device=device)
        self.norm = torch.zeros((), device=device)
        self.finite = torch.zeros((), device=device)             # how many norms that is the sum of
        self.steps = self.tokens = 0

    def add(self, nats: Tensor, norm: Tensor, tokens: int) -> None:
        self.nats += nats
        finite = torch.isfinite(norm)              # fp16 overflows now and then, and skips the step
        self.norm += torch.where(finite, norm, 0.0)
        self.finite += finite
        self.steps += 1
        self.tokens += tokens

    def mean_norm(self) -> float:
        return (self.norm / self.finite.clamp(min=1)).item()

    def state(self) -> dict[str, Any]:
        return vars(self)

    @staticmethod
    def of(state: dict[str, Any], device: torch.device) -> Window:
        window = Window(device)
        vars(window).update({key: to_device(x, device) for key, x in state.items()})
        return window


def now(device: torch.device) -> float:
    """Seconds on the wall, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


PARTS = ("load", "forward", "backward", "optimizer")


@dataclass
class Timed:
    """What the stopwatch has seen since its last lap. Seconds of parts are by `clock`: with the host's, on a GPU, those
    of giving orders."""
    clock: Callable[[], float] = time.perf_counter
    steps: int = 0
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = self.clock()
        yield
        self.seconds[name] += self.clock() - begin


class Guard:
    """Remembers on the device the first step whose loss or gradient is not finite, and each tensor's norm there;
    asking it is a wait for the device, watching is not."""

    def __init__(self, tensors: int, device: torch.device):
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.loss = torch.zeros((), device=device)
        self.norms = torch.zeros(tensors, device=device)

    def watch(self, step: int, loss: Tensor, norm: Tensor | None, norms: Tensor) -> None:
        """`norm` None: an overflowing gradient is no fault (fp16's scaler skips such steps), only the loss counts."""
        bad = ~torch.isfinite(loss) if norm is None else ~(torch.isfinite(loss) & torch.isfinite(norm))
        first = bad & (self.step < 0)
        self.step = torch.where(first, step, self.step)
        self.loss = torch.where(first, loss, self.loss)
        self.norms = torch.where(first, norms, self.norms)

    def check(self, world: World, names: tuple[str, ...], good_checkpoint: Callable[[], str]) -> None:
        """Collective. Raises Diverged on every rank if any rank saw such a step."""
        step = int(self.step)
        bad, = world.sum(float(step >= 0))
        if not bad:
            return
        if step < 0:
            raise Diverged(f"Another rank's loss is not finite, see its log. {good_checkpoint()}")
        wrong = [name for name, norm in zip(names, self.norms.tolist()) if norm != norm or norm == float("inf")]
        tensors = f"the gradient of {wrong[0]} (and of {len(wrong) - 1} more tensors)" if wrong else "no gradient"
        raise Diverged(f"At step {step} the loss of rank {world.rank} was {self.loss.item():.4g}, and {tensors} was "
                       f"not finite. {good_checkpoint()} Start a new run (--name=NEW) with a lower learning rate "
                       f"(--set recipe.optim.lr=…), a longer warm-up or another precision; "
                       f"--checkpoint=RUN takes the weights of this one along.")


def to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(to_device(x, device) for x in value) if isinstance(value, (list, tuple)) else value
