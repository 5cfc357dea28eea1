"""Gradients between ranks in 16 bits: hooks for DistributedDataParallel, which by itself sends float32; gathering."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import Wire

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor      # torch 2.11's name
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "bf16_feedback": torch.bfloat16}


def hook(wire: Wire) -> Callable[[Any, Any], torch.futures.Future[Tensor]]:
    """For register_comm_hook: the mean over ranks of each rank's rounded gradients, all summed in 16 bits.

    The model is to be gone before the process group: as the last of the two is destroyed, Python waits with its lock
    held for gloo's threads, and these for the lock, to let go of a callback.
    """
    remainder = Remainder() if wire == "bf16_feedback" else None

    def exchange(_state, bucket):                  # DDP compares annotations with its own, and not as words
        share = bucket.buffer().div_(dist.get_world_size())      # first: a sum of means does not overflow, and of three
        if remainder is not None:                                # ranks a third would be rounded twice
            share += remainder.of(bucket)
        sent = rounded(share, wire)
        if remainder is not None:
            torch.sub(share, sent, out=remainder.of(bucket))
        return dist.all_reduce(sent, async_op=True).get_future().then(lambda total: share.copy_(total.value()[0]))
    return exchange


def rounded(share: Tensor, wire: Wire) -> Tensor:
    """What travels of it; with fp32 that itself, no copy."""
    return share.to(TYPES.get(wire, share.dtype))


def gathering(mine: Tensor) -> tuple[Tensor, dist.Work]:
    """[ranks * M, ...] of [M, ...], once what comes with it is waited for."""
    whole = mine.new_empty(dist.get_world_size() * len(mine), *mine.shape[1:])
    return whole, _all_gather(whole, mine, async_op=True)


class Remainder:
    """Of each gradient what rounding has taken from what this rank sent so far, in float32 (arXiv:1901.09847).

    It is given with the next step's gradient. What the sums between ranks round no rank knows, so that stays lost.
    Not in checkpoints: every rank has its own, as large as the model; a start begins with none.
    """

    def __init__(self) -> None:
        self.buckets: dict[int, tuple[list[int], Tensor]] = {}

    def of(self, bucket: dist.GradBucket) -> Tensor:
        """As the bucket's buffer lies. DDP lays them out anew after a start's first step: what that lost is dropped."""
        layout = [id(parameter) for parameter in bucket.parameters()]
        known, lost = self.buckets.get(bucket.index(), (None, None))
        if known != layout or lost is None:
            lost = torch.zeros_like(bucket.buffer())
            self.buckets = {i: x for i, x in self.buckets.items() if i < bucket.index()}     # they come in order
            self.buckets[bucket.index()] = layout, lost
        return lost
