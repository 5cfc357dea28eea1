"""What the benchmarks have in common: a config by name, the rows of a table."""
from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.races import RACES
from cluster.spec import Config
from configs import CONFIGS
from engine.values import BadValue, nearest, override

HERE = Path(__file__).parent


def named(config: str, *assignments: str) -> Config:
    """A config, also of races.py, with fields set as by --set. Raises BadValue."""
    configs = CONFIGS | RACES
    if config not in configs:
        raise BadValue(f"There is no config {config!r}.{nearest(config, configs)}")
    return override(configs[config], *assignments)


def show(heading: str, rows: Sequence[str], table: Path | None) -> None:
    """Prints rows, and adds them to a table, which its file ends with."""
    print("\n".join([heading, *rows]))
    if table is not None:
        with open(table, "a") as file:
            file.write("".join(f"{row}\n" for row in rows))


def dated(cells: str) -> str:
    """A row of a table that begins with date and commit; `cells` are the others, " | " between them."""
    return f"| {time.strftime('%Y-%m-%d')} | {commit()} | {cells} |"


def command(config: str, assignments: Sequence[str], *more: str) -> str:
    """The flags that a row was made with."""
    return " ".join([f"--config={config}", *(f"--set={x}" for x in assignments), *more])


def commit() -> str:
    """The commit, and whether anything but the tables differs from it."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE).stdout.strip()
    changed = git("status", "--porcelain", "--", ":/", ":(top,exclude)*.md")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")
