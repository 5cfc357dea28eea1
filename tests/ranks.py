"""Real ranks for tests: processes over gloo on loopback, as torchrun would start them."""
from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from cluster.local import free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([                  # torch._dynamo: the first step of any optimizer would import it
    "torch", "txl.task", "engine.loop", "torch.utils.tensorboard", "torch._dynamo"])


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(*args) in `size` processes at once; their results by rank. The first exception is raised here."""
    port, pipes, processes = free_port(), [], []
    for rank in range(size):
        here, there = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(rank, size, port, function, args, there))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    results = []
    for pipe in pipes:
        try:
            results.append(pipe.recv())
        except EOFError:
            results.append(RuntimeError("a rank died without an answer"))
    for process in processes:
        process.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _rank(rank: int, size: int, port: int, function: Callable[..., Any], args: tuple, pipe: Any) -> None:
    import torch
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    try:
        pipe.send(function(*args))
    except Exception as error:
        pipe.send(type(error)(f"rank {rank}: {error}\n{traceback.format_exc()}"))
