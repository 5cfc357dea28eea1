"""Vocabularies: words, characters, bytes, byte pairs. Text becomes token ids and ids become text; no torch.

Files are read in pieces, so that memory stays bounded whatever their size; texts of words by txl/reading.py.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np

from txl import reading
from txl.datasets import DataError

ENDOFTEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Vocab:
    """What all kinds share. `content` reads what a vocabulary is made of, when that is first needed.

    Two vocabularies of equal `hash` give a token the same id.
    """
    kind: ClassVar[str]
    unit: ClassVar[str]                           # what a token is, in words
    size: int
    start: int                                    # id of what precedes a text's first token
    hash: str
    content: Callable[[], str] = field(repr=False, compare=False)
    unk: int | None = None                        # id of what stands for words or characters outside, if anything

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        raise NotImplementedError

    def piece(self, token: int, after: int | None = None) -> bytes:
        """What a token adds to a text whose last token is `after`. The pieces of a text are what `decode` makes of
        it, in UTF-8 that a piece may begin or end in the middle of."""
        raise NotImplementedError

    def encode_file(self, path: Path, scratch: Path | None = None) -> Iterator[np.ndarray]:
        """The ids of a file, int32, piece by piece; `scratch` is where WordVocab.count has read it, if it has.

        Raises DataError.
        """
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Writes vocab.json, from which `load` knows all but the content, and the content, vocab.txt."""
        (folder / "vocab.txt").write_text(self.content(), encoding="utf-8", newline="\n")
        header = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "content"}
        (folder / "vocab.json").write_text(json.dumps(header | {"kind": self.kind}))


def load(folder: Path) -> Vocab:
    """The vocabulary that `save` wrote. Its content is read when first needed, not here."""
    header = json.loads((folder / "vocab.json").read_text())
    kind = {k.kind: k for k in (WordVocab, CharVocab, ByteVocab, BpeVocab)}[header.pop("kind")]
    return kind(**header, content=partial(_content, folder / "vocab.txt", kind.kind, header["hash"]))


@dataclass(frozen=True)
class WordVocab(Vocab):
    """Words are what stands between whitespace; a line ends in `end`, an empty one too, and the last in any case.

    The One Billion Word Benchmark has <S> on both sides of a sentence. One stands between two sentences: as the end of
    the first it is a target, and the second follows it. (With two, each second <S> would be a target that costs next to
    nothing. The original reads them, but never as a target.)
    """
    kind: ClassVar[str] = "word"
    unit: ClassVar[str] = "words, the ends of lines among them"
    end: str = "<eos>"
    lower_case: bool = False

    @classmethod
    def count(cls, paths: Iterable[Path], *, end: str = "<eos>", lower_case: bool = False, min_freq: int = 0,
              max_size: int | None = None, scratch: Path | None = None) -> WordVocab:
        """`end` is 0; words follow by falling frequency in the files, ties in the order in which they first occur.

        With min_freq or max_size, <unk> stands for the words left out; where no such word was kept, it is 1. In the
        folder `scratch`, if given, stays what encode_file needs so as not to read the files again.
        """
        numbers: defaultdict[str, int] = defaultdict()
        numbers.default_factory = numbers.__len__
        counts, parts = np.zeros(0, np.int64), []
        with _folder(scratch) as folder:
            for part in reading.read(paths, folder, lower_case):
                own = np.fromiter(map(numbers.__getitem__, part.words()), np.int32)
                own.tofile(part.table_file)
                counts = np.concatenate([counts, np.zeros(len(numbers) - len(counts), np.int64)])
                counts[own] += part.counts()
                parts.append(part)
            words = [end if word == "\n" else word for word in numbers]
            chosen, ids = _chosen(words, counts, end, "<unk>", min_freq, max_size)
            for part in parts:
                ids[np.fromfile(part.table_file, np.int32)].tofile(part.table_file)
        return cls._of(chosen, end, lower_case)

    @classmethod
    def closed(cls, path: Path, *, end: str = "<eos>", lower_case: bool = False) -> WordVocab:
        """A vocabulary given as a file: the first word of each line, ids in their order."""
        lines = re.split("\r\n?|\n", "".join(pieces(path)))
        words = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
        return cls._of(words, end, lower_case, f" {path}")

    @classmethod
    def _of(cls, words: list[str], end: str, lower_case: bool, where: str = "") -> WordVocab:
        unk = next((words.index(unk) for unk in ("<unk>", "<UNK>") if unk in words), None)
        if end not in words:
            raise DataError(f"The vocabulary{where} lacks {end}, which every line ends in. Add it as a line of its own")
        text = "\n".join(words)
        return cls(len(words), words.index(end), _sha256("word", text), lambda: text, unk, end, lower_case)

    def encode(self, text: str) -> list[int]:
        """Ids of the words, with the token of a line's end where a newline is; none is added at the end."""
        words = (text.lower() if self.lower_case else text).replace("\n", f" {self.end} ").split()
        return self._look_up(words, "the text").tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """The words between spaces, with a newline where a line ends."""
        words = ("\n" if i == self.start else self._words[i] for i in ids)
        return re.sub(" ?\n ?", "\n", " ".join(words))

    def piece(self, token: int, after: int | None = None) -> bytes:
        if token == self.start:
            return b"\n"
        return f"{'' if after in (None, self.start) else ' '}{self._words[token]}".encode()

    def encode_file(self, path: Path, scratch: Path | None = None) -> Iterator[np.ndarray]:
        with _folder(scratch) as folder:
            for part in reading.read([path], folder, self.lower_case):
                ids = (np.fromfile(part.table_file, np.int32) if part.table_file.exists() else
                       self._look_up([self.end, *part.words()[1:]], path))
                for chunk in part.ids(1 << 16):
                    yield ids[chunk]
        if not _ends_in_newline(path):
            yield np.array([self.start], np.int32)

    def _look_up(self, words: list[str], where: Path | str) -> np.ndarray:
        try:
            return np.fromiter(map(self._table.__getitem__, words), np.int32, len(words))
        except KeyError as error:
            word, remedy = error.args[0], "Use words of the text that the vocabulary was made from"
            if isinstance(where, Path):
                remedy = ("Let rare words become <unk>: --set recipe.data.min_freq=2; or, where the words are given as "
                          "a list, add <unk> to it as a line of its own")
            place = _place(where, lambda line: word in (line.lower() if self.lower_case else line).split())
            raise DataError(f"The word {word!r} of {place} is not in the vocabulary, which has no <unk> to stand for "
                            f"it. {remedy}") from None

    @cached_property
    def _words(self) -> list[str]:
        return self.content().split("\n")

    @cached_property
    def _table(self) -> dict[str, int]:
        return _Table(self._words, self.unk)


class _Table(dict):
    """Words to ids, and to `unk`, if there is one, what is none of them; asking does not make it grow."""

    def __init__(self, words: list[str], unk: int | None):
        super().__init__(zip(words, range(len(words))))
        self.unk = unk

    def __missing__(self, word: str) -> int:
        if self.unk is None:
            raise KeyError(word)
        return self.unk


@dataclass(frozen=True)
class CharVocab(Vocab):
    """A token is a character (a code point of Unicode), also space and newline, which is `start`.

    The set is closed. What <unk> is to words, U+FFFD, the replacement character, is here: where it is in the set it
    stands for characters outside.
    """
    kind: ClassVar[str] = "char"
    unit: ClassVar[str] = "characters, spaces and newlines among them"
    lower_case: bool = False

    @classmethod
    def count(cls, paths: Iterable[Path], *, lower_case: bool = False, min_freq: int = 0, max_size: int | None = None
              ) -> CharVocab:
        """The newline is 0; characters follow as words do in WordVocab.count, and U+FFFD where <unk> would be."""
        counter: Counter[str] = Counter()
        for path in paths:
            for piece in pieces(path):
                counter.update(piece.lower() if lower_case else piece)
        counts = np.fromiter(counter.values(), np.int64)
        text = "".join(_chosen(list(counter), counts, "\n", "\ufffd", min_freq, max_size)[0])
        unk = text.find("\ufffd")
        return cls(len(text), 0, _sha256("char", text), lambda: text, unk if unk >= 0 else None, lower_case)

    def encode(self, text: str) -> list[int]:
        return self._ids(text, "the text").tolist()

    def decode(self, ids: Iterable[int]) -> str:
        chars = self._chars
        return "".join(chars[i] for i in ids)

    def piece(self, token: int, after: int | None = None) -> bytes:
        return self._chars[token].encode()

    def encode_file(self, path: Path, scratch: Path | None = None) -> Iterator[np.ndarray]:
        for piece in pieces(path):
            yield self._ids(piece, path)

    def _ids(self, text: str, where: Path | str) -> np.ndarray:
        points = _code_points(text.lower() if self.lower_case else text)
        ids = self._table[points]
        if ids.size and ids.min() < 0:
            char = chr(points[ids < 0][0])
            remedy = ("Let rare characters become U+FFFD: --set recipe.data.min_freq=2" if isinstance(where, Path) else
                      "Use characters of the text that the vocabulary was made from")
            place = _place(where, lambda line: char in (line.lower() if self.lower_case else line))
            raise DataError(f"The character {char!r} (U+{ord(char):04X}) of {place} is not in the vocabulary, which "
                            f"has no U+FFFD to stand for it. {remedy}")
        return ids

    @cached_property
    def _chars(self) -> str:
        return self.content()

    @cached_property
    def _table(self) -> np.ndarray:
        """Ids by code point, -1 for what has none."""
        table = np.full(0x110000, -1 if self.unk is None else self.unk, np.int32)
        table[_code_points(self._chars)] = np.arange(self.size)
        return table


@dataclass(frozen=True)
class ByteVocab(Vocab):
    """A token is a byte, its id the byte's value; newlines are bytes like any other, and `start` is one.

    Transformer-XL's ancestors lose enwik8's newlines (they read lines and join them without <eos>), so their bits per
    character are those of the remaining symbols. Ours are of exactly the bytes in the file.
    """
    kind: ClassVar[str] = "byte"
    unit: ClassVar[str] = "bytes: each of the text counts, newlines too"

    @classmethod
    def make(cls) -> ByteVocab:
        return cls(256, ord("\n"), _sha256("byte", ""), str)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        """The text; a byte that is not UTF-8 where it stands becomes the replacement character."""
        return bytes(ids).decode(errors="replace")

    def piece(self, token: int, after: int | None = None) -> bytes:
        return bytes([token])

    def encode_file(self, path: Path, scratch: Path | None = None) -> Iterator[np.ndarray]:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                yield np.frombuffer(block, np.uint8).astype(np.int32)


@dataclass(frozen=True)
class BpeVocab(Vocab):
    """Byte-level byte pairs, GPT-2's way: no prefix space, no line tokens, and any text comes back as it was.

    A file is one continuous text. It is encoded in pieces cut where GPT-2's pattern splits anyway (before whitespace
    that follows something visible), so the tokens are those of the whole. They do not depend on the number of
    threads either: pieces come back in their order, and training sums counts.
    """
    kind: ClassVar[str] = "bpe"
    unit: ClassVar[str] = "byte pairs"

    @classmethod
    def train(cls, paths: Sequence[Path], n_token: int) -> BpeVocab:
        """A vocabulary of exactly n_token entries, <|endoftext|> the first of them. Raises DataError if unreachable."""
        from tokenizers import models, pre_tokenizers, trainers
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if n_token <= len(alphabet):
            raise DataError(f"A bpe vocabulary holds 256 bytes and {ENDOFTEXT}, so data.n_token must be at least 257, "
                            f"not {n_token}")
        tokenizer = _byte_level(models.BPE())
        tokenizer.train_from_iterator(chain.from_iterable(map(pieces, paths)), trainers.BpeTrainer(
            vocab_size=n_token, special_tokens=[ENDOFTEXT], initial_alphabet=alphabet, show_progress=False))
        if (size := tokenizer.get_vocab_size()) != n_token:
            raise DataError(f"{_span(paths)} is too short for {n_token} byte pairs: after {size} nothing is left to "
                            f"merge. Use more text, or --set recipe.data.n_token={size}")
        return cls._of(tokenizer)

    @classmethod
    def from_files(cls, folder: Path) -> BpeVocab:
        """GPT-2's encoder.json and vocab.bpe."""
        from tokenizers import models
        try:
            tokenizer = _byte_level(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
        except Exception as error:                # the library raises Exception itself
            raise DataError(f"{folder} does not hold a usable encoder.json and vocab.bpe ({error}). Get them with: "
                            f"python -m txl.data --dataset=gpt2 --dir={folder}") from error
        tokenizer.add_special_tokens([ENDOFTEXT])
        return cls._of(tokenizer)

    @classmethod
    def _of(cls, tokenizer: Any) -> BpeVocab:
        text = tokenizer.to_str()
        return cls(tokenizer.get_vocab_size(), tokenizer.token_to_id(ENDOFTEXT), _sha256("bpe", text), lambda: text)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def piece(self, token: int, after: int | None = None) -> bytes:
        return self._pieces[token]

    def encode_file(self, path: Path, scratch: Path | None = None) -> Iterator[np.ndarray]:
        rest = pieces(path)
        while batch := list(islice(rest, 64)):    # tokens of short pieces stay small, and threads share a batch
            for encoded in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoded.ids, np.int32)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer
        return Tokenizer.from_str(self.content())

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each token, which its name spells in GPT-2's alphabet."""
        visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        hidden = [byte for byte in range(256) if byte not in visible]
        byte_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
        return [bytes(map(byte_of.__getitem__, self._tokenizer.id_to_token(i))) for i in range(self.size)]


def pieces(path: Path) -> Iterator[str]:
    """A text in pieces of bounded length, each but the first beginning with a space or newline after a visible one.

    Raises DataError where the file is not UTF-8.
    """
    rest = ""
    try:
        with open(path, encoding="utf-8", newline="") as f:
            while block := f.read(1 << 16):
                rest += block
                if cut := _CUT.match(rest):
                    yield cut[0]
                    rest = rest[cut.end():]
    except UnicodeDecodeError as error:
        raise DataError(reading.not_utf8(path)) from error
    if rest:
        yield rest


_CUT = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _chosen(words: list[str], counts: np.ndarray, first: str, unk: str, min_freq: int, max_size: int | None
            ) -> tuple[list[str], np.ndarray]:
    """A vocabulary of words, which but for `first` are different ones, and the id in it of each: `first`, then the
    others by falling count, ties in their order. With min_freq or max_size, `unk` stands for what they leave out; where
    it was not kept itself, it is the second."""
    is_first = np.array([word == first for word in words], bool)
    ranked = np.argsort(-counts, kind="stable")
    ranked = ranked[~is_first[ranked]]
    kept = ranked[:max_size]
    kept = kept[counts[kept] >= min_freq]
    others = [words[i] for i in kept.tolist()]
    lacks_unk = (min_freq > 1 or max_size is not None) and unk not in others
    chosen = [first, *([unk] if lacks_unk else []), *others]
    ids = np.full(len(words), chosen.index(unk) if len(kept) < len(ranked) else 0, np.int32)
    ids[is_first] = 0
    ids[kept] = np.arange(len(chosen) - len(kept), len(chosen))
    return chosen, ids


@contextmanager
def _folder(scratch: Path | None) -> Iterator[Path]:
    if scratch is not None:
        yield scratch
    else:
        with TemporaryDirectory() as folder:
            yield Path(folder)


def _ends_in_newline(path: Path) -> bool:
    with open(path, "rb") as f:
        f.seek(-min(1, path.stat().st_size), os.SEEK_END)
        return f.read() in (b"\n", b"\r")


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _content(path: Path, kind: str, hash: str) -> str:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError:
        text = ""
    if _sha256(kind, text) != hash:
        raise DataError(f"{path} is damaged: it is not the vocabulary that was written. Delete {path.parent} and run "
                        f"the same command again: the text is encoded anew")
    return text


def _sha256(kind: str, text: str) -> str:
    return hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()


def _place(where: Path | str, has: Callable[[str], bool]) -> str:
    """File and line of a first occurrence."""
    if isinstance(where, str):
        return where
    with open(where, encoding="utf-8") as f:
        number = next((number for number, line in enumerate(f, 1) if has(line)), None)
    return f"{where}, line {number}," if number else str(where)


def _span(paths: Sequence[Path]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} … {paths[-1].name}"
