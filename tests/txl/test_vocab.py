"""Vocabularies against slow, obvious derivations of the same ids."""
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from txl import vocab
from txl.vocab import BpeVocab, ByteVocab, CharVocab, DataError, WordVocab

SPACES = [" ", "  ", "\t", "\xa0", "\u2028", "\x1c", "\n", "\n\n", "\r\n", " \n ", "\r"]
WORDS = ["the", "The", "<unk>", "café", "naïve", "日本", "🎉", "\u0130stanbul", "don't", "x\x00y", "=", "@-@", "ΟΔΟΣ"]


def random_text(seed: int, count: int = 300) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + (rng.choice(SPACES) if rng.random() < .3 else " ") for _ in range(count))


def written(folder, text: str, name: str = "train.txt"):
    path = folder / name
    path.write_bytes(text.encode())
    return path


def slow_lines(path, lower_case: bool = False) -> list[list[str]]:
    with open(path, encoding="utf-8") as f:
        return [(line.lower() if lower_case else line).strip().split() for line in f]


def ids_of_file(v, path) -> list[int]:
    return np.concatenate(list(v.encode_file(path))).tolist()


@pytest.mark.parametrize("lower_case", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_words_are_numbered_by_falling_frequency_and_first_occurrence_after_eos(tmp_path, seed, lower_case):
    path = written(tmp_path, random_text(seed))
    lines = slow_lines(path, lower_case)
    symbols = ["<eos>", *(word for word, _ in Counter(word for line in lines for word in line).most_common())]
    v = WordVocab.count([path], lower_case=lower_case)
    assert (v.size, v.start, v.kind) == (len(symbols), 0, "word")
    assert v.content().split("\n") == symbols
    assert ids_of_file(v, path) == [symbols.index(word) for line in lines for word in [*line, "<eos>"]]


def test_a_file_longer_than_a_piece_has_the_tokens_of_the_whole(tmp_path):
    path = written(tmp_path, random_text(0, 400_000) + "last")
    v = WordVocab.count([path])
    symbols = {word: i for i, word in enumerate(v.content().split("\n"))}
    chunks = list(v.encode_file(path))
    assert len(chunks) > 3
    assert np.concatenate(chunks).tolist() == [symbols[w] for line in slow_lines(path) for w in [*line, "<eos>"]]


def test_each_line_ends_in_eos_even_an_empty_or_unfinished_one(tmp_path):
    v = WordVocab.count([written(tmp_path, "a b\n\nb")])
    eos, b, a = 0, 1, 2
    assert ids_of_file(v, written(tmp_path, "a b\n\nb")) == [a, b, eos, eos, b, eos]
    assert ids_of_file(v, written(tmp_path, "a b\n\nb\n")) == [a, b, eos, eos, b, eos]
    assert ids_of_file(v, written(tmp_path, "\n")) == [eos]
    assert v.encode("a b\n\nb") == [a, b, eos, eos, b]
    assert v.decode([a, b, eos, eos, b]) == "a b\n\nb"


def test_several_files_are_counted_in_their_order(tmp_path):
    first, second = written(tmp_path, "b a\n", "1"), written(tmp_path, "c a\n", "2")
    assert WordVocab.count([first, second]).content().split("\n") == ["<eos>", "a", "b", "c"]
    assert WordVocab.count([second, first]).content().split("\n") == ["<eos>", "a", "c", "b"]


def test_words_dropped_by_min_freq_and_max_size_become_unk(tmp_path):
    path = written(tmp_path, "a a a b b c\n")
    rare = WordVocab.count([path], min_freq=2)
    assert rare.content().split("\n") == ["<eos>", "<unk>", "a", "b"]
    assert ids_of_file(rare, path) == [2, 2, 2, 3, 3, 1, 0]
    assert WordVocab.count([path], max_size=1).content().split("\n") == ["<eos>", "<unk>", "a"]
    own = written(tmp_path, "a a a <unk> <unk> c\n", "own")
    assert WordVocab.count([own], min_freq=2).content().split("\n") == ["<eos>", "a", "<unk>"]


def test_a_word_outside_becomes_the_texts_own_unk(tmp_path):
    v = WordVocab.count([written(tmp_path, "a <unk>\n")])
    assert v.encode("zebra a") == [2, 1]
    assert v.encode("zebra a") == [2, 1]                  # and is not learnt by being asked for


def test_a_word_outside_is_an_error_with_its_place_where_there_is_no_unk(tmp_path):
    v = WordVocab.count([written(tmp_path, "a b\n")])
    other = written(tmp_path, "a\nb\nb zebra\n", "valid.txt")
    with pytest.raises(DataError, match=r"'zebra' of .*valid.txt, line 3, .*--set recipe.data.min_freq=2"):
        list(v.encode_file(other))


def test_the_one_billion_words_have_a_closed_vocabulary_and_one_s_between_lines(tmp_path):
    closed = written(tmp_path, "</S>\n<S>\n<UNK>\nthe\ncat 17\n", "1b_word_vocab.txt")
    v = WordVocab.closed(closed, end="<S>")
    symbols = ["</S>", "<S>", "<UNK>", "the", "cat"]
    path = written(tmp_path, "the cat\ncat dog the\n\nthe")
    words = [w if w in symbols else "<UNK>" for line in slow_lines(path) for w in [*line, "<S>"]]
    assert ids_of_file(v, path) == [symbols.index(w) for w in words]
    assert (v.size, v.start) == (5, 1)            # <S> is also what precedes the first line


@pytest.mark.parametrize("lower_case", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_characters_are_numbered_by_falling_frequency_after_the_newline_and_come_back(tmp_path, seed, lower_case):
    text = random_text(seed, 30_000)                      # more than a piece
    path = written(tmp_path, text)
    text = text.lower() if lower_case else text
    symbols = ["\n", *(char for char, _ in Counter(text).most_common() if char != "\n")]
    v = CharVocab.count([path], lower_case=lower_case)
    assert (v.size, v.start, v.kind, v.unk) == (len(symbols), 0, "char", None)
    assert len(list(v.encode_file(path))) > 2
    assert ids_of_file(v, path) == [symbols.index(char) for char in text]
    assert v.decode(ids_of_file(v, path)) == text


def test_a_character_outside_is_an_error_with_its_place_or_becomes_the_replacement_character(tmp_path):
    path, other = written(tmp_path, "aab\r\n"), written(tmp_path, "a\nbéa\n", "valid.txt")
    v = CharVocab.count([path])
    with pytest.raises(DataError, match=r"'é' \(U\+00E9\) of .*valid.txt, line 2, .*--set recipe.data.min_freq=2"):
        list(v.encode_file(other))
    with pytest.raises(DataError, match=r"'é' \(U\+00E9\) of the text"):
        v.encode("é")
    rare = CharVocab.count([path], min_freq=2)
    assert ids_of_file(rare, other) == [2, 0, 1, 1, 2, 0]
    assert rare.decode([0, 1, 2]) == "\n\ufffda"
    assert CharVocab.count([path], max_size=1).content() == "\n\ufffda"
    assert CharVocab.count([written(tmp_path, "a\ufffd")]).unk == 2


def test_a_vocabulary_whose_file_was_damaged_is_not_used(tmp_path):
    WordVocab.count([written(tmp_path, "the cat\n")]).save(tmp_path)
    (tmp_path / "vocab.txt").write_text("<eos>\nthe\ncar")
    with pytest.raises(DataError, match=r"vocab.txt is damaged.*Delete .* and run the same command again"):
        vocab.load(tmp_path).encode("the")


@pytest.mark.parametrize("seed", range(5))
def test_bytes_come_back_as_they_were(tmp_path, seed):
    raw = random.Random(seed).randbytes(3000) + b"\r\n\x00"
    assert ids_of_file(ByteVocab.make(), written_bytes(tmp_path, raw)) == list(raw)
    text = random_text(seed)
    assert ByteVocab.make().decode(ByteVocab.make().encode(text)) == text
    assert (ByteVocab.make().size, ByteVocab.make().start) == (256, ord("\n"))


def written_bytes(folder, raw: bytes):
    (folder / "raw").write_bytes(raw)
    return folder / "raw"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return BpeVocab.train([written(tmp_path_factory.mktemp("bpe"), random_text(0, 20_000))], 300)


@pytest.mark.parametrize("text", ["", " ", "\n", "\r\n a\r\n", "no end", "a\x00b", "🎉👩‍👩‍👧 é e\u0301",
                                  "x  \n\n   y\t\n ", "one <|endoftext|> two", "\x1c\x85\u2028\u3000",
                                  *map(random_text, range(5))])
def test_byte_pairs_come_back_as_they_were(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_byte_pairs_are_exactly_as_many_as_asked_for(bpe):
    assert bpe.size == 300
    assert bpe.decode([bpe.start]) == "<|endoftext|>"


@pytest.mark.parametrize("seed", range(3))
def test_a_file_in_pieces_has_the_byte_pairs_of_the_whole(tmp_path, bpe, seed):
    rng = random.Random(seed)
    text = "".join(random_text(rng.random(), 50) + " " * rng.randrange(9) + "\n" * rng.randrange(4)
                   + "\t" * rng.randrange(3) for _ in range(1200))
    assert len(list(vocab.pieces(written(tmp_path, text)))) > 4
    assert ids_of_file(bpe, written(tmp_path, text)) == bpe.encode(text)


def test_byte_pairs_are_learnt_alike_by_every_process_and_number_of_threads(tmp_path, bpe):
    path = written(tmp_path, random_text(0, 20_000))
    program = f"from txl.vocab import *; print(BpeVocab.train([{str(path)!r}], 300).hash)"
    for parallel in ("true", "false"):
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                                env=os.environ | {"TOKENIZERS_PARALLELISM": parallel, "PYTHONPATH": os.getcwd()})
        assert result.stdout.strip() == bpe.hash


def test_too_short_a_text_for_so_many_byte_pairs_is_an_error(tmp_path):
    path = written(tmp_path, "abc abc abc\n")
    with pytest.raises(DataError, match=r"too short for 4096 .* after 2\d\d .*--set recipe.data.n_token=2\d\d"):
        BpeVocab.train([path], 4096)
    with pytest.raises(DataError, match="at least 257"):
        BpeVocab.train([path], 256)


def test_gpt2s_files_give_the_ids_of_the_vocabulary_they_describe(tmp_path, bpe):
    bpe._tokenizer.model.save(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    loaded, text = BpeVocab.from_files(tmp_path), random_text(7)
    assert (loaded.size, loaded.start) == (bpe.size, bpe.start)
    assert loaded.encode(text) == bpe.encode(text)
    (tmp_path / "vocab.bpe").write_text("nonsense\n")
    with pytest.raises(DataError, match="--dataset=gpt2"):
        BpeVocab.from_files(tmp_path)


def test_a_saved_vocabulary_is_the_same_when_loaded(tmp_path, bpe):
    path = written(tmp_path, random_text(1))
    for v in (WordVocab.count([path], lower_case=True, min_freq=2), CharVocab.count([path], min_freq=2),
              ByteVocab.make(), bpe):
        v.save(tmp_path)
        loaded = vocab.load(tmp_path)
        assert loaded == v
        assert ids_of_file(loaded, path) == ids_of_file(v, path)
        assert loaded.decode(loaded.encode("the 日本")) == v.decode(v.encode("the 日本"))


def test_equal_hashes_mean_equal_vocabularies(tmp_path, bpe):
    same, other = (WordVocab.count([written(tmp_path, text)]).hash for text in ("a b\n", "a a b\n"))
    assert same == other                                  # the words and their order are what matters
    assert len({same, WordVocab.count([written(tmp_path, "b a\n")]).hash, ByteVocab.make().hash, bpe.hash}) == 4


def test_text_that_is_not_utf8_is_an_error_with_its_place(tmp_path, bpe):
    path = written_bytes(tmp_path, "é one\ntwo\nthr".encode() + b"\xff\n")
    for encode in (lambda: WordVocab.count([path]), lambda: list(bpe.encode_file(path))):
        with pytest.raises(DataError, match=r"not UTF-8 at byte 14 \(line 3\)"):
            encode()
