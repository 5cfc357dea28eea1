"""Batches: a text cut into streams that go on from segment to segment, every token a target exactly once.

B streams, T targets of a segment, E tokens re-read in front of them (extended context).
"""
from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from engine.split import Reads, Shards
from txl.adaptive import IGNORE, cluster_rows
from txl.config import Context


@dataclass(frozen=True)
class Segment:
    """One step's piece of some streams. Padding targets are IGNORE; they only occur at a stream's very end."""
    tokens_BQ: Tensor                             # Q = E + T; E is 0 where a stream begins
    targets_BT: Tensor
    rows: tuple[Tensor, ...]                      # adaptive.cluster_rows of the targets
    in_tails: int                                 # of the tokens
    reads: Reads | None = None                    # these, where tails are split over ranks

    def to(self, device: torch.device) -> Segment:
        if device.type == "cpu":
            return self
        tokens_BQ, targets_BT, *rows = (x.pin_memory().to(device, non_blocking=True)
                                        for x in (self.tokens_BQ, self.targets_BT, *self.rows))
        return Segment(tokens_BQ, targets_BT, tuple(rows), self.in_tails, self.reads and self.reads.to(device))

    def shared(self, shards: Shards) -> Segment:
        """On the host."""
        return replace(self, reads=Reads(shards, self.tokens_BQ, [len(rows_C) for rows_C in self.rows]))


def segment_of(tokens_BQ: Tensor, targets_BT: Tensor, cutoffs: tuple[int, ...]) -> Segment:
    """On the host, which is not to ask a device later."""
    in_tails = int((tokens_BQ >= cutoffs[0]).sum()) if cutoffs else 0
    return Segment(tokens_BQ, targets_BT, cluster_rows(targets_BT, cutoffs), in_tails)


class Sentences:
    """Where the sentences of a text end: after each `end`, and with the text. 4 bytes a sentence, of a text of less
    than 4 G tokens; the tokens stay where they are."""

    def __init__(self, tokens: np.ndarray, end: int):
        kind = np.uint32 if len(tokens) < 1 << 32 else np.int64
        block = 1 << 24
        after = [(np.flatnonzero(tokens[first:first + block] == end) + (first + 1)).astype(kind)
                 for first in range(0, len(tokens), block)]
        if len(tokens) and tokens[-1] != end:
            after.append(np.array([len(tokens)], kind))
        self.tokens, self.ends = tokens, np.concatenate(after)

    def shuffled(self, generator: np.random.Generator) -> Shuffled:
        order = np.arange(len(self.ends), dtype=np.uint32)
        generator.shuffle(order)
        return Shuffled(self, order)


class Shuffled:
    """The text of which sentence order[i] is the i-th; indexed like the array of its tokens, which is never made."""

    def __init__(self, sentences: Sentences, order: np.ndarray):
        self._tokens, self._order, self._ends = sentences.tokens, order, sentences.ends
        self._new_ends = np.diff(sentences.ends, prepend=sentences.ends.dtype.type(0))[order].cumsum(
            dtype=sentences.ends.dtype)

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        # in the type of the ends: of another, all of them would be converted at every call
        at = np.searchsorted(self._new_ends, index.astype(self._new_ends.dtype), side="right")
        to_end = self._new_ends[at].astype(np.int64) - index
        return self._tokens[self._ends[self._order[at]].astype(np.int64) - to_end]


class Streams:
    """`tokens` [V] as `count` contiguous streams that partition its targets; lengths differ by at most one.

    Target i is predicted from what precedes it in the text, also at the first token of a stream; what precedes the
    first token of all is `start`. So V targets, whatever the number of streams.
    """

    def __init__(self, tokens: np.ndarray, start: int, count: int):
        self.tokens: np.ndarray | Shuffled = tokens
        self.start, self.count = start, count
        edges = np.arange(count + 1, dtype=np.int64) * len(tokens) // count
        self.begins, self.lengths = edges[:-1], np.diff(edges)
        self.shifts = np.zeros_like(self.begins)  # where in its text each stream begins; it ends before that
        self._borders: np.ndarray | None = None   # of segments, where they are not all of one length

    def of_epoch(self, seed: int, epoch: int, *, roll: bool, varlen: int | None,
                 sentences: Sentences | None = None) -> Streams:
        """These streams in one epoch's own order, the same for all who have the seed.

        With `roll` (NVIDIA's) each begins at a random place and at its end goes on from its beginning. With `varlen`, a
        tgt_len (the original's), segments are of random lengths: for one in twenty half of that, for the others that,
        normal around it with a deviation of 5, between 5 and tgt_len + 15. With `sentences`, which are the text's, all
        of them are shuffled and follow one another in the streams (the original's for lm1b).
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
        if sentences is not None:
            own.tokens = sentences.shuffled(generator)
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

    def segment(self, streams: range, k: int, context: Context, cutoffs: tuple[int, ...] = (), *,
                whole: bool = False) -> Segment:
        """Segment k of these streams. Its shape depends on k alone, not on the streams; if it is to be `whole`, not on
        that: behind the end of a text nothing is to be predicted, and nothing is seen of it before."""
        first, last = self._span(k, context.tgt_len)
        if whole and self._borders is None:
            last = first + context.tgt_len
        again = min(context.ext_len, first)
        begins_B1, lengths_B1, shifts_B1 = (x[streams.start:streams.stop, None]
                                            for x in (self.begins, self.lengths, self.shifts))

        position_Q = np.arange(first - again, last)
        # A stream shorter than the longest has padding behind it, which is of no text.
        index_BQ = begins_B1 + np.where(position_Q < lengths_B1, (position_Q + shifts_B1) % np.maximum(lengths_B1, 1),
                                        position_Q)
        targets_BT = torch.from_numpy(np.where(position_Q < lengths_B1, self._at(index_BQ), IGNORE)[:, again:].copy())
        tokens_BQ = torch.from_numpy(self._at(index_BQ - 1))
        return segment_of(tokens_BQ, targets_BT, cutoffs)

    def _span(self, k: int, tgt_len: int) -> tuple[int, int]:
        """The positions of segment k in the longest stream."""
        if self._borders is not None:
            return int(self._borders[k]), int(self._borders[k + 1])
        return k * tgt_len, min((k + 1) * tgt_len, int(self.lengths.max()))

    def _at(self, index: np.ndarray) -> np.ndarray:
        tokens = self.tokens[np.clip(index, 0, len(self.tokens) - 1)].astype(np.int64)
        return np.where(index < 0, self.start, tokens)
