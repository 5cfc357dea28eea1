"""What a benchmark runs on: its device and threads, clocks, memory."""
from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Literal

import torch

from engine import watch
from engine.run import processor
from engine.world import World

Clock = Literal["wall", "cpu"]                    # cpu: of all threads of this process


def alone(threads: int | None) -> World:
    """The world of a process that races, its threads set; None leaves them as torch has them."""
    set_threads(threads)
    return World(0, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def set_threads(threads: int | None) -> None:
    """Of torch, in this process; None leaves them as torch has them."""
    if threads is not None:
        torch.set_num_threads(threads)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def described(w: World, threads: int | None) -> str:
    return (f"{w.size} x {device_name(w.device)}, {threads or torch.get_num_threads()} thread(s), "
            f"torch {torch.__version__}")


def now(clock: Clock, device: torch.device) -> float:
    """Seconds; on the wall, when the device has done all it was given. The processor's clock sees no GPU."""
    return watch.now(device) if clock == "wall" else time.process_time()


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")         # proc(5): the peak of the resident set is now its size


def peak_bytes(device: torch.device) -> int:
    """In use at most since the peak was forgotten: the resident set, on a GPU what torch has allocated."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


def bytes_now(device: torch.device) -> int:
    forget_peak(device)
    return peak_bytes(device)
