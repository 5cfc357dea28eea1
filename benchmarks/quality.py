"""What a recipe makes of a fixed number of tokens: the test perplexity of a small model, over several seeds.

    python -m benchmarks.quality                                        NVIDIA's recipe and ours, 5 seeds each
    python -m benchmarks.quality --config=nvidia_base --set=recipe.optim.lr=0.003
    python -m benchmarks.quality --data=data/wikitext-103 --vocab=word --tokens=20000000 --record

Every config is cut down alike (`reduced`): a quarter of the layers and the width, shorter lengths, fewer sequences, the
cutoffs in proportion to the vocabulary and the warm-up to the steps; the rest of the recipe stays. So text, tokens and
parameters are the same, and what is compared is how they are used. A seed is a training by `txl.train` in a folder of
its own below runs/quality; one that has finished is not done again. --record adds the rows to benchmarks/quality.md.
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from benchmarks.tables import HERE, dated, named, show
from configs import STDLIB
from engine.cli import flag, misuse, parse
from engine.config import Batch, Clock, Stop
from engine.run import processor
from engine.values import BadValue, override, to_json
from txl.config import Context, Data, Recipe, n_params
from txl.data import DataError, load

TABLE = Path(__file__).with_name("quality.md")
HEADING = ("| date | commit | command | config | parameters | tokens | seeds | test perplexity | lowest to highest | "
           "machine |")
FOLDER = Path("runs/quality")
# What stands for 192 + 192 tokens of 256 sequences, and for the test's 64 + 640.
CONTEXT, TEST_CONTEXT, SEQUENCES = Context(32, 32), Context(32, 96, same_length=True), 16


@dataclass(frozen=True)
class Flags:
    config: tuple[str, ...] = flag("a name of configs.py; may be repeated", default=("nvidia_base", "base_muon"))
    data: str = flag("a folder with train.txt, valid.txt and test.txt", default=STDLIB.dir)
    vocab: str = flag("word, byte, char or bpe", default="bpe")
    n_token: int = flag("that a bpe vocabulary is made to hold", default=2048)
    tokens: int = flag("to train on", default=1_000_000)
    seeds: int = flag("trainings of each config", default=5)
    jobs: int = flag("trainings at a time, which share the cores", default=2)
    set: tuple[str, ...] = flag("one field of the cut config, as for launch.py; may be repeated", default=())
    record: bool = flag("add the rows to benchmarks/quality.md", default=False)


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m benchmarks.quality", about=__doc__ or "")
    if min(flags.tokens, flags.seeds, flags.jobs) < 1:
        misuse("--tokens, --seeds and --jobs must be at least 1")
    try:
        configs = {name: named(name) for name in flags.config}
        data = override(STDLIB, f"dataset={'stdlib' if flags.data == STDLIB.dir else 'text'}", f"dir={flags.data}",
                        f"vocab={flags.vocab}", f"n_token={flags.n_token if flags.vocab == 'bpe' else 'none'}")
        n_token = load(data).n_token
        cut = {name: replace(config, recipe=reduced(cast(Recipe, config.recipe), data, n_token, flags.tokens))
               for name, config in configs.items()}
        recipes = {name: cast(Recipe, override(config, *flags.set).recipe) for name, config in cut.items()}
    except (BadValue, DataError) as error:
        misuse(str(error))
    runs = [(name, replace(recipe, seed=seed)) for seed in range(1, flags.seeds + 1)
            for name, recipe in recipes.items()]
    threads = max(1, (os.cpu_count() or 1) // flags.jobs)
    with ThreadPoolExecutor(flags.jobs) as pool:
        losses = list(pool.map(lambda run: trained(run[0], run[1], threads), runs))
    command = f"`{words}`" if (words := " ".join(word for word in argv if word != "--record")) else "no flags"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    rows = []
    for name, recipe in recipes.items():
        ppls = [math.exp(loss) for (of, _), loss in zip(runs, losses) if of == name]
        rows.append(dated(
            f"{command} | {name} | "
            f"{n_params(recipe.model, n_token):,} | {tokens(recipe):,} | {flags.seeds} | {spread(ppls)} | "
            f"{device}, torch {torch.__version__}"))
    show(HEADING, rows, TABLE if flags.record else None)
    return 0


def reduced(recipe: Recipe, data: Data, n_token: int, tokens: int) -> Recipe:
    """The recipe for a small model on `data`, whose vocabulary has `n_token` tokens, that trains on about `tokens`."""
    model, steps = recipe.model, recipe.stop.max_steps
    if steps is None or recipe.schedule.warmup_tokens or recipe.schedule.horizon_steps or \
            recipe.schedule.horizon_tokens:
        raise BadValue("only a recipe whose schedule is in steps, to its last one, is cut down here")
    ours = max(1, tokens // (SEQUENCES * CONTEXT.tgt_len))
    cut = replace(model, n_layer=model.n_layer // 4, d_model=model.d_model // 4, d_inner=model.d_inner // 4,
                  n_head=model.n_head // 2, d_head=model.d_head // 2,
                  cutoffs=tuple(edge * n_token // (recipe.data.n_token or n_token) for edge in model.cutoffs))
    return replace(
        recipe, model=cut, data=data, context=CONTEXT, eval_context=CONTEXT, test_context=TEST_CONTEXT,
        eval_streams=64, batch=Batch(size=SEQUENCES),
        schedule=replace(recipe.schedule, warmup_steps=recipe.schedule.warmup_steps * ours // steps),
        stop=Stop(max_steps=ours), precision=recipe.precision if torch.cuda.is_available() else "fp32",
        clock=Clock(log_interval=max(1, ours // 20), eval_interval=None, checkpoint_interval=ours))


def trained(name: str, recipe: Recipe, threads: int) -> float:
    """The test loss, nats per token, of a training that is done now unless it is there. Raises RuntimeError."""
    text = json.dumps(to_json(recipe), indent=1)
    run = FOLDER / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-seed{recipe.seed}"
    if not (run / "recipe.json").exists():
        run.mkdir(parents=True, exist_ok=True)
        (run / "recipe.json").write_text(text)
    if (loss := tested(run)) is None:
        begin = time.perf_counter()
        with open(run / "log", "ab") as log:
            done = subprocess.run([sys.executable, "-m", recipe.entry, str(run / "recipe.json")], stdout=log,
                                  stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(threads),
                                                                "PYTHONPATH": str(HERE.parent)})
        if done.returncode or (loss := tested(run)) is None:
            raise RuntimeError(f"The training in {run} ended with status {done.returncode}; {run / 'log'} says why")
        print(f"{name} seed {recipe.seed}: test perplexity {math.exp(loss):.3f} after "
              f"{time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    return loss


def tested(run: Path) -> float | None:
    """The test loss in a run's folder, if it has come to one."""
    with open(run / "metrics.jsonl", "a+") as file:
        file.seek(0)
        tests = [line for line in map(json.loads, file) if line["kind"] == "test"]
    return tests[-1]["loss"] if tests else None


def tokens(recipe: Recipe) -> int:
    """That it trains on, of one epoch or several."""
    return (recipe.stop.max_steps or 0) * recipe.batch.total(1) * recipe.context.tgt_len


def spread(values: Sequence[float]) -> str:
    deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} | {min(values):.2f} to {max(values):.2f}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
