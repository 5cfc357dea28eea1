"""Random weights to begin with."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

BLOCK = 1 << 20                                   # numbers that one generator draws


def draw(rules: Iterable[tuple[Tensor, Callable[..., object]]]) -> None:
    """Fills each tensor, which must be contiguous, by its rule: a method such as Tensor.normal_.

    Torch draws on one thread. Here a processor's tensors are filled by all of its threads, in blocks, each with a
    generator of its own that torch's seeds: the same numbers with any number of threads.
    """
    blocks = []
    for tensor, rule in rules:
        if tensor.is_cpu and tensor.untyped_storage().device.type == "cpu":         # a fake tensor's is "meta"
            blocks += [(block, rule) for block in tensor.detach().view(-1).split(BLOCK)]
        elif not tensor.is_meta:
            rule(tensor.detach())
    if not blocks:
        return
    first = int(torch.randint(2 ** 32, ()))

    def fill(i: int) -> None:
        block, rule = blocks[i]
        rule(block, generator=torch.Generator().manual_seed(first + i))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(fill, range(len(blocks))):
            pass
