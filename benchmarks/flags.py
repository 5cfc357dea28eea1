"""What the commands have in common that time a config, alone or beside other projects' code."""
from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar, cast

import torch

from benchmarks.machine import Clock
from benchmarks.race import Died
from benchmarks.tables import named, show
from engine.cli import flag, misuse, parse
from engine.values import BadValue
from txl.config import Recipe

T = TypeVar("T", bound="Flags")


@dataclass(frozen=True, kw_only=True)
class Flags:
    config: str = flag("a name of configs.py or benchmarks/races.py")
    set: tuple[str, ...] = flag("one field, as for launch.py; may be repeated", default=())
    against: tuple[str, ...] = flag("checkout of another project's Transformer-XL; may be repeated", default=())
    rounds: int = flag("timed rounds; the median counts", default=5)
    threads: int | None = flag("of a process; unless given, torch's choice", default=None)
    clock: Literal[Clock] = flag("cpu: seconds of all threads on the processor, which waiting does not count",
                                 default="wall")
    record: bool = flag("add the rows to the benchmark's table", default=False)


def run(flags_of: type[T], argv: list[str], measured: Callable[[Recipe, T], Sequence[str]], *, counted: Sequence[str],
        heading: str, table: Path, about: str) -> int:
    """The command whose rows `measured` makes, at least 1 of all that is `counted`. Without rows it is silent.
    """
    flags = parse(flags_of, argv, prog=f"-m benchmarks.{table.stem}", about=about)
    counted = ("rounds", "threads", *counted)
    given = [getattr(flags, name) for name in counted]
    if any(x is not None and x < 1 for values in given for x in (values if isinstance(values, tuple) else (values,))):
        misuse(f"{', '.join(f'--{name}' for name in counted)} must be at least 1")
    if flags.clock == "cpu" and torch.cuda.is_available():
        misuse("--clock=cpu does not see what a GPU does. Use --clock=wall, or hide it: CUDA_VISIBLE_DEVICES=")
    try:
        rows = measured(cast(Recipe, named(flags.config, *flags.set).recipe), flags)
    except BadValue as error:
        misuse(str(error))
    except Died as error:
        print(error, file=sys.stderr)
        return 1
    if rows:
        show(heading, rows, table if flags.record else None)
    return 0
