"""Checkpoints: folders `step-00001000` written beside and renamed, so that one which exists is whole.

`model.pt` holds what all ranks share, `rank-R.pt` what is a rank's own, `meta.json` what a reader wants to know before
loading, with every file's size. Nothing in them executes when loaded (torch's weights_only).

Machines may share the disk or have one each; nobody says which, the first mkdir of a name tells. On a disk of its own a
machine has the files of its ranks and a meta.json; model.pt is on the leading rank's, which decides for all.
"""
from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from engine.complete import intact
from engine.world import World

T = TypeVar("T")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message says which, why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""
    path: Path
    step: int
    ranks: int
    valid_loss: float | None                      # of exactly these weights; None: not evaluated
    vocabulary: str                               # hash of what the token ids mean to these weights
    nonce: str | None = None                      # the same in meta.json of all machines, of one save only
    keep: bool = False                            # it stays, however many come after it

    def shared(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        return _load(self.path / "model.pt", device)

    def check_vocabulary(self, vocabulary: str) -> None:
        """Raises CheckpointError where the ids of today's tokens are not those the weights were trained on."""
        if vocabulary != self.vocabulary:
            raise CheckpointError(f"{self.path} was trained on another vocabulary: the text or its options have "
                                  f"changed since. Bring the text back, or start a new run (--name=NEW)")

    def of_rank(self, rank: int) -> dict[str, Any] | None:
        """What a rank kept for itself. None where this disk does not have it whole, or has that of another save."""
        try:
            meta = json.loads((self.path / "meta.json").read_text())
            return _load(self.path / f"rank-{rank}.pt", "cpu") if meta.get("nonce") == self.nonce else None
        except (OSError, ValueError, AttributeError, CheckpointError):
            return None


def save(world: World, folder: Path, step: int, shared: dict[str, Any], own: dict[str, Any], meta: dict[str, Any],
         keep: int | None) -> None:
    """Write one checkpoint; collective, every rank its own part. Then remove all but the `keep` newest, the best, and
    those whose meta says keep; None: none of them.

    Where a rank cannot write, all of them raise CheckpointError, and the checkpoints that were there stay.
    """
    nonce = world.broadcast(secrets.token_hex(8))                # no leftover of a killed start has this name
    final, partial = folder / name(step), folder / f".{name(step)}.{nonce}.partial"
    owner = world.leads                                          # who publishes on its disk; one rank for each disk

    def prepare() -> None:
        if world.leads:
            partial.mkdir(parents=True)

    def claim() -> None:
        nonlocal owner
        if world.local_rank == 0 and not world.leads:
            try:
                partial.mkdir(parents=True)
                owner = True
            except FileExistsError:                              # this machine sees what another one made
                pass

    def write() -> None:
        _write(partial / f"rank-{world.rank}.pt", own)
        if world.leads:
            _write(partial / "model.pt", shared)

    def seal() -> None:
        if owner:
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            about = {"step": step, "ranks": world.size, "nonce": nonce, "files": sizes}
            _write_text(partial / "meta.json", json.dumps(about | meta))

    def publish() -> None:
        if owner:
            shutil.rmtree(final, ignore_errors=True)             # only a damaged one: a whole one we resume from
            partial.rename(final)
            _sync(folder)

    for action in (prepare, claim, write, seal, publish):
        error = None
        try:
            action()
        except OSError as caught:
            error = caught
        failed, = world.sum(float(error is not None))            # all ranks learn of it, and none waits for ever
        if failed:
            if owner:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"The checkpoint of step {step} could not be written to {folder}: "
                                  f"{error or f'{int(failed)} other rank(s) failed, see their logs'}. Earlier "
                                  f"checkpoints are untouched. Make room and run the same command again") from error

    kept = world.broadcast(_prune(folder, keep) if world.leads else [])
    if owner:
        _sweep(folder, kept)


def name(step: int) -> str:
    """Of a checkpoint's folder."""
    return f"step-{step:08d}"


def from_leader(world: World, read: Callable[[], T]) -> T:
    """What `read` gives on the leading rank, whose disk counts, on every rank. Collective.

    Where it raises CheckpointError there, all ranks do.
    """
    found, error = None, None
    if world.leads:
        try:
            found = read()
        except CheckpointError as caught:
            error = caught
    message = world.broadcast(str(error) if error else None)
    if message is not None:
        raise CheckpointError(message) from error
    return cast(T, world.broadcast(found))


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints below `folder`, oldest first. A truncated one is left out."""
    return [checkpoint for path in sorted(folder.glob("step-*")) if (checkpoint := _intact(path))]


def read(path: Path) -> Checkpoint:
    """One checkpoint folder. Raises CheckpointError where it is not complete."""
    checkpoint = _intact(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} is not a complete checkpoint: meta.json or model.pt is missing, or model.pt is "
                              f"not as long as meta.json says. Remove the folder to use the one before it")
    return checkpoint


def best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss; where none was evaluated, the newest."""
    evaluated = [(c.valid_loss, c.step, c) for c in checkpoints if c.valid_loss is not None]
    return min(evaluated)[-1] if evaluated else (checkpoints[-1] if checkpoints else None)


def find(path: Path) -> Checkpoint:
    """The checkpoint that a person names: its folder, or a run's folder, of which it is the best."""
    if (path / "meta.json").exists():
        return read(path)
    chosen = best(complete(path / "checkpoints"))
    if chosen is None:
        raise CheckpointError(f"No checkpoint at {path}. Give a run's folder (runs/NAME) or one of its "
                              f"checkpoints/step-*")
    return chosen


def _intact(path: Path) -> Checkpoint | None:
    meta = intact(path)
    if meta is None:
        return None
    return Checkpoint(path, meta["step"], meta["ranks"], meta["valid_loss"], meta["vocabulary"], meta.get("nonce"),
                      meta.get("keep", False))


def _prune(folder: Path, keep: int | None) -> list[str]:
    """Removes what is neither to be kept nor among the newest nor the best. The names of what is left, damaged ones
    too."""
    checkpoints = complete(folder)
    kept = checkpoints if keep is None else [*checkpoints[-keep:], best(checkpoints)]
    for checkpoint in checkpoints:
        if checkpoint not in kept and not checkpoint.keep:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
    return [path.name for path in folder.glob("step-*")]


def _sweep(folder: Path, kept: list[str]) -> None:
    """What killed starts left half-written, and files of ranks whose model.pt the leading rank has no more."""
    gone = [path for path in folder.glob("step-*") if path.name not in kept]
    for path in [*gone, *folder.glob(".step-*.partial")]:
        shutil.rmtree(path, ignore_errors=True)


def _load(path: Path, device: torch.device | str) -> dict[str, Any]:
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:                     # a damaged file fails in many ways, in zipfile, pickle or torch
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}). Remove {path.parent} to use the checkpoint "
                              f"before it") from error


def _write(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:              # torch's writer hides what the disk said behind its own complaint
            said = error.__context__
            raise said if isinstance(said, OSError) else OSError(str(error)) from error
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)      # the rename itself must survive a power cut
    os.fsync(descriptor)
    os.close(descriptor)
