"""What a run on several ranks should reach, by what its first moments show, and whether it does.

A step is tried on a copy of the model, alone, and gradients' way by an all-reduce; engine/scaling.py makes of both what
a step of all ranks takes. The run itself goes on as if nothing had been.
"""
from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.metrics import brief
from engine.scaling import Assumptions, Exchange, Links, StepTime, step_time, warning
from engine.step import Learner
from engine.task import Position
from engine.tied import Tied, late_rows, travelling_early
from engine.watch import Timed, now
from engine.world import World

BUDGET_S = 0.5                                    # for the tries, and for the all-reduces
LONG_ENOUGH_S = 5.0                               # of steps, to call them slow
BUCKET = 25 << 20                                 # bytes in float32, DDP's


@dataclass(frozen=True)
class Expected:
    """Of a step of all ranks, in the order of the sentence."""
    step: StepTime
    tokens: int
    ranks: int
    sent: float                                   # bytes, of gradients
    busbw: float                                  # bytes/s, as nccl-tests count it

    def __str__(self) -> str:
        step = self.step
        return (f"expected {brief(self.tokens / step.total_s)} tok/s, efficiency {step.compute_s / step.total_s:.0%} "
                f"on {self.ranks} ranks (a step alone {1000 * step.compute_s:.4g} ms; {self.sent / 1e6:.4g} MB of "
                f"gradients at {self.busbw / 1e9:.3g} GB/s, {1000 * step.exposed_s:.3g} ms of it not hidden; "
                f"{1000 * step.stragglers_s:.2g} ms for the slowest rank)")


@dataclass
class Comparison:
    """Of the steps that a run takes with what was expected of them; None: nothing was."""
    expected: Expected | None
    steps: int = 0
    seconds: float = 0.0

    def add(self, steps: int, seconds: float) -> str | None:
        """What is to be said: once there are enough of them, if they are slow."""
        self.steps, self.seconds = self.steps + steps, self.seconds + seconds
        if self.expected is None or self.seconds < LONG_ENOUGH_S:
            return None
        expected_s, self.expected = self.expected.step.total_s, None
        return warning(expected_s, self.seconds / self.steps)


def expect(learner: Learner, start: Position) -> Expected | None:
    """Of a learner that is not distributed yet. Collective. None with one rank, and where a step cannot be tried in
    time or memory."""
    world, recipe = learner.world, learner.recipe
    if world.size == 1:
        return None
    tried = _tried(learner, start)
    if not all(world.gather(tried is not None)) or tried is None:
        return None
    step_s = statistics.median(world.gather(tried.step_s))      # of the slowest, spread tells
    micro_batches = len(recipe.batch.micro_batches(world.rank, world.size))
    exchange = exchanged(tried.ready, travelling_early(learner.model), max(world.gather(tried.in_tails)), world.size,
                         share=1.0 if recipe.wire == "fp32" else 0.5,
                         split=micro_batches if recipe.clock.split_tails else 0)
    sent = exchange.early + exchange.late + exchange.late_rows + exchange.early_rows + exchange.late_swapped
    busbw = bus_bandwidth(world, round(min(BUCKET, sent)))
    step = step_time(step_s, exchange, Links(1, float("inf"), busbw), machines=world.size, micro_batches=micro_batches,
                     assumed=Assumptions(hop_s=0.0))
    return Expected(step, tried.tokens, world.size, sent, busbw)


def exchanged(ready: Sequence[int], tables: Sequence[Tied], in_tails: int, ranks: int, share: float = 1.0,
              split: int = 0) -> Exchange:
    """Of a step. `ready`: bytes of DDP's gradients, in the order they are. `in_tails`: rows read of each of the tables,
    which have their own way, in a micro-batch. `share`: of the bytes, what travels. `split`: in so many micro-batches,
    of tables whose tails are; as many targets are taken to be in them as tokens."""
    early, late = early_and_late(ready)
    rows = tails = 0
    for table in tables:
        V, D = table[0].shape
        reduced, gathered = (table.head, 0) if split else late_rows(table.head, V, in_tails, ranks)
        early, late = early + 4 * (table.head if split else V) * D, late + 4 * reduced * D
        rows += 4 * gathered * D
        tails += 2 * 4 * in_tails * D * split      # there and back
    return Exchange(share * early, share * late, late_rows=share * rows, early_rows=share * tails,
                    late_swapped=share * tails)


def early_and_late(ready: Sequence[int]) -> tuple[int, int]:
    """Bytes of gradients that DDP sends during backward and at its end. `ready`: of each, in the order they are."""
    early = late = 0
    for size in ready:
        if late >= BUCKET:                         # a bucket that is full is on its way when another gradient comes
            early, late = early + late, 0
        late += size
    return early, late


def bus_bandwidth(world: World, size: int) -> float:
    """Bytes/s of an all-reduce of `size` bytes or, where that takes too long, of fewer. Collective."""
    small = min(size, 1 << 20)
    seconds = all_reduce_s(world, small, rounds=1)
    if small < size and seconds * size / small < BUDGET_S / 4:
        small, seconds = size, all_reduce_s(world, size, rounds=3)
    return 2 * (world.size - 1) / world.size * small / seconds


def all_reduce_s(world: World, size: int, rounds: int, dtype: torch.dtype = torch.float32) -> float:
    """Seconds in which so many bytes are all-reduced, in buckets of DDP's size all at once: the median, where the ranks
    take the longest. Collective."""
    data, times = torch.zeros(max(1, size // dtype.itemsize), dtype=dtype, device=world.device), list[float]()
    for _ in range(rounds + 1):                    # the first warms up
        world.barrier()
        begin = now(world.device)
        for pending in [dist.all_reduce(piece, async_op=True) for piece in data.split(BUCKET // 4)]:
            pending.wait()
        times.append(now(world.device) - begin)
    return max(world.gather(statistics.median(times[1:])))


@dataclass(frozen=True)
class _Tried:
    step_s: float
    tokens: int                                   # of a step, over all ranks
    ready: list[int]                              # bytes of each gradient of DDP's, in the order they are ready
    in_tails: int                                 # tokens of the last micro-batch that this rank read of tables' tails


def _tried(learner: Learner, start: Position) -> _Tried | None:
    """Nothing of it remains but time and, on a GPU, what kernels had to be loaded or compiled anyway."""
    device = learner.world.device
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        try:
            return _try(Learner(learner.world, learner.task, learner.recipe, _copy(learner.model)), start)
        except torch.OutOfMemoryError:             # the copy was too much
            return None
        finally:
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


def _copy(model: nn.Module) -> nn.Module:
    copied = copy.deepcopy(model)
    for module, original in zip(copied.modules(), model.modules()):
        if original._compiled_call_impl is not None:             # Module.compile's, which no copy has
            module.compile()
    return copied


def _try(learner: Learner, start: Position) -> _Tried | None:
    device, steps = learner.world.device, learner.task.steps(learner.world, start)
    ready: dict[int, int] = {}                     # in the order of the last micro-batch. No parameters: their hooks
                                                   # would be a circle, and all of the copy stay until it is found
    def note(parameter: Tensor) -> None:
        ready.pop(id(parameter), None)
        ready[id(parameter)] = parameter.numel() * parameter.element_size()
    tables = travelling_early(learner.model)
    for parameter in learner.parameters:
        if any(parameter is table[0] for table in tables):
            continue
        parameter.register_post_accumulate_grad_hook(note)
    times = list[float]()
    while len(times) < 2 or (len(times) < 5 and sum(times[1:]) < BUDGET_S):
        step = next(steps)
        begin = now(device)
        learner.take(step, learner.peak_lr, Timed())
        times.append(now(device) - begin)
        if device.type == "cpu" and times[0] > 2 * BUDGET_S:
            return None                            # a GPU's first step is slow for other reasons, and not in vain
    return _Tried(statistics.median(times[1:]), step.tokens, list(ready.values()),
                  max((table.in_tails for table in tables), default=0))
