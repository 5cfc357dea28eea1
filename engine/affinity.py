"""Which processors a rank keeps to. Linux; what can be had from /sys, without NVML.

The modes are those of NVIDIA's Transformer-XL, by what they give a rank of the processors near its GPU (those that /sys
calls local to the GPU's PCI address: of its socket, or of its part of one); hyperthreads stay with their core.

    socket                       all of them
    socket_unique_interleaved    a share of the cores, every n-th where n ranks are near the same
    socket_unique_continuous     a share of the cores, side by side
    single                       the first core's first thread, whoever else has it
    single_unique                the first thread of a core of its own
    disabled                     whatever it was given

Without GPUs all processors are near every rank. A rank never takes what the system has not given it (a container's or
Slurm's part), and where that leaves it nothing it stays as it is.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import Affinity
from engine.world import World

SYS = Path("/sys")


@dataclass(frozen=True)
class Topology:
    """The machine as its ranks see it."""
    near: tuple[frozenset[int], ...]              # by local rank: the processors near its GPU
    cores: tuple[tuple[int, ...], ...]            # the hyperthreads of each core


def placed(mode: Affinity, topology: Topology) -> tuple[frozenset[int], ...]:
    """The processors of each local rank. Pure. Empty: it stays where it is."""
    return tuple(_of_rank(mode, topology, rank) for rank in range(len(topology.near)))


def bind(world: World, mode: Affinity, log: logging.Logger) -> None:
    """Keeps this rank to its processors, where the system knows how; threads that it starts from now on, too."""
    if mode == "disabled" or not hasattr(os, "sched_setaffinity"):
        return
    ranks = max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), world.local_rank + 1)      # whoever starts them may not say
    mine = placed(mode, survey(world.device, ranks))[world.local_rank]
    if mine and mine != os.sched_getaffinity(0):
        try:
            os.sched_setaffinity(0, mine)
        except OSError as error:                  # a container may forbid it; it is no reason not to train
            log.info(f"cannot keep to processors {listed(mine)} ({mode}): {error}")
        else:
            log.info(f"keeps to processors {listed(mine)} ({mode})")


def survey(device: torch.device, ranks: int) -> Topology:
    """This machine, of what this process may use."""
    given = os.sched_getaffinity(0)
    near = [_local(SYS, _pci(rank)) & given if device.type == "cuda" else given for rank in range(ranks)]
    return Topology(tuple(map(frozenset, near)), cores_of(SYS, given))


def cores_of(sys: Path, cpus: Sequence[int] | set[int]) -> tuple[tuple[int, ...], ...]:
    """The given processors by core, in order; one that /sys says nothing of is a core."""
    cores = {}
    for cpu in sorted(cpus):
        siblings = _read(sys / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = tuple(sorted((cpus_in(siblings) if siblings else {cpu}) & set(cpus)))
        cores[core[0]] = core
    return tuple(cores.values())


def cpus_in(text: str) -> set[int]:
    """0-2,8 as the kernel writes it."""
    ends = [part.split("-") for part in text.split(",") if part.strip()]
    return {cpu for end in ends for cpu in range(int(end[0]), int(end[-1]) + 1)}


def listed(cpus: frozenset[int]) -> str:
    """The other way round."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and runs[-1][-1] == cpu - 1:
            runs[-1].append(cpu)
        else:
            runs.append([cpu])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _of_rank(mode: Affinity, topology: Topology, rank: int) -> frozenset[int]:
    near = topology.near[rank]
    if mode in ("socket", "disabled"):
        return near if mode == "socket" else frozenset()
    cores = [core for core in topology.cores if near & set(core)]
    neighbours = [i for i, others in enumerate(topology.near) if others == near]
    place, count = neighbours.index(rank), len(neighbours)
    if not cores:
        return frozenset()
    if mode == "single":
        return frozenset(cores[0][:1])
    if len(cores) < count:                        # more ranks than cores: they have to share
        return near
    if mode == "single_unique":
        return frozenset(cores[place][:1])
    if mode == "socket_unique_interleaved":
        share = cores[place::count]
    else:
        share = cores[place * len(cores) // count:(place + 1) * len(cores) // count]
    return frozenset(cpu for core in share for cpu in core)


def _local(sys: Path, address: str) -> set[int]:
    """The processors near a PCI device; all there are where /sys does not say."""
    return cpus_in(_read(sys / f"bus/pci/devices/{address}/local_cpulist") or _read(sys / "devices/system/cpu/online"))


def _pci(index: int) -> str:
    """The PCI address of a GPU as /sys names it, 0000:07:00.0."""
    gpu: Any = torch.cuda.get_device_properties(index)          # its type does not tell of these three
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
