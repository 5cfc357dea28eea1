"""How a config's training scales, before it is paid for: a model of the step on 1 machine to 1,024 GPUs.

    python -m benchmarks.scaling --predict --config=test_16
    python -m benchmarks.scaling --predict --config=nvidia_base --kind=p4d.24xlarge --step_ms=34
    python -m benchmarks.scaling --predict --config=test_16 --speedup=3 --nic_gb=5
    python -m benchmarks.scaling --check                     # against every published point, with the error of each

Weak scaling: each GPU has as many sequences as on the config's own machines. Efficiency is that of one machine = 100%.
The formulas are in engine/scaling.py, what the tables say is in benchmarks/scaling.md.
"""
from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

from benchmarks.published import LINKS, SERIES, Kind, Series
from benchmarks.tables import named
from cluster.prices import UTILISATION
from cluster.spec import Config
from configs import CONFIGS
from engine.cli import flag, misuse, parse
from engine.peaks import PEAK_TFLOPS
from engine.scaling import Assumptions, Exchange, Gradients, StepTime, compute_time, step_time, warning
from engine.values import BadValue
from txl.config import Recipe, table_params

MOST_GPUS = 1024
# Of the targets, those beyond the head's words: about 6% of wikitext-103 with 20,000 words in the head. Taken for all.
TAIL_SHARE = 0.062


@dataclass(frozen=True)
class Flags:
    predict: bool = flag("a config by number of machines", default=False)
    check: bool = flag("the published points", default=False)
    config: str | None = flag("a name of configs.py", default=None)
    kind: str | None = flag(f"other machines than the config's: {', '.join(LINKS)}", default=None)
    step_ms: float | None = flag("a step on one GPU, measured; else what was published, else a guess", default=None)
    speedup: float = flag("how many times faster compute is than that", default=1.0)
    nic_gb: float | None = flag("GB/s that nccl-tests shows between machines (busbw), measured", default=None)
    measured_ms: float | None = flag("a step on the config's machines, to compare with what is expected", default=None)
    spread: float = flag("deviation of a GPU's time for a step, as a share of it", default=Assumptions.spread)
    overlap: float = flag("share of compute behind which the exchange can hide", default=Assumptions.overlap)


@dataclass(frozen=True)
class Workload:
    """What one GPU does in a step."""
    recipe: Recipe
    sequences: int
    micro_batches: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.recipe.tokens_per_sequence

    def gradients(self, bits: int) -> Gradients:
        """In so many bits an element."""
        model, n_token, element = self.recipe.model, self.recipe.data.n_token, bits / 8
        if n_token is None:
            raise BadValue("how much is exchanged follows from recipe.data.n_token, which this config leaves open")
        head, *tails = (element * x for x in table_params(model, n_token))
        tables = (head + sum(tails)) * (1 if model.tie_weight else 2)
        in_tails = TAIL_SHARE * self.tokens if tails else 0.0
        return Gradients(head, sum(tails), element * (self.recipe.params or 0) - tables, model.tie_weight,
                         tail_rows=in_tails * element * model.d_embed_of(1 if model.div_val > 1 else 0),
                         tail_states=in_tails * element * model.d_model)

    @property
    def bits(self) -> int:
        """Of a gradient's element, where those of 16-bit training travel in 16 bits as the ancestors' did."""
        return 16 if self.recipe.precision in ("fp16", "bf16") else 32

    @property
    def today(self) -> str:
        """The engine's way of those below."""
        way = "split" if self.recipe.clock.split_tails else "early" if self._early else "dense"
        return f"{way}, {32 if self.recipe.wire == 'fp32' else 16} bits"

    def plans(self, ranks: int) -> dict[str, Exchange]:
        """Ways to exchange the gradients, and what each sends. Early and split are about tails."""
        in_bits = {bits: self.gradients(bits) for bits in (32, 16)}
        plans = {f"dense, {bits} bits": gradients.dense() for bits, gradients in in_bits.items()}
        if self._early:
            plans |= {f"early, {bits} bits": gradients.early(ranks) for bits, gradients in in_bits.items()}
        if in_bits[16].tails:
            plans |= {f"split, {bits} bits": gradients.split() for bits, gradients in in_bits.items()}
        return plans

    @property
    def _early(self) -> bool:
        """One table for all words, which embeds and is the softmax's."""
        model = self.recipe.model
        return bool(model.cutoffs) and model.tie_weight and model.div_val == 1 and model.sample_softmax is None


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m benchmarks.scaling", about=__doc__)
    if flags.predict == flags.check:
        misuse("Give one of --predict and --check")
    for name in ("step_ms", "speedup", "nic_gb", "measured_ms"):
        if (value := getattr(flags, name)) is not None and not value > 0:
            misuse(f"--{name} is {value:g}: it must be above 0")
    if not (0 <= flags.overlap <= 1 and 0 <= flags.spread <= 1):
        misuse("--overlap and --spread are shares, from 0 to 1")
    assumed = Assumptions(overlap=flags.overlap, spread=flags.spread)
    try:
        print("\n".join(checked(assumed) if flags.check else predicted(flags, assumed)))
    except BadValue as error:
        misuse(str(error))
    return 0


def predicted(flags: Flags, assumed: Assumptions) -> Iterator[str]:
    """The table of a config, and all that was assumed."""
    if flags.config is None:
        raise BadValue("--predict needs --config=NAME")
    config = named(flags.config)
    kind = kind_of(config, flags.kind)
    links = kind.links if flags.nic_gb is None else replace(kind.links, nic=1e9 * flags.nic_gb)
    gpus = config.machines.gpus if flags.kind is None and config.machines.gpus else links.gpus
    work = workload(config)
    compute_s, source = compute(config, work, kind, flags.step_ms, assumed)
    compute_s /= flags.speedup

    def on(machines: int, plan: str) -> StepTime:
        return step_time(compute_s, work.plans(machines * gpus)[plan], links, machines=machines, gpus=gpus,
                         micro_batches=work.micro_batches, assumed=assumed)

    yield "| exchange | machines | GPUs | tokens/s | step ms | compute / exposed / stragglers ms | efficiency |"
    yield "|---|--:|--:|--:|--:|---|--:|"
    for name in work.plans(1):
        one = on(1, name)
        for machines in doubling(MOST_GPUS // gpus):
            step = on(machines, name)
            yield (f"| {name} | {machines} | {machines * gpus:,} | {machines * gpus * work.tokens / step.total_s:,.0f} "
                   f"| {1000 * step.total_s:.1f} | {1000 * step.compute_s:.1f} / {1000 * step.exposed_s:.1f} / "
                   f"{1000 * step.stragglers_s:.1f} | {one.total_s / step.total_s:.1%} |")
    sent = work.gradients(work.bits)
    faster = f", {flags.speedup:g} times faster" if flags.speedup != 1 else ""
    nic = "--nic_gb" if flags.nic_gb is not None else kind.nic_source
    yield ""
    yield f"- Compute, {1000 * compute_s:.1f} ms for {work.tokens:,} tokens on one GPU: {source}{faster}."
    yield (f"- Gradients in {work.bits} bits, MB: head {sent.head / 1e6:.0f}, tails {sent.tails / 1e6:.0f}, rest "
           f"{sent.rest / 1e6:.0f}; {TAIL_SHARE:.1%} of the tokens in the tails (of wikitext-103's words; assumed).")
    yield f"- The engine's is {work.today!r}, by recipe.optim.exchange and recipe.clock.split_tails."
    yield f"- Inside a machine {links.nvlink / 1e9:g} GB/s: {kind.nvlink_source}."
    yield f"- Between machines {links.nic / 1e9:g} GB/s: {nic}."
    yield (f"- {assumed.overlap:.0%} of compute can hide what is ready early; GPUs deviate by {assumed.spread:.0%} "
           f"from step to step; {1e6 * assumed.hop_s:g} us for each {assumed.bucket / 1e6:g} MB and hop. All assumed.")
    if flags.measured_ms is not None:
        count = config.machines.count
        expected_s = on(count, work.today).total_s
        yield ""
        yield (warning(expected_s, flags.measured_ms / 1000)
               or f"{flags.measured_ms:g} ms on {count} machine(s) is as expected, {1000 * expected_s:.4g} ms.")


def checked(assumed: Assumptions) -> Iterator[str]:
    """Each series: its smallest point tells compute, and the larger ones are predicted."""
    yield "| published | on | GPUs | x2 | x4 | x8 | x16 |"
    yield "|---|---|--:|---|---|---|---|"
    errors: dict[bool, list[float]] = {True: [], False: []}
    for series in SERIES:
        points = dict(points_of(series, assumed))
        first = min(series.tokens_per_s)
        cells = []
        for times in (2, 4, 8, 16):
            gpus = times * first
            if gpus not in points:
                cells.append("")
                continue
            rate, linear = series.tokens_per_s[gpus], times * series.tokens_per_s[first]
            error = points[gpus] / rate - 1
            errors[gpus > LINKS[series.kind].links.gpus].append(error)
            cells.append(f"{rate / linear:.1%}, {points[gpus] / linear:.1%} ({error:+.1%})")
        yield f"| {series.name} | {series.kind} | {first} | {' | '.join(cells)} |"
    yield ""
    yield "Each cell: efficiency published, predicted, and the error of the predicted tokens/s."
    for several, found in errors.items():
        sizes = [abs(error) for error in found]
        yield (f"Error {'between' if several else 'inside'} machines, {len(found)} points: mean "
               f"{statistics.mean(found):+.1%}, mean size {statistics.mean(sizes):.1%}, from {min(found):+.1%} to "
               f"{max(found):+.1%}.")


def points_of(series: Series, assumed: Assumptions) -> Iterator[tuple[int, float]]:
    """GPUs and predicted tokens/s, of the first as published."""
    links = LINKS[series.kind].links
    work = Workload(cast(Recipe, CONFIGS[series.config].recipe), series.sequences, 1)
    exchange = work.gradients(series.bits).dense()

    def shape(gpus: int) -> dict[str, int]:
        return {"machines": max(1, gpus // links.gpus), "gpus": min(gpus, links.gpus)}

    first = min(series.tokens_per_s)
    compute_s = compute_time(first * work.tokens / series.tokens_per_s[first], exchange, links, **shape(first),
                             assumed=assumed)
    for gpus in series.tokens_per_s:
        yield gpus, gpus * work.tokens / step_time(compute_s, exchange, links, **shape(gpus), assumed=assumed).total_s


def workload(config: Config) -> Workload:
    """Of a GPU when the config runs on its own machines."""
    batch, machines = config.recipe.batch, config.machines
    ranks = machines.count * (machines.gpus_per_machine or 1)
    return Workload(cast(Recipe, config.recipe), len(batch.share(0, ranks)), len(batch.micro_batches(0, ranks)))


def kind_of(config: Config, name: str | None) -> Kind:
    name = name or config.machines.kind
    if name not in LINKS:
        raise BadValue(f"The links of {name!r} are not known. Take --kind={'|'.join(LINKS)}")
    return LINKS[name]


def compute(config: Config, work: Workload, kind: Kind, step_ms: float | None,
            assumed: Assumptions) -> tuple[float, str]:
    """Seconds of a step on one GPU, and how we know."""
    recipe = work.recipe
    if step_ms is not None:
        return step_ms / 1000, "--step_ms"
    same = [(x.machines.count, name) for name, x in CONFIGS.items()
            if x.tokens_per_s and x.machines == x.published_on and x.recipe.precision == recipe.precision
            and x.machines.kind == kind.name and _shape(x) == _shape(config)]
    if same:                                      # on fewest machines, where least has to be guessed
        count, name = min(same)
        rate = CONFIGS[name].tokens_per_s or 0.0
        ranks = count * (CONFIGS[name].machines.gpus_per_machine or 1)
        step_s = ranks * work.tokens / rate
        compute_s = compute_time(step_s, work.gradients(work.bits).dense(), kind.links, machines=count,
                                 gpus=ranks // count, micro_batches=work.micro_batches, assumed=assumed)
        return compute_s, (f"{name}'s published {rate:,.0f} tokens/s on {count} machine(s), less the dense exchange "
                           f"and stragglers of those")
    peak, share = PEAK_TFLOPS[kind.gpu].get(recipe.precision), UTILISATION.get(recipe.precision)
    if peak is None or share is None or recipe.flops_per_token is None:
        raise BadValue(f"Nothing was published for {kind.name} in {recipe.precision}, and there is nothing to guess "
                       f"from. Measure a step on one GPU (python -m benchmarks.train) and give --step_ms")
    seconds = work.tokens * recipe.flops_per_token / (share * peak * 1e12)
    return seconds, f"a guess, {share:.0%} of the peak of one {kind.gpu} in {recipe.precision}"


def doubling(most: int) -> Iterator[int]:
    """1, 2, 4, ... up to `most`."""
    yield from (1 << i for i in range(most.bit_length()))


def _shape(config: Config) -> tuple[object, ...]:
    """What decides how long a GPU computes."""
    work = workload(config)
    return work.recipe.model, work.recipe.data.n_token, work.recipe.context, work.sequences, work.micro_batches


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
