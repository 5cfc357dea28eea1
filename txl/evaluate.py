"""What a run reached, as a table: a unigram model, this model without memory, and with it.

    python -m txl.evaluate --run=runs/demo
    python -m txl.evaluate --run=runs/demo --split=all --protocol=nvidia --tgt_len=64 --mem_len=640 --clamp_len=400 \\
        --same_length
    python -m txl.evaluate --run=runs/demo --target_perplexity=23.4 --save=measured.json
    python -m txl.evaluate --run=runs/demo --scan_mem_len=0,32,64,128
    python -m txl.evaluate --run=runs/demo --text="def main(argv):"
    torchrun --nproc-per-node=8 -m txl.evaluate --run=runs/demo

Every token of the split is predicted once, unless another --protocol is asked for. Perplexity is per token of the run's
own vocabulary; per word (the ends of lines are words) and in bits per byte, vocabularies can be compared.
"""
from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from engine.checkpoint import CheckpointError
from engine.cli import flag, misuse, parse
from engine.config import MISSED, Clock, verdicts
from engine.task import Score
from engine.values import BadValue, nearest, override
from engine.world import World, world
from txl import options
from txl.batches import Streams
from txl.config import Context, Recipe
from txl.data import DataError, with_eval_sets
from txl.datasets import SPLITS
from txl.model import TransformerXL
from txl.protocol import STREAMS, Protocol
from txl.task import evaluate
from txl.text import count_words, unknown, words
from txl.trained import Trained, precision_of, restore


@dataclass(frozen=True)
class Flags:
    run: str = flag("folder of the run, or of one of its checkpoints; of a run the best is taken")
    split: str = flag("test, valid, train, or an evaluation set by its name; all: all but train", default="test")
    tgt_len: int | None = flag("tokens predicted at a time; unless given, the recipe's for the split", default=None)
    mem_len: int | None = flag("tokens remembered", default=None)
    clamp_len: int | None = flag("cap of the distance that positions express", default=None)
    same_length: bool = flag("every token sees exactly mem_len before it", default=False)
    protocol: Literal[Protocol] = flag("how the split is read; the others drop a tail", default="exact")
    streams: int | None = flag("streams read at once; unless given, the recipe's, or the protocol's", default=None)
    percentiles: tuple[float, ...] = flag("of the time that a segment takes", default=(90, 95, 99))
    scan_mem_len: tuple[int, ...] = flag("what memory is worth: lengths to compare; TensorBoard draws it", default=())
    max_segments: int | None = flag("read only so many segments of each stream", default=None)
    target_perplexity: float | None = flag("exit status 3 where it is above", default=None)
    target_tokens_per_s: float | None = flag("exit status 3 where it is slower, over all ranks", default=None)
    save: str | None = flag("a file for losses, speeds and every segment's seconds, as JSON", default=None)
    text: str | None = flag("score this text instead, word by word; -: the one on stdin", default=None)


@dataclass(frozen=True)
class How:
    """How a split is measured."""
    context: Context
    streams: int
    protocol: Protocol
    max_segments: int | None = None


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m txl.evaluate", about=__doc__, advice=options.advice)
    if min(x for x in (flags.streams, flags.max_segments, 1) if x is not None) < 1:
        misuse("--streams and --max_segments must be at least 1")
    if not all(0 <= p <= 100 for p in flags.percentiles):
        misuse("--percentiles lie between 0 and 100")
    of_splits = [f"--{name}" for name in ("target_perplexity", "target_tokens_per_s", "save") if getattr(flags, name)]
    if of_splits and (flags.text is not None or flags.scan_mem_len):
        misuse(f"{of_splits[0]} is for the evaluation of a split, neither for --text nor for --scan_mem_len")
    with world() as w:
        try:
            trained = restore(Path(flags.run), w)
            with torch.no_grad(), precision_of(trained, w).autocast():
                report, reached = _report(trained, flags, w)
        except (BadValue, DataError, CheckpointError) as error:
            print(error, file=sys.stderr)
            return 1
        if w.leads:
            print(report)
    return 0 if reached else MISSED


def table(trained: Trained, split: str, how: How, measured: tuple[Score, list[float]], percentiles: tuple[float, ...],
          w: World) -> str:
    """The comparison, with the protocol it was measured by and what the training cost. Collective."""
    corpus, (with_memory, seconds) = trained.corpus, measured
    without, _ = measure(trained, split, replace(how, context=replace(how.context, mem_len=0)), w)
    text = corpus.splits[split]
    unigram = unigram_nats(corpus.splits["train"], text, corpus.n_token) / len(text)
    rows = [("a unigram model", unigram), ("this model without memory", without.loss),
            ("this model with memory", with_memory.loss)]
    n_words = count_words(corpus.vocab, text)
    lines = [f"{_named(trained, split)}, {with_memory.tokens:,} tokens of a vocabulary of {corpus.n_token:,} "
             f"{corpus.vocab.unit}",
             f"{'':<28}{'perplexity':>12}{'of unigram':>12}{'per word':>12}{'bits per byte':>15}"]
    lines += [f"{name:<28}{math.exp(loss):>12.2f}{math.exp(loss - unigram):>12.1%}"
              f"{_exp(loss * len(text) / n_words):>12}{loss / math.log(2) * len(text) / corpus.n_bytes[split]:>15.3f}"
              for name, loss in rows]
    return "\n".join([*lines, f"({with_memory.protocol}; weights of step {trained.checkpoint.step})",
                      *_cost(trained.folder / "metrics.jsonl", with_memory), speed(seconds, how, percentiles)])


def scan(trained: Trained, split: str, how: How, mem_lens: tuple[int, ...], w: World) -> str:
    """What memory is worth: the loss by mem_len, as a table and, beside the run, for TensorBoard. Collective."""
    corpus, text = trained.corpus, trained.corpus.splits[split]
    per_word, per_byte = len(text) / count_words(corpus.vocab, text), len(text) / corpus.n_bytes[split]
    scores = [(mem_len, *measure(trained, split, replace(how, context=replace(how.context, mem_len=mem_len)), w))
              for mem_len in mem_lens]
    lines = [f"{_named(trained, split)} by mem_len, in a vocabulary of {corpus.n_token:,} {corpus.vocab.unit}; weights "
             f"of step {trained.checkpoint.step}",
             f"{'mem_len':>7}{'perplexity':>12}{'per word':>12}{'bits per byte':>15}{'ms a segment':>14}  protocol"]
    lines += [f"{mem_len:>7}{math.exp(score.loss):>12.2f}{_exp(score.loss * per_word):>12}"
              f"{score.loss / math.log(2) * per_byte:>15.3f}{1000 * float(np.median(seconds)):>14.2f}  {score.protocol}"
              for mem_len, score, seconds in scores]
    if w.leads:
        from torch.utils.tensorboard import SummaryWriter  # 1 s to import
        with SummaryWriter(str(trained.folder / "tensorboard" / f"mem_len-{split}")) as tags:
            for mem_len, score, _ in scores:
                tags.add_scalar("scan/ppl_by_mem_len", math.exp(score.loss), mem_len)
    return "\n".join(lines)


def measure(trained: Trained, split: str, how: How, w: World) -> tuple[Score, list[float]]:
    """The score, and the seconds that each segment took the slowest rank. Collective. Raises BadValue."""
    ends = [time.perf_counter()]

    def lap() -> None:
        if w.device.type == "cuda":
            torch.cuda.synchronize(w.device)
        ends.append(time.perf_counter())
    score = evaluate(trained.net, trained.corpus, split, how.context, how.streams, w, how.protocol, lap,
                     how.max_segments)
    by_rank = w.gather([end - begin for begin, end in pairwise(ends)])
    return score, [max(times) for times in zip(*filter(None, by_rank))]      # a rank without a stream has no segments


def speed(seconds: list[float], how: How, percentiles: tuple[float, ...]) -> str:
    """Latency and throughput of a segment, without those during which memory fills and kernels are chosen."""
    first, timed = _timed(seconds, how)
    if not timed:
        return f"too short to time: {len(seconds)} segments, of which the first {first} and the last do not count"
    mean, tokens = sum(timed) / len(timed), how.streams * how.context.tgt_len
    shown = [f"{p:g}% within {1000 * x:.2f}" for p, x in zip(percentiles, np.percentile(timed, percentiles))]
    return (f"a segment of {how.streams} x {how.context.tgt_len} tokens takes "
            f"{', '.join([f'{1000 * mean:.2f} ms on average', *shown])}: {tokens / mean:,.0f} tokens/s "
            f"({len(timed)} of {len(seconds)} segments: without the first {first} and the last)")


def text_table(trained: Trained, text: str, context: Context) -> str:
    """A text word by word: what each costs, and the whole. Raises BadValue, DataError."""
    vocab = trained.corpus.vocab
    scored = words(vocab, text)
    nats = token_nats(trained.net, [i for _, ids in scored for i in ids], vocab.start, context)
    if not nats:
        raise BadValue("There is no word in the text to score")
    lines, at = [f"{'word':<28}{'tokens':>8}{'nats':>9}{'perplexity':>14}"], 0
    for word, ids in scored:
        loss = sum(nats[at:at + len(ids)])
        lines.append(f"{json.dumps(word, ensure_ascii=False)[1:-1]:<28}{len(ids):>8}{loss:>9.3f}{_exp(loss):>14}")
        at += len(ids)
    total = sum(nats)
    lines += [f"{len(scored)} words, {len(nats)} tokens: {total / len(nats):.4f} nats a token, perplexity "
              f"{_exp(total / len(nats))} per token, {_exp(total / len(scored))} per word, "
              f"{total / math.log(2) / len(text.encode()):.3f} bits per byte (from an empty memory, tgt_len "
              f"{context.tgt_len}, mem_len {context.mem_len}; weights of step {trained.checkpoint.step})"]
    if outside := unknown(vocab, scored):
        lines.append(f"Not in the vocabulary and read as <unk>: {', '.join(outside)}")
    return "\n".join(lines)


def token_nats(net: TransformerXL, ids: list[int], start: int, context: Context) -> list[float]:
    """-log p of each token, each after all before it and `start`."""
    streams, nats = Streams(np.array(ids, np.int64), start, 1), list[float]()
    memory = net.reading(1, context)
    for k in range(streams.segments(context.tgt_len)):
        segment = streams.segment(range(1), k, context, net.config.cutoffs).to(net.vocabulary.bias.device)
        nll_BT, memory = net(segment.tokens_BQ, segment.targets_BT, memory, context, segment.rows)
        nats += nll_BT[0].tolist()
    return nats


def unigram_nats(train: np.ndarray, text: np.ndarray, n_token: int) -> float:
    """What `text` costs a model that only knows how often each token was in `train`, one added to every count."""
    counts = np.bincount(train, minlength=n_token) + 1.0
    return float(-np.log(counts / counts.sum())[text].sum())


def filling(context: Context) -> int:
    """Segments that are not timed, for memory fills and kernels are chosen; NVIDIA's rule."""
    return context.mem_len // context.tgt_len + 2


def _timed(seconds: list[float], how: How) -> tuple[int, list[float]]:
    """How many segments come first that do not count, and those that do."""
    first = filling(how.context)
    return first, seconds[first:-1]                           # the last is shorter


def _report(trained: Trained, flags: Flags, w: World) -> tuple[str, bool]:
    """What was asked for, and whether all targets are reached. Collective; of a text the leader alone makes it."""
    if flags.text is not None:
        if not w.leads:
            return "", True
        text = sys.stdin.read() if flags.text == "-" else flags.text
        return text_table(trained, text, _context(trained.recipe, flags, "test")), True
    streams = flags.streams or STREAMS.get(flags.protocol, trained.recipe.eval_streams)
    further = tuple(trained.recipe.data.eval_paths)
    if flags.split not in (known := (*SPLITS, *further, "all")):
        raise BadValue(f"--split={flags.split} is none of the run's texts: {', '.join(known)}."
                       f"{nearest(flags.split, known)}")
    if flags.split == "all" or flags.split in further:
        trained = replace(trained, corpus=with_eval_sets(trained.corpus, trained.recipe.data))
    reports, saved, reached = [], {}, True
    goals = Clock(target_perplexity=flags.target_perplexity, target_tokens_per_s=flags.target_tokens_per_s)
    for split in ("valid", "test", *further) if flags.split == "all" else (flags.split,):
        how = How(_context(trained.recipe, flags, split), streams, flags.protocol, flags.max_segments)
        if flags.scan_mem_len:
            reports.append(scan(trained, split, how, flags.scan_mem_len, w))
            continue
        score, seconds = measured = measure(trained, split, how, w)
        timed = _timed(seconds, how)[1]
        numbers = {"perplexity": math.exp(score.loss),
                   "tokens_per_s": how.streams * how.context.tgt_len * len(timed) / sum(timed) if timed else None}
        targets = goals.targets(perplexity=numbers["perplexity"], tokens_per_s=numbers["tokens_per_s"], split=split)
        reports.append("\n".join([table(trained, split, how, measured, flags.percentiles, w),
                                  *verdicts(targets)]))
        saved[split] = numbers | {"loss": score.loss, "tokens": score.tokens, "protocol": score.protocol,
                                  "segment_s": seconds}
        reached = reached and all(targets.values())
    if flags.save and w.leads:
        Path(flags.save).write_text(json.dumps(saved, indent=1) + "\n")
    return "\n\n".join(reports), reached


def _named(trained: Trained, split: str) -> str:
    """A split in words, or an evaluation set."""
    path = trained.recipe.data.eval_paths.get(split)
    return f"{split} of {trained.recipe.data.dir}" if path is None else f"{split}, {path}"


def _context(recipe: Recipe, flags: Flags, split: str) -> Context:
    given = [f"{name}={getattr(flags, name)}" for name in ("tgt_len", "mem_len", "clamp_len", "same_length")
             if getattr(flags, name) is not None and getattr(flags, name) is not False]
    return override(recipe.context_of(split), *given)


def _exp(loss: float) -> str:
    """Perplexity; of a long word it may be too large for a float."""
    if loss > 700:
        return f"1e{loss / math.log(10):.0f}"
    return f"{math.exp(loss):.2f}" if loss < math.log(1000) else f"{math.exp(loss):.3g}"


def _cost(metrics: Path, score: Score) -> list[str]:
    """Speed and minutes of the training, from its own log; speed of this evaluation."""
    evaluated = f"evaluated at {score.tokens / score.seconds:,.0f} tokens/s"
    if not metrics.exists():
        return [evaluated]
    whole = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
    train = [x for x in map(json.loads, whole) if x["kind"] == "train"]
    if not train:
        return [evaluated]
    rate = sorted(x["tokens_per_s"] for x in train)[len(train) // 2]
    return [f"trained on {train[-1]['tokens']:,} tokens in {train[-1]['seconds'] / 60:.1f} minutes, "
            f"{rate:,.0f} tokens/s; {evaluated}"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
