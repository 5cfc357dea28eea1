"""Train the Transformer-XL of a recipe. The launcher writes the recipe and starts this once per rank:

    torchrun --nproc-per-node=8 -m txl.train runs/NAME/recipe.json

One process alone is a world of one: python -m txl.train runs/NAME/recipe.json
Everything is written to the recipe's folder (docs/design.md); the same command again goes on from the last checkpoint.
"""
from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from engine.checkpoint import CheckpointError
from engine.loop import Diverged, train
from engine.run import Run
from engine.values import BadValue
from engine.world import world
from txl.data import DataError, load
from txl.task import TransformerXLTask, read_recipe


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(argv[0])
    try:
        recipe = read_recipe(path)
    except BadValue as error:
        print(error, file=sys.stderr)
        return 1
    with world() as w:
        run = Run(path.parent, w)
        try:
            corpus = load(recipe.data)             # every rank asks; a lock lets the first do it and the others find it
            run.listen()                           # only now: what came before may be cut off at any moment
            train(w, TransformerXLTask(recipe, corpus), recipe, run)
        except (BadValue, DataError, CheckpointError, Diverged) as error:
            run.fail(error)                        # what went wrong is known, and its message is for a person
            return 1
        except BaseException as error:
            run.fail(error, traceback=True)
            raise
    return 0


if __name__ == "__main__":
    sys.exit(record(main)(sys.argv[1:]))
