"""What streams remember from segment to segment.

L layers, B batch, M memory positions, D model width, N heads, H head width, P distances
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# In training: hidden_LBMD, the input of each layer at the M positions before the segment, and how many of them (the
# last ones) are real. M never changes, so a run has one shape from its first step on; a fresh memory has 0. A plain
# tuple, so that a checkpoint of it loads without trusting a class. Where rows differ in how many, [B, 1, 1, 1].
Hidden = tuple[Tensor, int | Tensor]


class Fixed(NamedTuple):
    """What an attention makes of its weights and of distances: the bias of its products for q, k and v, which is u for
    the queries, [3·N·H]; and r [N, H, P] and c [N, 1, P], of which (q + u)·r + c is what positions add to the scores,
    already over √H, and -inf where a distance is too far to be seen. Distances end with 0: fewer are the last ones."""
    qkv_bias: Tensor
    r_NHP: Tensor
    c_N1P: Tensor


@dataclass(frozen=True)
class Kept:
    """While weights and context stay as they are, all of it that need not be made anew with each segment: keys and
    values rather than what they are made of. `TransformerXL.reading` begins one."""
    kv: tuple[Tensor, ...]                        # of each layer, [B, M, 2, N, H]
    length: int | Tensor                          # as above
    fixed: tuple[Fixed, ...] = ()                 # of each layer


Memory = Hidden | Kept


def joined(memories: Sequence[Memory]) -> Memory:
    """Of one stream each, of a model's in one context: one memory of all of them."""
    lengths = [x.length if isinstance(x, Kept) else x[1] for x in memories]
    device = _states(memories[0])[0].device
    length = torch.tensor(lengths, device=device).view(-1, 1, 1, 1) if len(set(lengths)) > 1 else lengths[0]
    states = tuple(torch.cat(x) for x in zip(*map(_states, memories)))
    if isinstance(memories[0], Kept):
        widest = max((x.fixed for x in memories if isinstance(x, Kept)), key=lambda fixed: fixed[0].r_NHP.size(2))
        return Kept(states, length, widest)
    return torch.stack(states), length


def of_rows(memory: Memory, rows: list[int]) -> Memory:
    """Of these of its streams, in this order."""
    if isinstance(memory, Kept):
        length = memory.length
        return replace(memory, kv=tuple(x[rows] for x in memory.kv),
                       length=length[rows] if isinstance(length, Tensor) else length)
    hidden_LBMD, length = memory
    return hidden_LBMD[:, rows], length[rows] if isinstance(length, Tensor) else length


def _states(memory: Memory) -> tuple[Tensor, ...]:
    """Of each layer, [B, M, …]."""
    return memory.kv if isinstance(memory, Kept) else memory[0].unbind()
