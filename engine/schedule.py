"""The learning rate as a pure function of what has been done. Standard library only."""
from __future__ import annotations

import math
from collections.abc import Sequence

from engine.config import Schedule, Stop


def lr_at(schedule: Schedule, peak_lr: float, stop: Stop, *, step: int, tokens: int, tokens_after: int,
          valid_losses: Sequence[float] = ()) -> float:
    """The learning rate of the update to be made when `step` updates and `tokens` targets are done, over all ranks.

    `tokens_after` includes the targets of this update; `valid_losses` are all evaluations of the run so far, and
    only plateau reads them.

    Warm-up counts the update itself: (step + 1) / warmup_steps or tokens_after / warmup_tokens, at most 1. It
    multiplies a decay which counts what was done before: so the first update after the warm-up has the peak too,
    and none is spent at a learning rate of zero.

    cosine    from the peak where warm-up ends to eta_min at the horizon, and eta_min from there on. arXiv:1608.03983.
    inv_sqrt  sqrt(warmup / done) in the unit of the warm-up, which therefore ends at the peak; without a warm-up
              1 / sqrt(step). The ancestors leave sqrt(warmup) out: their lr is ours / sqrt(warmup). arXiv:1706.03762.
    constant  the peak.
    plateau   decay_rate for every `patience + 1` evaluations in a row that bring no better loss, down to eta_min.
    finder    evenly in the logarithm from peak / 1000 to 1, or to the peak if that is more, where training stops; no
              warm-up, as it is one. The ancestors' range; arXiv:1506.01186.
    """
    if schedule.name == "finder":
        done = max(_fraction(step, 0, stop.max_steps), _fraction(tokens, 0, stop.max_tokens))
        return peak_lr / 1000 * (max(1.0, peak_lr) / (peak_lr / 1000)) ** done
    lowest = schedule.lowest(peak_lr)
    warm = min(1.0, _over(step + 1, schedule.warmup_steps), _over(tokens_after, schedule.warmup_tokens))
    if schedule.name == "cosine":
        span = peak_lr - lowest
        return warm * (lowest + span * (1 + math.cos(math.pi * _progress(schedule, stop, step, tokens))) / 2)
    if schedule.name == "inv_sqrt":
        warmup, done = (schedule.warmup_tokens, tokens) if schedule.warmup_tokens else (schedule.warmup_steps, step)
        return warm * peak_lr * math.sqrt(max(1, warmup) / max(1, warmup, done))
    if schedule.name == "plateau":
        decayed = peak_lr * schedule.decay_rate ** _decays(valid_losses, schedule.patience)
        return warm * max(decayed, min(peak_lr, lowest))
    if schedule.name == "constant":
        return warm * peak_lr
    raise ValueError(f"no schedule is called {schedule.name!r}")


def _over(done: int, warmup: int) -> float:
    return done / warmup if warmup else 1.0


def _progress(schedule: Schedule, stop: Stop, step: int, tokens: int) -> float:
    """How far the decay is, from 0 where warm-up ends to 1 at the horizon.

    The horizon is the schedule's, else where training stops: of two ends, the one that is nearer. A warm-up in the
    other unit is converted at the average of tokens per step so far: exact at its end, so that there is no jump,
    and rising with step and tokens whatever the batches hold.
    """
    if schedule.horizon_steps is not None or schedule.horizon_tokens is not None:
        horizon_steps, horizon_tokens = schedule.horizon_steps, schedule.horizon_tokens
    else:
        horizon_steps, horizon_tokens = stop.max_steps, stop.max_tokens
    tokens_per_step = tokens / step if step and tokens else 1.0
    warmup_steps = schedule.warmup_steps or schedule.warmup_tokens / tokens_per_step
    warmup_tokens = schedule.warmup_tokens or schedule.warmup_steps * tokens_per_step
    return max(_fraction(step, warmup_steps, horizon_steps), _fraction(tokens, warmup_tokens, horizon_tokens))


def _fraction(done: int, start: float, end: int | None) -> float:
    if end is None:
        return 0.0
    if done >= end:
        return 1.0
    return (done - start) / (end - start) if done > start else 0.0


def _decays(losses: Sequence[float], patience: int) -> int:
    """How often `patience + 1` losses in a row were not below the best before them."""
    best, without, decays = math.inf, 0, 0
    for loss in losses:
        best, without = (loss, 0) if loss < best else (best, without + 1)
        if without > patience:
            decays, without = decays + 1, 0
    return decays
