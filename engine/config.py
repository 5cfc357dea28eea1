"""What a training run is, apart from its model: frozen values, checked when made. Standard library only.

What can move the loss curve stands in `Batch`, `Optim`, `Schedule`, `Stop`, the precision and the seed;
what only moves the clock stands in `Clock`.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from engine.values import BadValue

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Wire = Literal["fp32", "bf16", "bf16_feedback", "fp16"]
MISSED = 3                                        # exit status: what was to be done is done, but a target not reached
Affinity = Literal["socket", "socket_unique_interleaved", "socket_unique_continuous", "single", "single_unique",
                   "disabled"]


@dataclass(frozen=True)
class LinearLr:
    """The linear scaling rule (arXiv:1706.02677): lr = base_lr * sequences per step / base_batch."""
    base_lr: float
    base_batch: int = 32


@dataclass(frozen=True)
class Optim:
    """The optimizer. `eps`, `betas` and the LAMB options mean what they mean in engine/optim.py."""
    name: Literal["lamb", "adamw", "adam", "sgd", "adagrad", "muon"]
    lr: float | LinearLr                          # the peak: the schedule multiplies it
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0                         # sgd and muon only
    clip: float | None = 0.25                     # global gradient norm; None: no clipping
    exchange: Wire | None = None                  # what gradients travel in between ranks; None: see Recipe.wire
    bias_correction: bool = True                  # lamb only, as are the two below
    trust_ratio: bool = True
    max_weight_norm: float | None = 10.0          # the paper's phi: the weight norm counts up to this

    def __post_init__(self):
        lr = self.lr.base_lr if isinstance(self.lr, LinearLr) else self.lr
        if lr < 0 or self.weight_decay < 0 or self.eps < 0 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError("lr, weight_decay and eps must not be negative, and betas must lie in [0, 1)")
        if self.clip is not None and self.clip <= 0:
            raise ValueError("clip must be positive; use none for no clipping")

    def peak_lr(self, batch_size: int) -> float:
        """The learning rate for `batch_size` sequences per step over all ranks."""
        if isinstance(self.lr, LinearLr):
            return self.lr.base_lr * batch_size / self.lr.base_batch
        return self.lr


@dataclass(frozen=True)
class Schedule:
    """How the learning rate moves: a pure function of steps or tokens (engine/schedule.py).

    Warm-up is linear and counts the step being taken, so the first step has lr/warmup_steps, not zero and not lr.
    The horizon is where a cosine reaches its lowest; None: where training stops.

    "finder" looks for a learning rate and trains nothing: from a thousandth of optim.lr it rises towards 1 (or
    optim.lr, if that is more) where training stops, without warm-up or evaluations. It ends when the loss runs away,
    and says where it fell fastest (engine/finder.py).
    """
    name: Literal["cosine", "inv_sqrt", "constant", "plateau", "finder"] = "cosine"
    warmup_steps: int = 0
    warmup_tokens: int = 0
    horizon_steps: int | None = None
    horizon_tokens: int | None = None
    eta_min: float = 0.0                          # lowest learning rate (absolute) of cosine and plateau
    eta_min_ratio: float = 0.0                    # the same as a fraction of the peak; one of the two
    decay_rate: float = 0.5                       # plateau: factor after `patience` evaluations without a better loss
    patience: int = 0

    def __post_init__(self):
        if self.warmup_steps and self.warmup_tokens:
            raise ValueError("give warmup_steps or warmup_tokens, not both")
        if self.horizon_steps is not None and self.horizon_tokens is not None:
            raise ValueError("give horizon_steps or horizon_tokens, not both")
        if self.eta_min and self.eta_min_ratio:
            raise ValueError("give eta_min or eta_min_ratio, not both")
        if min(self.warmup_steps, self.warmup_tokens, self.eta_min, self.eta_min_ratio, self.patience) < 0:
            raise ValueError("warmup, eta_min and patience must not be negative")

    def lowest(self, peak_lr: float) -> float:
        """The learning rate that cosine and plateau do not go below."""
        return self.eta_min or self.eta_min_ratio * peak_lr


@dataclass(frozen=True)
class Batch:
    """Sequences per optimizer step: `size` over all ranks or `local_size` on each; exactly one of the two.

    A rank that holds more than `micro_size` sequences takes them in that many at a time and accumulates gradients
    (NVIDIA's batch_chunk = sequences of a rank / micro_size). Ranks may hold unequal shares.
    """
    size: int | None = None
    local_size: int | None = None
    micro_size: int | None = None

    def __post_init__(self):
        if (self.size is None) == (self.local_size is None):
            raise ValueError("give exactly one of batch.size (over all ranks) and batch.local_size (on each rank); "
                             "set the other to none")
        if min(x for x in (self.size, self.local_size, self.micro_size) if x is not None) < 1:
            raise ValueError("batch sizes must be at least 1")

    def total(self, ranks: int) -> int:
        """Sequences per step over all ranks. Raises BadValue where a rank would have none."""
        total = self.local_size * ranks if self.local_size is not None else self.size or 0
        if total < ranks:
            raise BadValue(f"batch.size {total} leaves some of the {ranks} ranks without a sequence. "
                           f"Use at most {total} ranks or a larger batch")
        return total

    def share(self, rank: int, ranks: int) -> range:
        """The sequences of one rank: contiguous blocks that differ by at most one in length."""
        return share_of(self.total(ranks), rank, ranks)

    def micro_batches(self, rank: int, ranks: int) -> list[range]:
        """A rank's share cut into the pieces it takes one after the other."""
        share = self.share(rank, ranks)
        size = self.micro_size or len(share)
        return [share[i:i + size] for i in range(0, len(share), size)]


def share_of(total: int, rank: int, ranks: int) -> range:
    """The contiguous share of one rank in `total` things; shares differ by at most one."""
    return range(rank * total // ranks, (rank + 1) * total // ranks)


@dataclass(frozen=True)
class Stop:
    """Where training ends: after whichever of the two comes first. At least one is given."""
    max_steps: int | None = None
    max_tokens: int | None = None

    def __post_init__(self):
        if self.max_steps is None and self.max_tokens is None:
            raise ValueError("give stop.max_steps or stop.max_tokens: a run must have an end")
        if min(x for x in (self.max_steps, self.max_tokens) if x is not None) < 1:
            raise ValueError("stop.max_steps and stop.max_tokens must be at least 1")

    def reached(self, step: int, tokens: int) -> bool:
        return ((self.max_steps is not None and step >= self.max_steps)
                or (self.max_tokens is not None and tokens >= self.max_tokens))


@dataclass(frozen=True)
class Clock:
    """What does not move the loss curve: a run may go on with another. Intervals are in optimizer steps.

    A run that misses a target has finished all the same: its last word says so, and the exit status of launch.py.
    """
    log_interval: int = 100
    log_first_steps: int = 0                      # so many at the start are logged each
    eval_interval: int | None = 4000              # None: no validation, also not at the end
    test: bool = True                             # with the best weights, at the end
    checkpoint_interval: int = 1000               # besides one at every better evaluation and at the end
    checkpoint_epochs: bool = False               # and one at the end of each epoch, which is always kept
    keep_checkpoints: int | None = 2              # the newest; the best is always kept. None: all
    target_perplexity: float | None = None        # of the validation with the best weights, at most
    target_tokens_per_s: float | None = None      # of training, over all ranks, at least
    affinity: Affinity = "socket"                 # the processors a rank keeps to (engine/affinity.py)
    compile: bool = False                         # torch.compile of each layer, in training
    split_tails: bool = False                     # of a tied word table over the ranks (engine/split.py)

    def __post_init__(self):
        if min(self.log_interval, self.eval_interval or 1, self.checkpoint_interval, self.keep_checkpoints or 1) < 1 \
                or self.eval_interval == 0 or self.keep_checkpoints == 0:
            raise ValueError("intervals and keep_checkpoints must be at least 1; use none for no validation and to "
                             "keep all")
        if self.log_first_steps < 0:
            raise ValueError("log_first_steps must not be negative")
        if self.target_perplexity is not None and self.eval_interval is None:
            raise ValueError("target_perplexity is of the validation, which eval_interval=none leaves out")

    def targets(self, *, perplexity: float | None = None, tokens_per_s: float | None = None,
                split: str = "valid") -> dict[str, bool]:
        """Each target, in words beside what was measured, and whether it is reached. What was not measured is not."""
        targets = {}
        if self.target_perplexity is not None:
            targets[f"{split} ppl {_shown(perplexity, '.3f')} (target: at most {self.target_perplexity:g})"] = (
                perplexity is not None and perplexity <= self.target_perplexity)
        if self.target_tokens_per_s is not None:
            targets[f"{_shown(tokens_per_s, ',.0f')} tokens/s (target: at least {self.target_tokens_per_s:,.10g})"] = (
                tokens_per_s is not None and tokens_per_s >= self.target_tokens_per_s)
        return targets


def verdicts(targets: dict[str, bool]) -> list[str]:
    """Clock.targets in words."""
    return [f"{'reached' if is_reached else 'MISSED'}: {target}" for target, is_reached in targets.items()]


def _shown(x: float | None, form: str) -> str:
    return "not measured" if x is None else format(x, form)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every model's recipe has; the model's own adds its types. `entry` is the module torchrun starts."""
    entry: ClassVar[str]
    batch: Batch
    optim: Optim
    schedule: Schedule
    stop: Stop
    precision: Precision = "fp32"
    seed: int = 1111
    divergence_nats: float = 3.0                  # stop when the loss is this far above the run's lowest
    init_from: str | None = None                  # a run or checkpoint whose weights training starts from
    init_optim: bool = False                      # its optimizer's state too
    init_partly: bool = False                     # of its weights those that are here, and begin the rest anew
    init_under: str | None = None                 # another, for the weights that init_from has not
    freeze: tuple[str, ...] = ()                  # parameters that stay as they are: names, or patterns as layers.0.*
    clock: Clock = field(default_factory=Clock)

    @property
    def wire(self) -> Wire:
        """What gradients travel in between ranks (engine/exchange.py): if not said, fp16 in training in fp16, as in the
        ancestors', else fp32."""
        return self.optim.exchange or ("fp16" if self.precision == "fp16" else "fp32")

    def __post_init__(self):
        if self.init_from is None and (self.init_optim or self.init_partly or self.init_under):
            raise ValueError("init_optim, init_partly and init_under are about what init_from names, which is none")
        if self.init_partly and self.init_under:
            raise ValueError("what init_from has not begins anew (init_partly) or is that of init_under: give one")
        if self.init_optim and (self.init_partly or self.init_under or self.frozen):
            raise ValueError("init_optim is for all parameters of init_from: without init_under, not with init_partly, "
                             "nor with frozen ones")
        if self.optim.exchange == "fp16" and self.precision != "fp16":
            raise ValueError("optim.exchange=fp16 loses small gradients where no loss scale lifts them: it goes with "
                             "precision=fp16. Use bf16")
        if self.optim.exchange == "bf16_feedback" and self.precision == "fp16":
            raise ValueError("optim.exchange=bf16_feedback adds up what steps have lost, and with precision=fp16 these "
                             "differ in their loss scale. Use fp16 or bf16")
        if self.schedule.name == "plateau" and self.clock.eval_interval is None:
            raise ValueError("plateau goes by the validation, which eval_interval=none leaves out")
        if self.schedule.name == "finder" and not self.optim.peak_lr(1) > 0:
            raise ValueError("the finder begins at a thousandth of optim.lr, which must be above 0")

    def check_ranks(self, ranks: int) -> None:
        """Raises BadValue where so many cannot train this."""
        total = self.batch.total(ranks)
        if self.clock.split_tails and len({len(self.batch.micro_batches(rank, ranks)) for rank in range(ranks)}) > 1:
            raise BadValue(f"clock.split_tails needs as many micro-batches on each rank, and {total} sequences in "
                           f"pieces of {self.batch.micro_size} are not on {ranks} ranks. Use a batch that all can "
                           f"share evenly")

    @property
    def frozen(self) -> tuple[str, ...]:
        """Patterns of all parameters that are not trained."""
        return self.freeze

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens that one sequence of the batch predicts in a step."""
        raise NotImplementedError

    @property
    def params(self) -> int | None:
        """Trainable parameters; None where only the data tells, by the size of its vocabulary."""
        raise NotImplementedError

    @property
    def flops_per_token(self) -> float | None:
        """Floating-point operations that training needs per target, to estimate time and cost; None: not known."""
        return None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Files and folders that training reads, absolute or relative to where it runs: what a machine must have."""
        return ()

    @property
    def given(self) -> tuple[str, ...]:
        """Of those inputs what must be there before a run starts, since nothing makes it."""
        return ()

    @property
    def prepare(self) -> tuple[str, ...] | None:
        """Python's arguments that make those inputs which have a published origin, where they are absent.

        What they find they leave as it is. None where nothing can be had that way.
        """
        return None
