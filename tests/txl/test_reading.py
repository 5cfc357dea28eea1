"""Texts read by several processes: the same words, and no process left behind."""
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.txl.test_words import random_text
from txl import reading, words
from txl.vocab import DataError, WordVocab

ROOT = Path(reading.__file__).parent.parent
PROGRAM = """
import sys
from pathlib import Path
from txl import reading, words
from txl.vocab import WordVocab
reading.SMALL, reading.RANGE, reading._cores = 1000, 100_000, lambda: 2
"""


@pytest.fixture
def processes(monkeypatch):
    """As if there were three cores, and little text much."""
    monkeypatch.setattr(reading, "SMALL", 1000)
    monkeypatch.setattr(reading, "RANGE", 10_000)
    monkeypatch.setattr(reading, "_cores", lambda: 3)


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def prepared(paths: list[Path], **options) -> tuple[str, list[list[int]]]:
    vocab = WordVocab.count(paths, **options)
    return vocab.content(), [[i for ids in vocab.encode_file(path) for i in ids.tolist()] for path in paths]


@pytest.mark.parametrize("options", [{}, {"lower_case": True, "min_freq": 3}, {"max_size": 50}])
def test_several_processes_read_the_words_that_one_does(tmp_path, request, options):
    paths = [written(tmp_path / str(count), random_text(count, count)) for count in (30_000, 5, 9000)]
    alone = prepared(paths, **options)
    request.getfixturevalue("processes")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    assert len(list(reading.read(paths, scratch, lower_case=False))) > 20
    assert prepared(paths, **options) == alone


@pytest.mark.parametrize("min_freq", [0, 3])
def test_in_whichever_range_a_word_is_first_or_often_it_has_the_number_that_it_has_in_the_whole(
        tmp_path, processes, monkeypatch, min_freq):
    """Most are as often as thousands of others; there are blocks without a word, a word that is a line's end, and with
    min_freq a word left out that only the last range has."""
    monkeypatch.setattr(words, "BLOCK", 1 << 10)
    names = [f"{'long' * (i % 5)}{i}\x00é"[:-1 - i % 2] for i in range(3000)]
    lines = [*names, " " * 5000, *reversed(names), "\n" * 5000, "<eos>", *names[1000:2000], "late", "late", "<eos>"]
    path = written(tmp_path / "text", "\n".join(lines))
    tokens = [word for line in path.read_text().split("\n") for word in [*line.split(), "<eos>"]]
    frequent = [(word, n) for word, n in Counter(tokens).most_common() if n >= min_freq and word != "<eos>"]
    symbols = ["<eos>", *(["<unk>"] if min_freq else []), *(word for word, _ in frequent)]
    table = {word: i for i, word in enumerate(symbols)}
    v = WordVocab.count([path], min_freq=min_freq, scratch=tmp_path)
    assert len(list(tmp_path.glob("*.table"))) > 3
    assert v.content().split("\n") == symbols
    assert [i for ids in v.encode_file(path, tmp_path) for i in ids.tolist()] == [table.get(word, 1) for word in tokens]


def test_what_has_been_read_is_not_read_again(tmp_path, processes, monkeypatch):
    path = written(tmp_path / "text", random_text(0))
    v = WordVocab.count([path], scratch=tmp_path)
    monkeypatch.setattr(reading, "_by_processes", lambda *_: pytest.fail("read again"))
    ids = [i for ids in v.encode_file(path, tmp_path) for i in ids.tolist()]
    monkeypatch.undo()
    assert ids == [i for ids in v.encode_file(path) for i in ids.tolist()]


def test_a_problem_of_a_process_is_told_as_if_it_were_this_ones(tmp_path, processes):
    path = tmp_path / "text"
    path.write_bytes(b"one\n" * 9000 + b"tw\xff\n" + b"one\n" * 9000)
    with pytest.raises(DataError, match=r"text is not UTF-8 at byte 36002 \(line 9001\)"):
        WordVocab.count([path])
    with pytest.raises(FileNotFoundError):
        list(reading.read([written(path, "one\n" * 9000)], tmp_path / "nowhere", lower_case=False))


def test_no_process_writes_on_once_a_problem_is_told(tmp_path, processes, monkeypatch):
    """Even while the error, and with it the frames that it came through, is still at hand."""
    path = written(tmp_path / "text", "one\n" * 9000)
    path.write_bytes(path.read_bytes() + b"tw\xff\n" + random_text(0).encode())
    started: list[subprocess.Popen] = []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    with pytest.raises(DataError) as told:
        list(reading.read([path], tmp_path, lower_case=False))
    assert told.tb is not None
    assert len(started) == 2
    assert None not in [process.returncode for process in started]


def test_a_process_that_is_killed_is_an_error_with_what_to_do(tmp_path, processes, monkeypatch):
    monkeypatch.setattr(reading, "PROGRAM", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(DataError, match=r"text ended with status -9, .*Run the same command again"):
        WordVocab.count([written(tmp_path / "text", random_text(0))])


def test_a_program_without_a_main_guard_may_read(tmp_path):
    """From standard input, too, which no other process could run again."""
    path = written(tmp_path / "text", random_text(0, 20_000))
    program = f"{PROGRAM}\nprint(WordVocab.count([Path({str(path)!r})]).hash)"
    result = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert (result.stdout.strip(), result.stderr) == (WordVocab.count([path]).hash, "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_processes_end_with_the_one_that_began_them(tmp_path, number, status):
    path = written(tmp_path / "text", random_text(0, 200_000))
    program = PROGRAM + f"""
reading.PROGRAM = "import os, sys; print(os.getpid(), file=sys.stderr, flush=True);" + reading.PROGRAM
try:
    while True:
        WordVocab.count([Path({str(path)!r})])
except KeyboardInterrupt:
    sys.exit(130)
"""
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        first = parent.stderr.readline()
        parent.send_signal(number)
        rest = parent.communicate(timeout=300)[1]          # to its end, which comes when no process holds it any more
        assert parent.returncode == status
    assert all(line.isdigit() for line in [first.strip(), *rest.split()])       # and none had anything to complain of
