"""The words of a text as numbers, at ten times the speed of one look-up in a dict a word. numpy and no more.

A word of up to 15 bytes is two 64-bit numbers, its bytes and its length, so that no two words are the same two. Numpy
finds them all at once in a table in which every pair of numbers has one place; what is not there, because it is new,
long, or another word was first in its place, is looked up in a dict.
"""
from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

BLOCK = 1 << 19                                   # bytes: what one step makes of them stays in the processor's cache
PLACES = 1 << 20                                  # for some 10^5 words: 32 MB
# None; that the text is not UTF-8; or what an OSError is made of
Problem = Literal["not UTF-8"] | tuple[int, str, str | None] | None
NARROW = b"\t\v\f\x1c\x1d\x1e\x1f"                 # ASCII's white space, but for newlines and the space
PLAIN = bytes.maketrans(NARROW, b" " * 7)


@dataclass(frozen=True)
class Range:
    """Bytes of a text, from its beginning or behind a space or newline, to its end or behind another one.

    Read, it is three files: its words, in the order in which it first has them, how often it has each, and all of it as
    numbers in that order.
    """
    path: Path
    start: int
    stop: int
    stem: str                                     # of the files

    @property
    def words_file(self) -> Path:
        """Written last: where it is, the range has been read."""
        return Path(f"{self.stem}.words")

    @property
    def ids_file(self) -> Path:
        return Path(f"{self.stem}.ids")

    @property
    def counts_file(self) -> Path:
        return Path(f"{self.stem}.counts")

    @property
    def table_file(self) -> Path:
        """For ids of the words by their numbers, int32, by whoever knows them."""
        return Path(f"{self.stem}.table")

    def words(self) -> list[str]:
        """By their numbers; 0 is the end of a line."""
        return ["\n", *self.words_file.read_bytes().decode().split("\n")[2:]]

    def ids(self, count: int) -> Iterator[np.ndarray]:
        """The numbers of all words, so many at a time."""
        with open(self.ids_file, "rb") as f:
            while len(ids := np.fromfile(f, np.int32, count)):
                yield ids

    def counts(self) -> np.ndarray:
        """How often it has each word."""
        return np.fromfile(self.counts_file, np.int64)


def read(part: Range, lower_case: bool) -> None:
    """Writes the files. Words are what str.split makes of the text, newlines what open does.

    Raises UnicodeDecodeError and OSError.
    """
    np.empty(30 << 20, np.uint8)      # freed at once; glibc's malloc then keeps twice as much: a fourth of the time
    words = _Words()
    with open(part.path, "rb") as text, open(part.ids_file, "wb") as out:
        start = part.start
        for stop in edges(text, start, part.stop, BLOCK):
            text.seek(start)
            out.write(words.numbers(_plain(text.read(stop - start), lower_case)).tobytes())
            start = stop
    counts = (np.bincount(ids, minlength=len(words.seen)) for ids in part.ids(1 << 21))
    sum(counts, np.zeros(len(words.seen), np.int64)).tofile(part.counts_file)
    part.words_file.write_bytes(b"\n".join(words.seen))


def edges(text: BinaryIO, start: int, stop: int, step: int) -> Iterator[int]:
    """Where to cut a text between start and stop, which is the last: behind spaces or newlines, at least `step` apart.

    No character of several bytes has one of these, and neither \\r\\n nor a word is cut.
    """
    while start + step < stop:
        start += step
        text.seek(start)
        while block := text.read(1 << 12):
            found = re.search(rb"[ \n]", block)
            start += found.end() if found else len(block)
            if found:
                break
        if start < stop:
            yield start
    yield stop


def attempt(part: Range, lower_case: bool) -> Problem:
    """`read`, and what went wrong."""
    try:
        read(part, lower_case)
    except UnicodeDecodeError:
        return "not UTF-8"
    except OSError as error:
        return error.errno or 0, error.strerror or str(error), error.filename
    return None


def serve() -> None:
    """The work of a process: ranges in, and of each, when it has been read, what went wrong out, a line each."""
    with suppress(BrokenPipeError, json.JSONDecodeError):         # nobody is there any more to read for
        lower_case, *parts = json.load(sys.stdin)
        for path, start, stop, stem in parts:
            problem = attempt(Range(Path(path), start, stop, stem), lower_case)
            os.write(1, f"{json.dumps(problem)}\n".encode())     # unbuffered: nothing is left to complain at the end


def _plain(block: bytes, lower_case: bool) -> bytes:
    """A text with spaces for ASCII's other white space, and newlines between spaces; _Words needs those around it."""
    text = block.decode()
    if lower_case:
        block = text.lower().encode()
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if any(space in block for space in NARROW):
        block = block.translate(PLAIN)
    return b" " + block.replace(b"\n", b" \n ") + b" " * 16


class _Words:
    """Numbers of words, in the order in which they first come; 0 is the newline."""

    def __init__(self) -> None:
        self.seen: defaultdict[bytes, int] = defaultdict()
        self.seen.default_factory = self.seen.__len__
        self.seen[b"\n"]
        # of the word in each place: its first 8 bytes, its next 7 below its length, its number; all in one cache line
        self._table = np.zeros((PLACES, 4), np.uint64)

    def numbers(self, text: bytes) -> np.ndarray:
        characters = np.frombuffer(text, np.uint8)
        space = characters == ord(" ")
        if not text.isascii():
            wide = np.flatnonzero(characters >= 0xC2)            # where a character of several bytes begins
            follows = _from_each_byte(text, 4)[wide].view("<u4")
            for size, codes in WIDE.items():
                at = wide[np.isin(follows & (1 << 8 * size) - 1, codes)]
                for i in range(size):
                    space[at + i] = True
        borders = np.flatnonzero(space[1:] != space[:-1]) + 1
        starts, ends = borders[::2], borders[1::2]
        length = np.minimum(ends - starts, 16)
        words = _from_each_byte(text, 16)[starts].view(np.uint8).reshape(-1, 16)
        words &= KEPT.take(length, axis=0)
        words[:, 15] = length
        first, rest = words.view("<u8").T
        place = ((first ^ rest * MIX[0]) * MIX[1] >> np.uint64(64 - PLACES.bit_length() + 1)).astype(np.int64)
        first_there, rest_there, number_there, _ = self._table.take(place, axis=0).T
        numbers = number_there.astype(np.int32)
        others = np.flatnonzero((first_there != first) | (rest_there != rest) | (length == 16))
        spelt = [text[start:end] for start, end in zip(starts[others].tolist(), ends[others].tolist())]
        numbers[others] = np.fromiter(map(self.seen.__getitem__, spelt), np.int32, len(spelt))
        settling = others[rest_there[others] == 0]               # of two for one place, the last: in all three alike
        for column, values in zip(self._table.T, (first, rest, numbers)):
            column[place[settling]] = values[settling]
        return numbers


def _from_each_byte(text: bytes, size: int) -> np.ndarray:
    """So many bytes from each on, as one thing each, so that numpy copies them whole."""
    return np.ndarray((len(text) - size + 1,), f"V{size}", text, strides=(1,))


# By a word's length, where 16 stands for all above 15: a mask of its bytes, of which the long have 8.
KEPT = np.array([[255 * (i < (n if n < 16 else 8)) for i in range(16)] for n in range(17)], np.uint8)
WIDE = {size: np.array([int.from_bytes(c.encode(), "little") for c in map(chr, range(0x80, 0x3001))
                        if c.isspace() and len(c.encode()) == size], np.uint32) for size in (2, 3)}
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)           # odd, with bits everywhere
