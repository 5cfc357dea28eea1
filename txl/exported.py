"""An exported language model: scores texts and writes. Needs torch and its .pt2 file; copy the two anywhere.

    python FILE.py --text="The quick brown fox"
    python FILE.py --prompt="The quick" --length=50 --temperature=0.8
    python -c "import FILE; print(FILE.LanguageModel('FILE.pt2').score('The quick').per_word)"

This file and the model it reads stand side by side, FILE.py and FILE.pt2. `python -m txl.export` made both.
"""
from __future__ import annotations

import argparse
import json
import math
import re
import sys
import unicodedata
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABOUT = "about.json"                              # in the .pt2: the vocabulary and the lengths
State = tuple[Tensor, Tensor]                     # [layers, B, mem_len, d_model], and how much of it is real [B]


@dataclass(frozen=True)
class Score:
    """What a text costs: -log p of each token, in nats, after all before it."""
    nats: list[float]
    words: int                                    # the ends of lines count as words

    @property
    def per_token(self) -> float:
        """Perplexity."""
        return _exp(sum(self.nats) / len(self.nats))

    @property
    def per_word(self) -> float:
        """Perplexity that can be compared between vocabularies."""
        return _exp(sum(self.nats) / self.words)


class LanguageModel:
    """`step` is the model itself: tokens [B, T] and State in; log p of every next token [B, T, V] and State out."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        if not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is not there, or is no exported model")
        extra = {ABOUT: ""}
        program = torch.export.load(str(path), extra_files=extra)
        if device != "cpu":
            from torch.export.passes import move_to_device_pass
            program = move_to_device_pass(program, device)
        self.step, self.device, self.about = program.module(), device, json.loads(extra[ABOUT])
        self.vocabulary = vocabulary(self.about["vocabulary"])

    def fresh(self, batch: int) -> State:
        """Before a text."""
        return (torch.zeros(self.about["n_layer"], batch, self.about["mem_len"], self.about["d_model"],
                            device=self.device), torch.zeros(batch, dtype=torch.long, device=self.device))

    @torch.no_grad()
    def read(self, tokens: list[list[int]], state: State) -> tuple[Tensor, State]:
        """log p of what may follow each token, [B, T, V], and the state to go on from."""
        log_prob_BTV, *after = self.step(torch.tensor(tokens, device=self.device), *state)
        return log_prob_BTV, (after[0], after[1])

    def score(self, text: str) -> Score:
        """Raises ValueError where there is nothing to score, or a word that the vocabulary does not have."""
        ids = self.vocabulary.encode(text)
        if not ids:
            raise ValueError("There is no word in the text to score")
        before, state, nats = [self.vocabulary.start, *ids], self.fresh(1), list[float]()
        for first in range(0, len(ids), self.about["tgt_len"]):
            targets = ids[first:first + self.about["tgt_len"]]
            log_prob_1TV, state = self.read([before[first:first + len(targets)]], state)
            nats += (-log_prob_1TV[0, range(len(targets)), targets]).tolist()
        return Score(nats, len(re.findall(self.vocabulary.words, text)))

    def generate(self, prompt: str = "", length: int = 100, temperature: float = 0.0, seed: int = 0) -> str:
        """What follows the prompt, `length` tokens of it; temperature 0 always takes the likeliest."""
        ids = self.vocabulary.encode(prompt)
        written, state, generator = list[int](), self.fresh(1), torch.Generator().manual_seed(seed)
        rest = [self.vocabulary.start, *ids]
        for _ in range(length):
            for first in range(0, len(rest), self.about["tgt_len"]):
                log_prob_1TV, state = self.read([rest[first:first + self.about["tgt_len"]]], state)
            log_prob_V = log_prob_1TV[0, -1].float().cpu()
            token = int(log_prob_V.argmax()) if temperature == 0 else int(
                torch.multinomial((log_prob_V / temperature).softmax(0), 1, generator=generator))
            written.append(token)
            rest = [token]
        whole, before = (self.vocabulary.decode(x) for x in (ids + written, ids))
        return whole[len(before):] if whole.startswith(before) else self.vocabulary.decode(written)


class Words:
    """Words between whitespace; the end of a line is a token."""
    words = r"\n|\S+"

    def __init__(self, about: dict[str, Any]):
        self.tokens, self.start, self.unk, self.lower_case = (
            about[key] for key in ("tokens", "start", "unk", "lower_case"))
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def encode(self, text: str) -> list[int]:
        words = self.split(text.lower() if self.lower_case else text)
        ids = [self.ids.get(word, self.unk) for word in words]
        if None in ids:
            raise ValueError(f"{words[ids.index(None)]!r} is not in the vocabulary, which has nothing to stand for it")
        return ids

    def split(self, text: str) -> list[str]:
        return text.replace("\n", f" {self.tokens[self.start]} ").split()

    def decode(self, ids: Iterable[int]) -> str:
        return re.sub(" ?\n ?", "\n", " ".join("\n" if i == self.start else self.tokens[i] for i in ids))


class Characters(Words):
    words = r"[ \t\r\n]*[^ \t\r\n]+|[ \t\r\n]+"

    def split(self, text: str) -> list[str]:
        return list(text)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.tokens[i] for i in ids)


class Bytes:
    words = Characters.words

    def __init__(self, about: dict[str, Any]):
        self.start: int = about["start"]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode(errors="replace")


class BytePairs:
    """GPT-2's way: what its pattern keeps together is merged, pair by pair, in the order in which pairs were learnt."""
    words = Bytes.words

    def __init__(self, about: dict[str, Any]):
        self.tokens, self.start = about["tokens"], about["start"]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.rank = {(first, second): i for i, (first, second) in enumerate(about["merges"])}
        visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        hidden = [byte for byte in range(256) if byte not in visible]
        self.letter = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
        self.byte = {letter: byte for byte, letter in self.letter.items()}
        self.merged = lru_cache(1 << 16)(self._merged)

    def encode(self, text: str) -> list[int]:
        special, ids = self.tokens[self.start], list[int]()
        for i, between in enumerate(text.split(special)):
            ids += [self.start] if i else []
            for piece in pieces(between):
                ids += self.merged(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(self.byte[letter] for i in ids for letter in self.tokens[i]).decode(errors="replace")

    def _merged(self, piece: str) -> list[int]:
        parts = [self.letter[byte] for byte in piece.encode()]
        while len(parts) > 1:
            rank, at = min((self.rank.get(pair, math.inf), i) for i, pair in enumerate(pairwise(parts)))
            if rank == math.inf:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]


def pieces(text: str) -> list[str]:
    r"""GPT-2's '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+, which `re` cannot spell: the
    same on the kinds of the characters, L letters, N numbers, S spaces but for the space, O all others."""
    kinds, found, at = "".join(map(_kind, text)), [], 0
    while at < len(text):
        match = _CONTRACTION.match(text, at) or _KINDS.match(kinds, at)
        assert match is not None                              # the pattern has every kind
        found.append(text[at:match.end()])
        at = match.end()
    return found


_CONTRACTION = re.compile("'(?:[sdmt]|ll|ve|re)")
_KINDS = re.compile(" ?L+| ?N+| ?O+|[ S]+(?![LNO])|[ S]+")


def _kind(character: str) -> str:
    if character.isspace() and not "\x1c" <= character <= "\x1f":       # which Unicode does not call white
        return " " if character == " " else "S"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def vocabulary(about: dict[str, Any]) -> Words | Bytes | BytePairs:
    kinds: dict[str, type[Words | Bytes | BytePairs]] = {
        "word": Words, "char": Characters, "byte": Bytes, "bpe": BytePairs}
    return kinds[about["kind"]](about)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Path(__file__).with_suffix(".pt2"), help="a .pt2 file; else the one beside")
    parser.add_argument("--text", help="score this text; -: the one on stdin")
    parser.add_argument("--prompt", default="", help="write what follows this")
    parser.add_argument("--length", type=int, default=100, help="tokens to write")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 always takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    flags = parser.parse_args(argv)
    try:
        model = LanguageModel(flags.model, flags.device)
        if flags.text is None:
            print(flags.prompt + model.generate(flags.prompt, flags.length, flags.temperature, flags.seed))
        else:
            score = model.score(sys.stdin.read() if flags.text == "-" else flags.text)
            print(f"{len(score.nats)} tokens, {score.words} words: {sum(score.nats):.4f} nats, perplexity "
                  f"{score.per_token:.5g} per token, {score.per_word:.5g} per word")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
