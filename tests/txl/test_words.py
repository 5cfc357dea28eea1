"""Words as numbers against a dict and str.split."""
import io
import random
import sys

import pytest

from txl import words
from txl.words import Range

SPACES = [chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace()]
ALPHABET = ["a", "B", "é", "\u2013", "日", "\x00", "🎉", "Σ", "\u200b", "\u2060", "\ufeff", "\x80"]


def random_text(seed: int, count: int = 3000) -> str:
    """Words of up to 40 bytes, most of them often; one space in three is another than a plain one."""
    rng = random.Random(seed)
    kinds = ["".join(rng.choices(ALPHABET, k=rng.randrange(1, 15))) for _ in range(200)]
    kinds += ["x" * n for n in range(1, 40)] + ["x" * 14 + "\x00", "x\x00", "x" * 7 + "y", "<eos>"]
    return "".join(rng.choice(kinds) + rng.choice([" ", " ", "".join(rng.choices(SPACES, k=rng.randrange(1, 4)))])
                   for _ in range(count))


@pytest.mark.parametrize("lower_case", [False, True])
@pytest.mark.parametrize("places", [1, 64, 1 << 19])
def test_words_are_those_of_split_numbered_as_they_first_come(tmp_path, monkeypatch, places, lower_case):
    """Also where many words share a place, and where a text is read in many steps."""
    monkeypatch.setattr(words, "PLACES", places)
    monkeypatch.setattr(words, "BLOCK", 1 << 12)
    text = random_text(places)
    (tmp_path / "text").write_bytes(text.encode())
    part = Range(tmp_path / "text", 0, (tmp_path / "text").stat().st_size, str(tmp_path / "part"))
    words.read(part, lower_case)
    expected: dict[str, int] = {"\n": 0}
    lines = io.StringIO(text, newline=None).read().split("\n")
    found = [word for i, line in enumerate(lines) for word in ["\n"] * (i > 0) + (line.lower() if lower_case else
                                                                                  line).split()]
    assert [i for ids in part.ids(100) for i in ids.tolist()] == [
        expected.setdefault(word, len(expected)) for word in found]
    assert part.words() == list(expected)


@pytest.mark.parametrize("text", [b"", b"\n", b"a", b" ", b"a\n", b"\r\n\r\n", b"\xc2\xa0", b"aaaaaaaaaaaaaaaaaaaaaa"])
def test_a_text_of_almost_nothing_has_its_words(tmp_path, text):
    (tmp_path / "text").write_bytes(text)
    part = Range(tmp_path / "text", 0, len(text), str(tmp_path / "part"))
    words.read(part, lower_case=False)
    assert part.words()[1:] == text.decode().split()
    assert sum(len(ids) for ids in part.ids(9)) == len(text.decode().split()) + text.count(b"\n")


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_text_is_cut_behind_spaces_and_newlines_into_all_of_it(step):
    text = random_text(step).encode()
    cuts = list(words.edges(io.BytesIO(text), 0, len(text), step))
    assert cuts == sorted(set(cuts))
    assert cuts[-1] == len(text)
    assert len(cuts) > len(text) / (step + 200)
    assert all(text[cut - 1:cut] in (b" ", b"\n") for cut in cuts[:-1])
    assert list(words.edges(io.BytesIO(b"x" * 10_000), 0, 10_000, 10)) == [10_000]
