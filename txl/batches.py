"""Ordered batches: a text cut into streams that go on from segment to segment, every token a target exactly once.

B streams, T targets of a segment, E tokens re-read in front of them (extended context).
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from txl.adaptive import IGNORE, cluster_rows
from txl.config import Context


@dataclass(frozen=True)
class Segment:
    """One step's piece of some streams. Padding targets are IGNORE; they only occur at a stream's very end."""
    tokens_BQ: Tensor                             # Q = E + T; E is 0 where a stream begins
    targets_BT: Tensor
    rows: tuple[Tensor, ...]                      # adaptive.cluster_rows of the targets

    def to(self, device: torch.device) -> Segment:
        if device.type == "cpu":
            return self
        tokens_BQ, targets_BT, *rows = (x.pin_memory().to(device, non_blocking=True)
                                        for x in (self.tokens_BQ, self.targets_BT, *self.rows))
        return Segment(tokens_BQ, targets_BT, tuple(rows))


class Streams:
    """`tokens` [V] as `count` contiguous streams that partition its targets; lengths differ by at most one.

    Target i is predicted from what precedes it in the text, also at the first token of a stream; what precedes the
    first token of all is `start`. So V targets, whatever the number of streams.
    """

    def __init__(self, tokens: np.ndarray, start: int, count: int):
        self.tokens, self.start, self.count = tokens, start, count
        edges = np.arange(count + 1, dtype=np.int64) * len(tokens) // count
        self.begins, self.lengths = edges[:-1], np.diff(edges)

    def segments(self, tgt_len: int) -> int:
        """How many segments of tgt_len the longest stream has; the last may be shorter."""
        return -(-int(self.lengths.max(initial=0)) // tgt_len)

    def targets(self, k: int, tgt_len: int) -> int:
        """Targets of segment k over all streams: every rank knows the global count without asking the others."""
        return int(np.clip(self.lengths - k * tgt_len, 0, tgt_len).sum())

    def segment(self, streams: range, k: int, context: Context, cutoffs: tuple[int, ...] = ()) -> Segment:
        """Segment k of these streams. Its shape depends on k alone, not on the streams."""
        first = k * context.tgt_len
        width = min(context.tgt_len, int(self.lengths.max()) - first)
        again = min(context.ext_len, first)
        begins_B1, lengths_B1 = (x[streams.start:streams.stop, None] for x in (self.begins, self.lengths))

        position_T = np.arange(first, first + width)
        real_BT = position_T < lengths_B1
        targets_BT = torch.from_numpy(np.where(real_BT, self._at(begins_B1 + position_T), IGNORE))
        tokens_BQ = torch.from_numpy(self._at(begins_B1 + np.arange(first - again, first + width) - 1))
        return Segment(tokens_BQ, targets_BT, cluster_rows(targets_BT, cutoffs))

    def _at(self, index: np.ndarray) -> np.ndarray:
        tokens = self.tokens[np.clip(index, 0, len(self.tokens) - 1)].astype(np.int64)
        return np.where(index < 0, self.start, tokens)
