"""How a split is read to be scored: three protocols. Perplexities of different protocols cannot be compared.

B streams, T targets of a segment, S tokens of a stream.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch

from engine.values import BadValue
from txl.batches import Segment, Streams, segment_of
from txl.config import Context

# exact: every token is a target once. original, nvidia: the split is cut into streams of equal length, whose first
# tokens are never targets, and the tail that is left over is dropped; original begins them without memory, nvidia with
# the end of the stream before (the first with that of the last).
# Sources: kimiyoung/transformer-xl pytorch/eval.py; NVIDIA/DeepLearningExamples, Transformer-XL, LMOrderedIterator.
Protocol = Literal["exact", "nvidia", "original"]
STREAMS: dict[Protocol, int] = {"nvidia": 16, "original": 10}              # theirs; exact takes the recipe's


def segments(protocol: Protocol, tokens: np.ndarray, start: int, count: int, mine: range, context: Context,
             cutoffs: tuple[int, ...] = ()) -> Iterator[tuple[Segment, bool]]:
    """The segments of the streams `mine` of `count`, in order, and whether their targets count.

    Raises BadValue where the split is too short for the protocol.
    """
    if protocol == "exact":
        streams = Streams(tokens, start, count)
        return ((streams.segment(mine, k, context, cutoffs), True)
                for k in range(streams.segments(context.tgt_len) if mine else 0))
    warm = warm_up(protocol, context)
    width = len(tokens) // count
    if width < max(2, warm):
        raise BadValue(f"{count} streams have {width} of the {len(tokens)} tokens each, but this protocol needs "
                       f"{max(2, warm)}. Give fewer --streams or a smaller --mem_len, or use --protocol=exact")
    return _cut(tokens[:width * count].reshape(count, width), warm, mine, context, cutoffs)


def context_for(protocol: Protocol, context: Context) -> Context:
    """The context in this model's terms: the original's same_length counts a token itself among its mem_len."""
    if protocol == "original" and context.same_length:
        return Context(context.tgt_len, max(context.mem_len - 1, 0), context.ext_len, context.clamp_len, True)
    return context


def warm_up(protocol: Protocol, context: Context) -> int:
    """How many tokens are read before those that count: mem_len in whole segments."""
    return -(-context.mem_len // context.tgt_len) * context.tgt_len if protocol == "nvidia" else 0


def described(protocol: Protocol, context: Context, count: int, max_segments: int | None = None) -> str:
    """How a number was measured, in words: without them perplexities cannot be compared."""
    warm = warm_up(protocol, context)
    words = {"exact": f"every token once, {count} streams from an empty memory",
             "nvidia": f"NVIDIA's protocol: {count} streams, each after the last {warm} tokens of the one before, "
                       f"their first tokens and the tail left out",
             "original": f"the original's protocol: {count} streams from an empty memory, their first tokens and the "
                         f"tail left out"}[protocol]
    lengths = [f"tgt_len {context.tgt_len}", f"mem_len {context.mem_len}"]
    lengths += [f"ext_len {context.ext_len}"] if context.ext_len else []
    lengths += [f"clamp_len {context.clamp_len}"] if context.clamp_len else []
    lengths += ["same_length"] if context.same_length else []
    return ", ".join([words, *lengths] + ([f"of each the first {max_segments} segments alone"] if max_segments else []))


def _cut(text_BS: np.ndarray, warm: int, mine: range, context: Context,
         cutoffs: tuple[int, ...]) -> Iterator[tuple[Segment, bool]]:
    before_BW = np.roll(text_BS, 1, axis=0)[:, text_BS.shape[1] - warm:]
    rows_BS = torch.from_numpy(np.concatenate([before_BW, text_BS], 1)[mine.start:mine.stop].astype(np.int64))
    last = rows_BS.size(1) - 1 if mine else 0
    for first in range(0, last, context.tgt_len):
        end = min(first + context.tgt_len, last)
        targets_BT = rows_BS[:, first + 1:end + 1]
        tokens_BQ = rows_BS[:, max(0, first - context.ext_len):end]
        yield segment_of(tokens_BQ, targets_BT, cutoffs), first >= warm
