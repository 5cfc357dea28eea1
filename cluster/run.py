"""A run's folder as the launcher sees it (docs/design.md lists what is in it). The same name is the same run.

Every backend keeps the folder of the machine that launches up to date; following a run is reading it.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.complete import intact
from engine.config import Recipe
from engine.files import write_whole
from engine.values import BadValue, differences, from_json, to_json

LAUNCHED = "=== launched"                         # how the line begins that a launch writes at the top of a node's log
MASTER, TENSORBOARD, RAY_DASHBOARD = 20000, 6006, 8265       # the first ports of what a run opens on its machines
MEND = "A run needs a folder below runs/ here that it can write to, and room on the disk. Then the same command again."


class Refused(Exception):
    """A launch cannot go on as asked. Nothing was started; the message says what to do."""


class Stopped(Exception):
    """A launch was broken off by whoever started it. The message says what is left, if anything."""


class Broken(Exception):
    """A launch failed after something was started. Nothing is left running; the message says what to do."""


@dataclass(frozen=True)
class Standing:
    """How far a run is: not begun, going to resume, or finished."""
    state: Literal["new", "unfinished", "finished"] = "new"
    step: int | None = None                       # of the newest checkpoint; None: there is none
    ranks: int | None = None                      # that wrote it
    message: str = ""                             # the trainer's last word
    changes: tuple[str, ...] = ()                 # in what does not move the curve
    place: str | None = None                      # where the run is that far; None: in its folder here
    missed: tuple[str, ...] = ()                  # targets that it finished without

    def __str__(self) -> str:
        there = f", as {self.place} has it" if self.place else ""
        if self.state == "finished":
            return f"finished at step {self.step}, {self.message}{there}"
        if self.state == "new":
            return "new"
        begin = f"goes on from step {self.step}" if self.step is not None else "starts again, no checkpoint is here"
        return ", now with ".join([begin + there, *self.changes])


NEW = Standing()


def standing(run_dir: Path, recipe: Recipe, called: str | None = None) -> Standing:
    """What a launch of `recipe` under this name would be. `called`: what to call the folder, where it is a copy.

    Raises Refused where the name belongs to another recipe, or the weights to start from are not here.
    """
    called = called or str(run_dir)
    try:
        old = from_json(type(recipe), json.loads((run_dir / "recipe.json").read_text()))
    except FileNotFoundError:
        return _beginning(Standing(), recipe)
    except (BadValue, json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise Refused(f"{called}/recipe.json is not a recipe that this version reads: {error}\n"
                      f"Choose another --name, or remove {called}") from error
    changes = tuple(differences(old, recipe))
    if other := [change for change in changes if not change.startswith("clock.")]:
        raise Refused("\n  ".join([f"{called} is another run, with another recipe (theirs -> yours):", *other])
                      + f"\nChoose another --name, or remove {called}")
    status = read_status(run_dir)
    if status.get("state") == "finished":
        return Standing("finished", status.get("step"), message=status.get("message", ""),
                        missed=missed(recipe, status))
    newest = newest_checkpoint(run_dir) or {}
    return _beginning(Standing("unfinished", newest.get("step"), newest.get("ranks"), changes=changes), recipe)


def agree(question: str, yes: bool, needed: bool = True, *, if_so: str = "If so, the same with --yes",
          otherwise: str = "Nothing was done.") -> None:
    """Asks a person. Raises Refused without a yes. `if_so`: what to give where nobody sits, who means yes."""
    if yes or not needed:
        return
    if not sys.stdin.isatty():
        raise Refused(f"{question} Nobody is here to answer. {if_so}")
    try:
        answer = input(f"{question} [y/N] ")
    except (EOFError, KeyboardInterrupt):
        answer = ""
        print()
    if answer.strip().lower() not in ("y", "yes"):
        raise Refused(otherwise)


def why(error: OSError) -> str:
    """'No space left on device: runs/x/plan.txt'."""
    return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")


def read_status(run_dir: Path) -> dict[str, Any]:
    """status.json: state, step, message; {} where there is none."""
    return read_json(run_dir / "status.json")


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is nothing that can be read as such."""
    try:
        return parse_json(path.read_text(errors="replace"))
    except FileNotFoundError:
        return {}


def parse_json(text: str) -> dict[str, Any]:
    """A file that says something in JSON; {} of one that was caught half written, as on a full disk."""
    try:
        said = json.loads(text)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def port_of(run: str, first: int) -> int:
    """Of the thousand ports from `first` on the run's own: two runs may share a machine. TXL_PORTS says which thousand,
    from 0, where launches that know nothing of each other share one, as rehearsals do."""
    return first + 1000 * int(os.environ.get("TXL_PORTS", "0")) + zlib.crc32(run.encode()) % 1000


def missed(recipe: Recipe, status: dict[str, Any]) -> tuple[str, ...]:
    """Targets of the recipe which the run that has this status.json finished without, each with what it reached."""
    return tuple(target for target, reached in recipe.clock.targets(**status.get("reached", {})).items() if not reached)


def newest_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """meta.json (step, ranks, ...) of the checkpoint that the trainer goes on from."""
    return next((meta for _, meta in _checkpoints(run_dir)), None)


def newest_elsewhere(run_dir: Path) -> dict[str, Any] | None:
    """meta.json of the newest checkpoint whose model.pt a cluster keeps, of which nothing else is here."""
    metas = [read_json(path) for path in run_dir.glob("checkpoints/step-*/meta.json")
             if not (path.parent / "model.pt").exists()]
    return max(metas, key=lambda meta: meta.get("step", -1), default=None)


def newest_and_best(run_dir: Path) -> list[Path]:
    """The folders of the checkpoints that going on takes: to train from, and to test with."""
    there = _checkpoints(run_dir)
    best = min(((meta["valid_loss"], path) for path, meta in there if meta["valid_loss"] is not None), default=None)
    return list(dict.fromkeys([*(path for path, _ in there[:1]), *([best[1]] if best else [])]))


def record(run_dir: Path, recipe: Recipe, plan: str, command: str, overrides: tuple[str, ...], checkout: Path) -> None:
    """Write what led to the run, before it starts. command.txt has a line for each launch, the rest is of the last."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "recipe.json", json.dumps(to_json(recipe), indent=1) + "\n")
    write_whole(run_dir / "plan.txt", plan + "\n")
    write_whole(run_dir / "commit.txt", _commit(checkout))
    with open(run_dir / "command.txt", "a") as file:
        file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}  {command}\n")
        file.writelines(f"    {override}\n" for override in overrides)
    (run_dir / "stop").unlink(missing_ok=True)


def _beginning(standing: Standing, recipe: Recipe) -> Standing:
    for source in (recipe.init_from, recipe.init_under) if standing.step is None else ():
        if source is not None and not Path(source).exists():
            raise Refused(f"There is no checkpoint {source}. Give a run's folder (runs/NAME) or one of its "
                          f"checkpoints/step-*")
    for path in recipe.given:
        if not Path(path).exists():
            raise Refused(f"There is no {path}, which the recipe names and nothing makes. Put it there, or name "
                          f"another with --set")
    return standing


def _checkpoints(run_dir: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Whole ones, newest first, with their meta.json."""
    paths = sorted(run_dir.glob("checkpoints/step-*"), reverse=True)
    return [(path, meta) for path in paths if (meta := intact(path))]


def _commit(checkout: Path) -> str:
    """Commit, status and diff of the code."""
    text = ""
    for arguments in (["rev-parse", "HEAD"], ["status", "--short"], ["diff", "HEAD"]):
        try:
            done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True,
                                  errors="replace", timeout=30)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{text}unknown: {error}\n"
        if done.returncode:
            return f"unknown: {checkout} is not a git checkout\n"
        text += f"$ git {' '.join(arguments)}\n{done.stdout}"
    return text
