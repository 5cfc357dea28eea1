"""Checkpoints: folders `step-00001000` written beside and renamed, so that one which exists is whole.

`model.pt` holds what all ranks share, `rank-R.pt` what is a rank's own, `meta.json` what a reader wants to know before
loading, with every file's size. Nothing in them executes when loaded (torch's weights_only).
"""
from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.complete import intact
from engine.world import World


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

    def shared(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        return _load(self.path / "model.pt", device)

    def check_vocabulary(self, vocabulary: str) -> None:
        """Raises CheckpointError where the ids of today's tokens are not those the weights were trained on."""
        if vocabulary != self.vocabulary:
            raise CheckpointError(f"{self.path} was trained on another vocabulary: the text or its options have "
                                  f"changed since. Bring the text back, or start a new run (--name=NEW)")

    def of_rank(self, rank: int) -> dict[str, Any]:
        return _load(self.path / f"rank-{rank}.pt", "cpu")


def save(world: World, folder: Path, step: int, shared: dict[str, Any], own: dict[str, Any], meta: dict[str, Any],
         keep: int) -> None:
    """Write one checkpoint; collective, every rank its own part. Then remove all but the `keep` newest and the best.

    Where a rank cannot write, all of them raise CheckpointError, and the checkpoints that were there stay.
    """
    final, partial = folder / f"step-{step:08d}", folder / f".step-{step:08d}.partial"

    def prepare() -> None:
        if world.leads:
            shutil.rmtree(partial, ignore_errors=True)           # of a start that was killed while it wrote
            partial.mkdir(parents=True)

    def write() -> None:
        _write(partial / f"rank-{world.rank}.pt", own)
        if world.leads:
            _write(partial / "model.pt", shared)

    def publish() -> None:
        if world.leads:
            sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
            _write_text(partial / "meta.json", json.dumps({"step": step, "ranks": world.size, "files": sizes} | meta))
            shutil.rmtree(final, ignore_errors=True)             # only a damaged one: from a whole one we had resumed
            partial.rename(final)
            _sync(folder)
            _prune(folder, keep)

    for action in (prepare, write, publish):
        error = None
        try:
            action()
        except OSError as caught:
            error = caught
        failed, = world.sum(float(error is not None))            # all ranks learn of it, and none waits for ever
        if failed:
            if world.leads:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"The checkpoint of step {step} could not be written to {folder}: "
                                  f"{error or f'{int(failed)} other rank(s) failed, see their logs'}. Earlier "
                                  f"checkpoints are untouched. Make room and run the same command again") from error


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints below `folder`, oldest first. A truncated one is left out."""
    return [checkpoint for path in sorted(folder.glob("step-*")) if (checkpoint := _intact(path))]


def read(path: Path) -> Checkpoint:
    """One checkpoint folder. Raises CheckpointError where it is not complete."""
    checkpoint = _intact(path)
    if checkpoint is None:
        raise CheckpointError(f"{path} is not a complete checkpoint: a file is missing or shorter than meta.json says. "
                              f"Remove the folder to use the one before it")
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
    return Checkpoint(path, *(meta[key] for key in ("step", "ranks", "valid_loss", "vocabulary")))


def _prune(folder: Path, keep: int) -> None:
    checkpoints = complete(folder)
    kept = [*checkpoints[-keep:], best(checkpoints)]
    for checkpoint in checkpoints:
        if checkpoint not in kept:
            shutil.rmtree(checkpoint.path, ignore_errors=True)
    for leftover in folder.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


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
