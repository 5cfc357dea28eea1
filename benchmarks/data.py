"""Megabytes per second from a text to the files of its tokens, and seconds from there to the first step of training.

    python -m benchmarks.data
    python -m benchmarks.data --config=nvidia_large
    python -m benchmarks.data --path=data/wikitext-103/train.txt --record
    python -m benchmarks.data --against=../transformer-xl

Tokens are words: counted, numbered by frequency, encoded, and on the disk. Each round is a process of its own, whose
imports do not count. Without --path the text is made: words that look like nothing, as frequent as those of natural
text, in lines as long as wikitext-103's. It needs Linux.

The start is that of --config on one rank, from torch imported to where the first step begins (benchmarks/start.py), at
the config's own size: its tokens are of a text that has as many different words as the config expects.

--against runs a checkout of a peer on the same text, in turn with ours: kimiyoung's, cybertronai's or NVIDIA's. It
counts and encodes; writing its cache is not timed. --record adds a row to benchmarks/data.md.
"""
from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast
from unittest.mock import MagicMock

import numpy as np

from benchmarks.tables import dated, named, show
from engine.cli import flag, misuse, parse
from engine.values import BadValue, to_json
from txl.config import Data, Recipe
from txl.data import load, prepare

HERE = Path(__file__).parent
TABLE = HERE / "data.md"
LETTERS = "etaoinshrdlucmfwygpbvkxqjz"
HEADING = ("| date | commit | command | text | MB/s | range | MB per CPU second | peak MB | first batch s | "
           "first step s | against | machine |")


@dataclass(frozen=True)
class Flags:
    path: str | None = flag("a text in UTF-8, rather than one that is made", default=None)
    mb: int = flag("the size of the text that is made", default=100)
    config: str = flag("whose start is timed: a name of configs.py or benchmarks/races.py", default="nvidia_base")
    rounds: int = flag("the median counts", default=5)
    against: str | None = flag("a checkout of a peer", default=None)
    record: bool = flag("add the row to benchmarks/data.md", default=False)


@dataclass(frozen=True)
class Round:
    seconds: float
    cpu: float                                    # seconds, of all processes
    peaks_mb: tuple[float, float]                 # of the process, and of the largest that it started
    ids: str                                      # SHA-256 of the tokens


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m benchmarks.data", about=__doc__ or "")
    if min(flags.rounds, flags.mb) < 1:
        misuse("--rounds and --mb must be at least 1")
    from benchmarks import peers  # these import torch, which is not to count in a round's memory
    from engine.run import processor
    try:
        peer = peers.find(flags.against).name if flags.against is not None else None
        recipe = cast(Recipe, named(flags.config).recipe)
    except BadValue as error:
        misuse(str(error))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mb = lay_out(folder, flags) / 1e6
        rounds, others = [], []
        for _ in range(flags.rounds):
            rounds.append(Round(**_apart("ours", folder)))
            if flags.against is not None:
                others.append(Round(**_apart("theirs", folder, flags.against)))
        words = load(prepare(Data("text", temporary))).n_token
        to_batch = statistics.median(_apart("first_batch", folder) for _ in range(flags.rounds))
        starts = time_starts(folder, recipe, flags.rounds)
    rates = sorted(mb / x.seconds for x in rounds)
    said = "-"
    if others:
        ratios = sorted(other.seconds / own.seconds for own, other in zip(rounds, others))
        said = (f"{peer}: {statistics.median(mb / x.seconds for x in others):.1f} MB/s; "
                f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f}) times as fast; "
                f"its ids are {'the same' if {x.ids for x in [*rounds, *others]} == {rounds[0].ids} else 'OTHERS'}")
    command = " ".join(f"--{name}={x}" for name, x in [("path", flags.path), ("mb", flags.mb), ("config", flags.config),
                                                       ("rounds", flags.rounds), ("against", peer)] if x is not None)
    peaks = [max(peak) for peak in zip(*(x.peaks_mb for x in rounds))]
    measured = dated(
        f"`{command}` | {mb:.0f} MB, {words:,} words | "
        f"{statistics.median(rates):.1f} | {rates[0]:.1f} to {rates[-1]:.1f} | "
        f"{statistics.median(mb / x.cpu for x in rounds):.1f} | {peaks[0]:.0f}, its processes {peaks[1]:.0f} | "
        f"{to_batch:.2f} | {_of_starts(starts)} | {said} | {len(os.sched_getaffinity(0))} x {processor()}, "
        f"torch {version('torch')}")
    show(HEADING, [measured], TABLE if flags.record else None)
    return 0


def lay_out(folder: Path, flags: Flags) -> int:
    """Makes the folder a data set of the text, which is also read as valid and test: they hold its first line, so
    that no word is unknown. The bytes of all three."""
    train = folder / "train.txt"
    if flags.path is None:
        write_text(train, flags.mb * 10 ** 6)
    else:
        train.symlink_to(Path(flags.path).absolute())
    with open(train, "rb") as f:
        line = next((line for line in f if line.strip()), b"\n")
    for split in ("valid", "test"):
        (folder / f"{split}.txt").write_bytes(line)
    return train.stat().st_size + 2 * len(line)


def write_text(path: Path, size: int, n_word: int = 300_000) -> None:
    """Always the same text, of at least so many bytes.

    The i-th word is as frequent as 1/i up to 8,000, then as 1/i^1.65: the two regimes of natural text (Ferrer i Cancho
    and Solé, 2001), which give the words beyond the first 20,000 the 7 % of tokens that they are in wikitext-103.
    """
    generator, rank = np.random.default_rng(0), np.arange(1, n_word + 1)
    words = np.array(_words(generator, n_word), dtype=object)
    share = (1 / (rank + 1.7) * np.minimum(1, 8000 / rank) ** .65).cumsum()
    with open(path, "wb") as out:
        while out.tell() < size:
            chosen = words[np.searchsorted(share, generator.random(1 << 16) * share[-1])].tolist()
            ends = generator.integers(5, 220, 1000).cumsum()
            lines = (" ".join(chosen[first:last]) for first, last in zip([0, *ends], ends[ends < len(chosen)]))
            out.write("".join(f" {line} \n \n" for line in lines).encode())


def time_starts(folder: Path, recipe: Recipe, rounds: int) -> list[dict[str, list[float]]]:
    """What benchmarks/start.py says of each. `folder` is lay_out's."""
    data, run = text_for(recipe, folder), folder / "run"
    prepare(data)
    starts = []
    for _ in range(rounds):
        shutil.rmtree(run, ignore_errors=True)
        run.mkdir()
        (run / "recipe.json").write_text(json.dumps(to_json(replace(recipe, data=data))))
        result = subprocess.run([sys.executable, "-m", "benchmarks.start", str(run / "recipe.json")], check=True,
                                stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
        starts.append(json.loads(result.stdout.splitlines()[-1]))
    return starts


def text_for(recipe: Recipe, folder: Path) -> Data:
    """A data set for a recipe: lay_out's, or a text of as many different words as its vocabulary must have, which is
    long enough for a step."""
    data = replace(recipe.data, dataset="text", dir=str(folder), word_list=None, eval_sets=())
    if data.vocab != "word" or data.n_token is None:
        return data
    words = _words(np.random.default_rng(0), data.n_token - 1)       # and the end of a line
    lines = [" ".join(words[i:i + 50]) + "\n" for i in range(0, len(words), 50)]
    times = -(-recipe.batch.total(1) * recipe.context.tgt_len // len(words))
    (folder / "sized").mkdir()
    for split, text in (("train", times * lines), ("valid", lines[:1]), ("test", lines[:1])):
        (folder / "sized" / f"{split}.txt").write_text("".join(text))
    return replace(data, dir=str(folder / "sized"))


def ours(folder: Path) -> dict[str, Any]:
    begin = _clocks()
    made = prepare(Data("text", str(folder)))
    end = _since(begin)
    ids = load(made).splits["train"]
    shutil.rmtree(folder / "tokens")
    return end | {"ids": _digest(ids)}


def theirs(folder: Path, checkout: str) -> dict[str, Any]:
    """As a peer's Corpus does for wikitext-103, of which it counts the text to train on."""
    from benchmarks import peers
    for name in peers.ABSENT:
        sys.modules.setdefault(name, MagicMock())
    sys.path[:0] = [str(peers.find(checkout).folder)]
    vocab = importlib.import_module("utils.vocabulary").Vocab(special=["<eos>"], lower_case=False)
    begin = _clocks()
    vocab.count_file(str(folder / "train.txt"))
    vocab.build_vocab()
    ids = [vocab.encode_file(str(folder / f"{split}.txt"), ordered=True) for split in ("train", "valid", "test")]
    return _since(begin) | {"ids": _digest(ids[0].numpy())}


def first_batch(folder: Path) -> float:
    """Seconds to a batch of NVIDIA's base recipe on tokens that are there, in this process, once it has torch."""
    import torch
    begin = time.perf_counter()
    from configs import CONFIGS
    from engine.task import Position
    from engine.world import World
    from txl.task import TransformerXLTask
    recipe: Any = CONFIGS["nvidia_base"].recipe
    task = TransformerXLTask(recipe, load(Data("text", str(folder))))
    next(task.steps(World(0, 0, 1, torch.device("cpu")), Position()))
    return time.perf_counter() - begin


def _apart(function: str, folder: Path, *arguments: str) -> Any:
    """What a function of this file returns in a process of its own."""
    program = ("import json, sys; from pathlib import Path; from benchmarks import data; "
               "print(json.dumps(getattr(data, sys.argv[1])(Path(sys.argv[2]), *sys.argv[3:])))")
    result = subprocess.run([sys.executable, "-c", program, function, str(folder), *arguments], stdout=subprocess.PIPE,
                            text=True, check=True, cwd=HERE.parent)
    return json.loads(result.stdout.splitlines()[-1])


def _of_starts(starts: list[dict[str, list[float]]]) -> str:
    """Medians: the whole, with the processor's seconds, and its parts."""
    wall, cpu = (statistics.median(sum(x[i] for x in start.values()) for start in starts) for i in range(2))
    parts = [f"{name} {statistics.median(start[name][0] for start in starts):.2f}" for name in starts[0]]
    return f"{wall:.2f} ({cpu:.2f} of a processor): {' + '.join(parts)}"


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), sum(os.times()[:4])


def _since(begin: tuple[float, float]) -> dict[str, Any]:
    wall, cpu = _clocks()
    # not ru_maxrss of this process, which is no less than that of the one that started it
    own = int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])
    peaks = [kib * 1024 / 1e6 for kib in (own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)]
    return {"seconds": wall - begin[0], "cpu": cpu - begin[1], "peaks_mb": peaks}


def _digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype(np.int32).tobytes()).hexdigest()


def _words(generator: np.random.Generator, count: int) -> list[str]:
    """So many words, the rarer the longer, one in forty with a letter beyond ASCII; some are punctuation."""
    lengths = generator.normal(1.5 + 1.15 * np.log10(np.arange(1, count + 1)), 1.2).clip(1, 18).round().astype(int)
    shares = 1 / np.arange(3, 29)
    letters = generator.choice(list(LETTERS), lengths.sum(), p=shares / shares.sum())
    ends = lengths.cumsum().tolist()
    spelt = "".join(letters)
    words: dict[str, None] = dict.fromkeys([",", ".", "\u2013", "@-@", "="])
    for i, (first, last) in enumerate(zip([0, *ends], ends)):
        word = spelt[first:last] + "\u00e9" * (i % 40 == 39)
        while word in words:
            word += LETTERS[i % len(LETTERS)]
        words[word] = None
    return list(words)[:count]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
