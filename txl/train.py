"""Train the Transformer-XL of a recipe. The launcher writes the recipe and starts this once per rank:

    torchrun --nproc-per-node=8 -m txl.train runs/NAME/recipe.json

One process alone is a world of one: python -m txl.train runs/NAME/recipe.json
Everything is written to the recipe's folder (docs/design.md); the same command again goes on from the last checkpoint.
"""
from __future__ import annotations

import gc
import platform
import sys
from collections.abc import Callable
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from engine.checkpoint import CheckpointError
from engine.loop import Diverged, train
from engine.metrics import MetricsError
from engine.run import Run
from engine.values import BadValue
from engine.world import World, leave, world
from txl import options
from txl.config import Data
from txl.data import Corpus, DataError, load, with_eval_sets
from txl.task import TransformerXLTask, read_recipe


def main(argv: list[str], saved: Callable[[Path], None] = lambda path: None) -> int:
    """`saved`: told of each checkpoint's folder (engine.run.Run)."""
    if len(argv) != 1 or argv[0].startswith("-"):
        known = [f"{word} is {said}" for word in argv if (said := options.advice(_flag(word)))]
        print("\n".join(known) or __doc__, file=sys.stderr)
        return 2
    path = Path(argv[0])
    try:
        recipe = read_recipe(path)
    except BadValue as error:
        print(error, file=sys.stderr)
        return 1
    with world() as w:
        run = Run(path.parent, w, saved)
        try:
            corpus = same_corpus(w, recipe.data)
            run.listen()                           # only now: what came before may be cut off at any moment
            train(w, TransformerXLTask(recipe, corpus), recipe, run)
        except (BadValue, DataError, CheckpointError, Diverged, MetricsError) as error:
            run.fail(error)                        # what went wrong is known, and its message is for a person
            return 1
        except BaseException as error:
            run.fail(error, traceback=True)
            raise
    return 0


def same_corpus(w: World, data: Data) -> Corpus:
    """The tokens, which each machine finds or prepares for itself, and which are the same on all. Collective.

    Raises DataError on every rank where one of them cannot have the tokens, and where they differ.
    """
    corpus: Corpus | DataError
    try:
        # every rank asks; a lock lets the first do it and the others find it
        corpus = with_eval_sets(load(data), data)
    except DataError as error:
        corpus = error
    problems = w.gather(str(corpus) if isinstance(corpus, DataError) else "")
    if isinstance(corpus, DataError) or any(problems):
        raise DataError(problems[0] if len(set(problems)) == 1 else _by_machine(w, problems))
    fingerprints = w.gather(corpus.fingerprint)
    if len(set(fingerprints)) > 1:
        raise DataError(f"The machines have different tokens of {data.dir}. {_by_machine(w, fingerprints)}. Copy that "
                        f"folder from one of them to the others, then the same command again")
    return corpus


def _flag(word: str) -> str:
    """batch_chunk of --batch-chunk=4."""
    return word.lstrip("-").partition("=")[0].replace("-", "_")


def _by_machine(w: World, said: list[str]) -> str:
    """What ranks say, with their machines' names; nothing of those that are silent. Collective."""
    ranks: dict[tuple[str, str], list[str]] = {}
    for rank, (machine, what) in enumerate(zip(w.gather(platform.node()), said)):
        ranks.setdefault((machine, what), []).append(str(rank))
    return "; ".join(f"rank(s) {', '.join(numbers)} on {machine}: {what}"
                     for (machine, what), numbers in ranks.items() if what)


if __name__ == "__main__":
    gc.freeze()                                   # imports are no garbage; looking through them takes .1 s each time
    leave(record(main)(sys.argv[1:]) or 0)
