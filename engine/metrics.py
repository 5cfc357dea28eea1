"""Metrics: one line on the screen, one in metrics.jsonl, the same numbers in TensorBoard over global tokens.

TensorBoard tags are those of cybertronai/transformer-xl, so that old and new curves lie in one picture: also there
samples and tokens per second are of one GPU. In metrics.jsonl and on the screen they are of all.
"""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from engine.files import write_whole
from engine.peaks import PEAK_TFLOPS


def peak_flops(device_name: str, precision: str) -> float | None:
    """FLOP/s at best of one device, None where the table has none (a CPU, another GPU)."""
    for gpu, peaks in PEAK_TFLOPS.items():
        if gpu in device_name and precision in peaks:
            return peaks[precision] * 1e12
    return None


class Stopwatch:
    """Seconds of training: what `paused` blocks take (evaluation, checkpoints) does not count."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        seconds, self.begin = now - self.begin, now
        return seconds

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.begin += time.perf_counter() - start


class MetricsError(RuntimeError):
    """The numbers of a run cannot be kept; the message is for a person."""


class Metrics:
    """Writes by the leading rank; on the others every call does nothing. After a resume it goes on behind the
    checkpoint: what an interrupted run had logged later than that is dropped."""

    def __init__(self, folder: Path, step: int, tokens: int, active: bool):
        self.active = active
        if not active:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = path.read_text().splitlines()
            write_whole(path, "".join(f"{line}\n" for line in lines if _stands(line, step)))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - as long as the run
        from torch.utils.tensorboard import SummaryWriter  # 1 s to import, by one rank of all
        self._tags: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=tokens + 1 if step else None)

    def write(self, kind: str, step: int, tokens: int, **numbers: float | str | None) -> None:
        """One line of metrics.jsonl: kind is train, valid or test."""
        if self.active:
            known = {key: x for key, x in numbers.items() if x is not None}
            with _kept():
                self._file.write(json.dumps({"kind": kind, "step": step, "tokens": tokens} | known) + "\n")

    def tags(self, tokens: int, **numbers: float | None) -> None:
        """Scalars for TensorBoard; learning__loss stands for the tag learning/loss."""
        if self.active:
            for name, x in numbers.items():
                if x is not None:
                    with _kept():
                        self._tags.add_scalar(name.replace("__", "/"), x, tokens)

    def histogram(self, tag: str, values: torch.Tensor, tokens: int) -> None:
        if self.active:
            with _kept():
                self._tags.add_histogram(tag, values.float().cpu(), tokens)

    def text(self, tag: str, text: str) -> None:
        if self.active:
            with _kept():
                self._tags.add_text(tag, text)

    def close(self) -> None:
        if self.active:
            with _kept():
                self._file.close()
                self._tags.close()


def gpu_memory(device: torch.device) -> dict[str, float]:
    """Gigabytes allocated and reserved, now and at most; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"allocated_gb": torch.cuda.memory_allocated(device) / 1e9,
            "max_allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "cached_gb": torch.cuda.memory_reserved(device) / 1e9,
            "max_cached_gb": torch.cuda.max_memory_reserved(device) / 1e9}


def ppl(loss: float) -> float:
    """Perplexity of a loss in nats per token; infinite rather than an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def brief(number: float) -> str:
    """Three digits and a unit: 78.6M, 12.3k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


@contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MetricsError(f"metrics.jsonl or tensorboard/ could not be written: {error}. Make room and run the same "
                           f"command again: it goes on from the last checkpoint") from error


def _stands(line: str, step: int) -> bool:
    """Whether a record is of the run up to `step`: not later, not the test (which comes again), not half a line."""
    try:
        record: Any = json.loads(line)
        return record["step"] <= step and record["kind"] != "test"
    except (ValueError, KeyError, TypeError):
        return False
