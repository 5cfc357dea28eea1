"""Between tokens and what people read, in every kind of vocabulary."""
from __future__ import annotations

import numpy as np
import pytest

from tests.txl.test_vocab import ids_of_file, random_text, written
from txl.text import TextStream, count_words, ends_in, unknown, words
from txl.vocab import BpeVocab, ByteVocab, CharVocab, WordVocab

WORDS = ["the", "café", "日本", "🎉", "don't", "=", "a\tb", "f(x):"]


def plain_text(seed: int, count: int) -> str:
    rng = np.random.default_rng(seed)
    return "".join(f"{WORDS[i]}{[' ', '  ', chr(10), chr(10) * 2][j]}" for i, j in zip(
        rng.integers(0, len(WORDS), count), rng.integers(0, 4, count)))


def vocabularies(path):
    return [WordVocab.count([path]), WordVocab.count([path], end="<S>"), CharVocab.count([path]), ByteVocab.make(),
            BpeVocab.train([path], 270)]


@pytest.mark.parametrize("end", ["", "\n", "x"])
def test_words_and_ends_of_lines_are_as_many_in_every_vocabulary(tmp_path, end):
    text = plain_text(1, 30_000).rstrip("\n ") + end               # more than one piece of tokens
    path = written(tmp_path, text)
    lines = text.removesuffix("\n").split("\n")
    expected = sum(len(line.split()) for line in lines) + len(lines)
    for vocab in vocabularies(path):
        ids = np.array(ids_of_file(vocab, path))
        assert count_words(vocab, ids) == expected
        assert vocab.kind != "word" or len(ids) == expected


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
    chars = CharVocab.count([written(tmp_path, "ab\ufffd")])
    assert unknown(chars, words(chars, "ab axb axb\na\ufffdb x")) == ["axb", "x"]


@pytest.mark.parametrize("seed", range(3))
def test_the_pieces_of_tokens_make_the_decoded_text(tmp_path, seed):
    path = written(tmp_path, random_text(seed, 2000))
    rng = np.random.default_rng(seed)
    for vocab in vocabularies(path):
        for ids in (ids_of_file(vocab, path), rng.integers(0, vocab.size, 500).tolist()):    # text, and nonsense
            pieces = [vocab.piece(i, after) for after, i in zip([None, *ids], ids)]
            assert b"".join(pieces).decode(errors="replace") == vocab.decode(ids)


@pytest.mark.parametrize("seed", range(3))
def test_text_that_comes_piece_by_piece_is_the_decoded_text_and_has_no_half_characters(tmp_path, seed):
    path = written(tmp_path, random_text(seed, 2000))
    for vocab in vocabularies(path):
        ids = ids_of_file(vocab, path)
        stream = TextStream(vocab)
        pieces = [stream.feed(i) for i in ids] + [stream.close()]
        assert "".join(pieces) == vocab.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
        assert vocab.kind == "word" or "" in pieces               # it has waited for the rest of a character


def slow_end(text: str, stops: tuple[str, ...]) -> str:
    """Character by character, until the text ends in a stop string; of several the longest."""
    for n in range(1, len(text) + 1):
        if complete := [stop for stop in stops if text[:n].endswith(stop)]:
            return text[:n - len(max(complete, key=len))]
    return text


@pytest.mark.parametrize("stops", [
    ("ab",), ("aab", "b a"), ("aaab", "ab"), ("é\n", "\n\n"), ("日",), ("a", "bé日"), ("xyz",)])
@pytest.mark.parametrize("seed", range(3))
def test_text_ends_before_the_first_stop_string_wherever_tokens_begin(tmp_path, stops, seed):
    rng = np.random.default_rng(seed)
    text = "".join(rng.choice(["a", "b", " ", "é", "日", "\n"], 400, p=[.4, .2, .1, .1, .1, .1]))
    for vocab in (ByteVocab.make(), BpeVocab.train([written(tmp_path, text * 3 + "ab" * 50)], 270)):
        ids = vocab.encode(text[:60])
        stream, shown, ended = TextStream(vocab, None, stops), "", None
        for n, i in enumerate(ids, start=1):
            shown += stream.feed(i)
            assert stream.stopped == any(stop in vocab.decode(ids[:n]) for stop in stops)
            if stream.stopped:
                ended = n
                break
            assert not ends_in(stops, vocab, None, ids[:n])
        assert ended is None or ends_in(stops, vocab, None, ids[:ended])
        assert shown + stream.close() == slow_end(text[:60], stops)
