"""Sample text from a run; the memory carries what was read and written, so a token costs the same however long it gets.

    python -m txl.generate --run=runs/demo --prompt="def main(" --length=200 --temperature=0.8
"""
from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import checkpoint
from engine.cli import flag, misuse, parse
from engine.values import BadValue
from engine.world import world
from txl.config import Context
from txl.data import DataError
from txl.model import Memory
from txl.trained import Trained, restore


@dataclass(frozen=True)
class Flags:
    run: str = flag("folder of the run, or of one of its checkpoints; of a run the best is taken")
    prompt: str | None = flag("the text to go on from; the start of a text unless given", default=None)
    length: int = flag("tokens to write", default=200)
    temperature: float = flag("below 1 bolder words get rarer; 0 always takes the likeliest", default=0.8)
    seed: int = flag("another seed, another text", default=0)


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m txl.generate", about=__doc__)
    if flags.temperature < 0 or flags.length < 1:
        misuse("--temperature must not be negative, and --length at least 1")
    with world() as w:
        try:
            trained = restore(Path(flags.run), w)
            vocab = trained.corpus.vocab
            prompt = vocab.encode(flags.prompt) if flags.prompt else []
        except (BadValue, DataError, checkpoint.CheckpointError) as error:
            print(error, file=sys.stderr)
            return 1
        torch.manual_seed(flags.seed)
        written = list(sample(trained, prompt, flags.length, flags.temperature))
        print(vocab.decode([*prompt, *written]))
    return 0


@torch.no_grad()
def sample(trained: Trained, prompt: list[int], length: int, temperature: float) -> Iterator[int]:
    """`length` tokens after the prompt, drawn by p ** (1 / temperature)."""
    device = next(trained.net.parameters()).device
    memory: Memory | None = None
    context = trained.recipe.eval_context
    unread = [trained.corpus.vocab.start, *prompt]
    for _ in range(length):
        for first in range(0, len(unread), context.tgt_len):
            tokens_BQ = torch.tensor([unread[first:first + context.tgt_len]], device=device)
            hidden_BQD, memory = trained.net.hidden(tokens_BQ, memory, _reading(context))
        log_prob_V = trained.net.vocabulary.log_prob(hidden_BQD[:, -1])[0]
        if temperature == 0:
            token = int(log_prob_V.argmax())
        else:
            token = int(torch.multinomial((log_prob_V / temperature).softmax(0), 1))
        yield token
        unread = [token]


def _reading(context: Context) -> Context:
    """One token at a time sees what a whole segment would: memory and, on average, half of the segment."""
    return Context(tgt_len=1, mem_len=context.mem_len + context.tgt_len // 2, clamp_len=context.clamp_len)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
