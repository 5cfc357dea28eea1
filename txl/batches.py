"""Ordered batches: a text cut into streams that go on from segment to segment, every token a target exactly once.

B streams, T targets of a segment, E tokens re-read in front of them (extended context).
"""
from __future__ import annotations

import copy
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
        self.shifts = np.zeros_like(self.begins)  # where in its text each stream begins; it ends before that
        self._borders: np.ndarray | None = None   # of segments, where they are not all of one length

    def of_epoch(self, seed: int, epoch: int, *, roll: bool, varlen: int | None) -> Streams:
        """These streams in one epoch's own order, the same for all who have the seed.

        With `roll` (NVIDIA's) each begins at a random place and at its end goes on from its beginning. With `varlen`, a
        tgt_len (the original's), segments are of random lengths: for one in twenty half of that, for the others that,
        normal around it with a deviation of 5, between 5 and tgt_len + 15.
        """
        generator, own = np.random.default_rng((seed, epoch)), copy.copy(self)
        if roll:
            own.shifts = generator.integers(0, np.maximum(self.lengths, 1))
        if varlen is not None:
            longest = int(self.lengths.max(initial=0))
            around = np.where(generator.random(longest // 5 + 1) < .95, varlen, varlen / 2)      # surely enough
            widths = np.clip(generator.normal(around, 5).astype(np.int64), 5, varlen + 15)
            ends = widths.cumsum()
            own._borders = np.array([0, *ends[ends < longest], longest])
        return own

    def segments(self, tgt_len: int) -> int:
        """How many segments of tgt_len the longest stream has; the last may be shorter."""
        if self._borders is not None:
            return len(self._borders) - 1
        return -(-int(self.lengths.max(initial=0)) // tgt_len)

    def targets(self, k: int, tgt_len: int) -> int:
        """Targets of segment k over all streams: every rank knows the global count without asking the others."""
        first, last = self._span(k, tgt_len)
        return int(np.clip(self.lengths - first, 0, last - first).sum())

    def segment(self, streams: range, k: int, context: Context, cutoffs: tuple[int, ...] = ()) -> Segment:
        """Segment k of these streams. Its shape depends on k alone, not on the streams."""
        first, last = self._span(k, context.tgt_len)
        again = min(context.ext_len, first)
        begins_B1, lengths_B1, shifts_B1 = (x[streams.start:streams.stop, None]
                                            for x in (self.begins, self.lengths, self.shifts))

        position_Q = np.arange(first - again, last)
        # A stream shorter than the longest has padding behind it, which is of no text.
        index_BQ = begins_B1 + np.where(position_Q < lengths_B1, (position_Q + shifts_B1) % np.maximum(lengths_B1, 1),
                                        position_Q)
        targets_BT = torch.from_numpy(np.where(position_Q < lengths_B1, self._at(index_BQ), IGNORE)[:, again:].copy())
        tokens_BQ = torch.from_numpy(self._at(index_BQ - 1))
        return Segment(tokens_BQ, targets_BT, cluster_rows(targets_BT, cutoffs))

    def _span(self, k: int, tgt_len: int) -> tuple[int, int]:
        """The positions of segment k in the longest stream."""
        if self._borders is not None:
            return int(self._borders[k]), int(self._borders[k + 1])
        return k * tgt_len, min((k + 1) * tgt_len, int(self.lengths.max()))

    def _at(self, index: np.ndarray) -> np.ndarray:
        tokens = self.tokens[np.clip(index, 0, len(self.tokens) - 1)].astype(np.int64)
        return np.where(index < 0, self.start, tokens)
