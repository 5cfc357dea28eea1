"""Between tokens and what people read, for words, bytes and byte pairs."""
from __future__ import annotations

import numpy as np
import pytest

from tests.txl.test_vocab import ids_of_file, random_text, written
from txl.text import count_words, unknown, words
from txl.vocab import BpeVocab, ByteVocab, WordVocab

WORDS = ["the", "café", "日本", "🎉", "don't", "=", "a\tb", "f(x):"]


def plain_text(seed: int, count: int) -> str:
    rng = np.random.default_rng(seed)
    return "".join(f"{WORDS[i]}{[' ', '  ', chr(10), chr(10) * 2][j]}" for i, j in zip(
        rng.integers(0, len(WORDS), count), rng.integers(0, 4, count)))


def vocabularies(path):
    return [WordVocab.count([path]), WordVocab.count([path], double=True), ByteVocab.make(), BpeVocab.train(path, 270)]


@pytest.mark.parametrize("end", ["", "\n", "x"])
def test_words_and_ends_of_lines_are_as_many_in_every_vocabulary(tmp_path, end):
    text = plain_text(1, 30_000).rstrip("\n ") + end               # more than one piece of tokens
    path = written(tmp_path, text)
    lines = text.removesuffix("\n").split("\n")
    expected = sum(len(line.split()) for line in lines) + len(lines)
    for vocab in vocabularies(path):
        ids = np.array(ids_of_file(vocab, path))
        assert count_words(vocab, ids) == expected
        assert vocab.kind != "word" or len(ids) == expected + vocab.double * len(lines)


@pytest.mark.parametrize("seed", range(3))
def test_the_tokens_of_the_words_are_those_of_the_text(tmp_path, seed):
    text = random_text(seed)
    for vocab in vocabularies(written(tmp_path, random_text(seed + 10, 2000) + " " + text)):
        text = vocab.decode(vocab.encode(text))
        assert [i for _, ids in words(vocab, text) for i in ids] == vocab.encode(text)


def test_words_that_only_unk_stands_for_are_named_once(tmp_path):
    vocab = WordVocab.count([written(tmp_path, "the <unk> fox\nthe fox")])
    assert unknown(vocab, words(vocab, "the zebra saw\nthe <unk> zebra")) == ["zebra", "saw"]
    assert unknown(ByteVocab.make(), words(ByteVocab.make(), "zebra")) == []


@pytest.mark.parametrize("seed", range(3))
def test_the_pieces_of_tokens_make_the_decoded_text(tmp_path, seed):
    path = written(tmp_path, random_text(seed, 2000))
    rng = np.random.default_rng(seed)
    for vocab in vocabularies(path):
        for ids in (ids_of_file(vocab, path), rng.integers(0, vocab.size, 500).tolist()):    # text, and nonsense
            pieces = [vocab.piece(i, after) for after, i in zip([None, *ids], ids)]
            assert b"".join(pieces).decode(errors="replace") == vocab.decode(ids)
