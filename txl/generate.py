"""Sample text from a run; the memory carries what was read and written, so a token costs the same however long it gets.

    python -m txl.generate --run=runs/demo --prompt="def main(" --length=200 --temperature=0.8
    python -m txl.generate --run=runs/demo --prompt="def main(" --top_p=0.9 --stop=return --batch=4
    python -m txl.generate --run=runs/demo --prompts=prompts.txt --top_k=40
    python -m txl.generate --run=runs/demo --prompt="def main(" --beams=6 --groups=3 --diversity=0.5

A single sample appears as it is written. The same seed writes the same, and each prompt of a file what it would alone.
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import CheckpointError
from engine.cli import flag, misuse, parse
from engine.values import BadValue
from engine.world import world
from txl import options
from txl.config import Context
from txl.data import DataError
from txl.memory import Memory, joined, of_rows
from txl.search import beam_search, chances
from txl.text import TextStream, ends_in
from txl.trained import Trained, precision_of, restore


@dataclass(frozen=True)
class Flags:
    run: str = flag("folder of the run, or of one of its checkpoints; of a run the best is taken")
    prompt: str | None = flag("the text to go on from; the start of a text unless given", default=None)
    prompts: str | None = flag("a file of prompts, one a line, all gone on from at once", default=None)
    length: int = flag("tokens to write", default=200)
    stop: tuple[str, ...] = flag("where the text ends, before this; may be given several times", default=())
    temperature: float = flag("below 1 bolder words get rarer; 0 always takes the likeliest", default=0.8)
    top_k: int | None = flag("draw only from so many of the likeliest tokens", default=None)
    top_p: float = flag("draw only from the fewest likeliest tokens that have this probability", default=1.0)
    seed: int = flag("another seed, another text", default=0)
    batch: int = flag("texts to write from each prompt", default=1)
    beams: int | None = flag("rather than draw, search for the likeliest text with so many beams", default=None)
    groups: int = flag("groups of beams that avoid each other's tokens", default=1)
    diversity: float = flag("log-probability that a token loses per beam of an earlier group with it", default=0.5)


class Rows:
    """Texts that the model has read, side by side, and what may follow each."""

    @torch.no_grad()
    def __init__(self, trained: Trained, prompts: list[list[int]]):
        self.net, context = trained.net, trained.recipe.eval_context
        self.context = Context(1, context.mem_len + context.tgt_len // 2, clamp_len=context.clamp_len)
        read = [self._read([trained.corpus.vocab.start, *prompt], context.tgt_len) for prompt in prompts]
        self.log_prob_BV = torch.cat([log_prob_1V for log_prob_1V, _ in read])
        self.memory = joined([memory for _, memory in read])

    @torch.no_grad()
    def advance(self, rows: list[int], tokens: list[int]) -> Tensor:
        """`rows` go on, with these tokens; log p of what follows, [B, V]. A search.Advance."""
        if rows != list(range(len(self.log_prob_BV))):
            self.memory = of_rows(self.memory, rows)
        self.log_prob_BV, self.memory = self._step([[token] for token in tokens], self.memory)
        return self.log_prob_BV

    def _read(self, tokens: list[int], tgt_len: int) -> tuple[Tensor, Memory]:
        """A text alone: read with others, its segments would not be those that it has by itself."""
        memory = self.net.reading(1, self.context)
        for first in range(0, len(tokens), tgt_len):
            log_prob_1V, memory = self._step([tokens[first:first + tgt_len]], memory)
        return log_prob_1V, memory

    def _step(self, tokens: list[list[int]], memory: Memory) -> tuple[Tensor, Memory]:
        """One token at a time sees what a whole segment would: memory and, on average, half of the segment."""
        device = next(self.net.parameters()).device
        hidden_BQD, memory = self.net.hidden(torch.tensor(tokens, device=device), memory, self.context)
        return self.net.vocabulary.log_prob(hidden_BQD[:, -1]), memory


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m txl.generate", about=__doc__, advice=options.advice)
    _check(flags)
    with world() as w:
        try:
            trained = restore(Path(flags.run), w)
            prompts = [trained.corpus.vocab.encode(line) for line in _lines(flags)]
        except (BadValue, DataError, CheckpointError) as error:
            print(error, file=sys.stderr)
            return 1
        with precision_of(trained, w).autocast():
            _write(trained, prompts, flags)
    return 0


def sample(trained: Trained, prompts: list[list[int]], flags: Flags) -> Iterator[tuple[int, str]]:
    """Text as it becomes certain, with its row: each prompt has `batch` rows, one after the other.

    The i-th row of every prompt draws by the seed plus i, so what it draws does not depend on its neighbours.
    """
    vocab = trained.corpus.vocab
    own = [prompt for prompt in prompts for _ in range(flags.batch)]
    streams = [TextStream(vocab, prompt[-1] if prompt else None, flags.stop) for prompt in own]
    generators = [torch.Generator().manual_seed(flags.seed + i) for _ in prompts for i in range(flags.batch)]
    texts = Rows(trained, prompts)
    log_prob_BV = texts.log_prob_BV.repeat_interleave(flags.batch, 0)
    present = [i for i in range(len(prompts)) for _ in range(flags.batch)]          # where each row is among the texts
    alive = list(range(len(own)))
    for written in range(flags.length):
        p_BV = chances(log_prob_BV, flags.temperature, flags.top_k, flags.top_p).cpu()
        tokens = [int(torch.multinomial(p_V, 1, generator=generators[i])) for i, p_V in zip(alive, p_BV)]
        for i, token in zip(alive, tokens):
            yield i, streams[i].feed(token)
        going = [at for at, i in enumerate(alive) if not streams[i].stopped]
        alive = [alive[at] for at in going]
        if not alive or written + 1 == flags.length:
            break
        log_prob_BV = texts.advance([present[at] for at in going], [tokens[at] for at in going])
        present = list(range(len(going)))
    for i, stream in enumerate(streams):
        yield i, stream.close()


def _check(flags: Flags) -> None:
    if flags.temperature < 0 or flags.length < 1:
        misuse("--temperature must not be negative, and --length at least 1")
    if (flags.top_k is not None and flags.top_k < 1) or not 0 < flags.top_p <= 1 or flags.batch < 1:
        misuse("--top_k and --batch must be at least 1, and --top_p above 0 and at most 1")
    if flags.prompt is not None and flags.prompts is not None:
        misuse("--prompt and --prompts exclude each other. Give one of them")
    if flags.beams is None and flags.groups != 1:
        misuse("--groups are groups of beams: give --beams too")
    if flags.beams is not None:
        if flags.top_k is not None or flags.top_p != 1 or flags.batch != 1:
            misuse("--beams search, they do not draw: leave out --top_k, --top_p and --batch")
        if flags.beams < 1 or flags.groups < 1 or flags.beams % flags.groups or flags.diversity < 0:
            misuse("--beams and --groups must be at least 1, --groups divide --beams, --diversity not be negative")


def _lines(flags: Flags) -> list[str]:
    """The prompts. Raises BadValue."""
    if flags.prompts is None:
        return [flags.prompt or ""]
    try:
        lines = Path(flags.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"{flags.prompts} cannot be read ({error}). --prompts takes a file, a prompt a line") from error
    if not lines:
        raise BadValue(f"{flags.prompts} is empty. --prompts takes a file, a prompt a line")
    return lines


def _write(trained: Trained, prompts: list[list[int]], flags: Flags) -> None:
    if flags.beams is not None:
        _print_beams(trained, prompts, flags, flags.beams)
    elif len(prompts) * flags.batch == 1:
        print(trained.corpus.vocab.decode(prompts[0]), end="", flush=True)
        for _, text in sample(trained, prompts, flags):
            print(text, end="", flush=True)
        print()
    else:
        _print_samples(trained, prompts, flags)


def _print_samples(trained: Trained, prompts: list[list[int]], flags: Flags) -> None:
    written = [trained.corpus.vocab.decode(prompt) for prompt in prompts for _ in range(flags.batch)]
    for row, text in sample(trained, prompts, flags):
        written[row] += text
    for row, text in enumerate(written):
        print(f"=== prompt {row // flags.batch + 1}, sample {row % flags.batch + 1} ===\n{text}\n")


def _print_beams(trained: Trained, prompts: list[list[int]], flags: Flags, beams: int) -> None:
    vocab = trained.corpus.vocab
    for number, prompt in enumerate(prompts, start=1):
        after, texts = prompt[-1] if prompt else None, Rows(trained, [prompt])
        found = beam_search(texts.log_prob_BV, texts.advance, beams, flags.length, groups=flags.groups,
                            diversity=flags.diversity,
                            ended=partial(ends_in, flags.stop, vocab, after))
        for group, members in enumerate(found, start=1):
            for beam in members:
                stream = TextStream(vocab, after, flags.stop)
                text = "".join(map(stream.feed, beam.tokens)) + stream.close()
                print(f"=== prompt {number}, group {group}, log p {beam.score:.2f} ===\n{vocab.decode(prompt)}{text}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
