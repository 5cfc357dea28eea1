"""The ranks of a run. One process is a world of one, so no caller asks whether it is distributed."""
from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from engine import exchange
from engine.config import Wire
from engine.tied import TableExchange, travelling_early
from engine.values import BadValue

PIECE_BYTES = 256 << 20                           # of a tensor, in one message
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """True on the one rank that writes what is written once."""
        return self.rank == 0

    def sum(self, *values: float) -> tuple[float, ...]:
        """The sums over all ranks, in float64, the same on each."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return tuple(total.tolist())

    def any_later(self, flag: bool) -> Callable[[], bool]:
        """Whether any rank said so: asked now, answered when called. Between the two the ranks go on working."""
        total = torch.tensor(float(flag))
        pending = dist.all_reduce(total, async_op=True) if self.size > 1 else None

        def answer() -> bool:
            if pending is not None:
                pending.wait()
            return bool(total > 0)
        return answer

    def barrier(self) -> None:
        self.sum(0.0)                              # gloo on the CPU whatever the device: never waits for a GPU's queue

    def broadcast(self, value: T) -> T:
        """The leading rank's value on every rank; what the others pass is ignored.

        Tensors in it, however nested, travel one after the other: from GPU to GPU where they are on one, so nothing
        is held twice.
        """
        if self.size == 1:
            return value
        tensors: list[Tensor] = []
        packed = [_pack(value, tensors) if self.leads else b""]
        dist.broadcast_object_list(packed)
        received = value if self.leads else _unpack(packed[0], tensors, self.device)
        for tensor in tensors:
            for piece in tensor.view(-1).view(torch.uint8).split(PIECE_BYTES):   # bytes: gloo knows few types
                dist.broadcast(piece, 0)
        return received

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def parallel(self, model: nn.Module, wire: Wire = "fp32", bucket_mib: float | None = None) -> nn.Module:
        """The model such that gradients, after backward, are the mean over ranks. They travel in buckets: None: DDP's,
        25 MiB but for a small first one; tied tables with tails by themselves (engine/tied.py)."""
        if self.size == 1:
            return model
        tied = travelling_early(model)
        theirs = {id(p) for table in tied for p in table.parameters()}
        own = [name for name, p in model.named_parameters() if id(p) in theirs]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, own)
        with _without_dynamo():
            ddp = _Parallel(model, device_ids=[self.device] if self.device.type == "cuda" else None,
                            gradient_as_bucket_view=True, bucket_cap_mb=bucket_mib)
        if wire != "fp32":
            ddp.register_comm_hook(None, exchange.hook(wire))
        for table in tied:
            table.exchange = TableExchange(table, wire, ddp)
        return ddp

    def accumulating(self, model: nn.Module, more: bool) -> contextlib.AbstractContextManager:
        """Around a micro-batch: with `more` to come, gradients stay on their rank."""
        if more and isinstance(model, DistributedDataParallel):
            return model.no_sync()
        return contextlib.nullcontext()


class _Parallel(DistributedDataParallel):
    """torch wraps this call to keep it out of torch.compile, and for that imports torch._dynamo, as for an optimizer's
    (engine/optim.py). Layers alone are compiled here, which are below it."""
    if hasattr(DistributedDataParallel, "_inside_ddp_forward"):   # torch 2.11 to 2.13, which do not promise it
        _inside_ddp_forward = contextlib.contextmanager(inspect.unwrap(DistributedDataParallel._inside_ddp_forward))


class _StandIn:
    """For a module: what is known of it; for anything else it is loaded."""

    def __init__(self, module: str, **known: Any):
        self._module = module
        vars(self).update(known)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._module), name)


@contextlib.contextmanager
def _without_dynamo() -> Iterator[None]:
    """Where it is not loaded yet, DDP, which only asks for a setting of torch.compile's, hears the default."""
    if "torch._dynamo" in sys.modules:
        yield
        return
    stand_in = _StandIn("torch._dynamo", utils=_StandIn("torch._dynamo.utils",
                                                        get_optimize_ddp_mode=lambda: "ddp_optimizer"))
    cast(Any, torch)._dynamo = stand_in
    try:
        yield
    finally:
        if torch.__dict__["_dynamo"] is stand_in:
            del torch.__dict__["_dynamo"]          # the next to ask for it loads it


@contextlib.contextmanager
def world(timeout_s: float = 1800.0) -> Iterator[World]:
    """The world that torchrun's environment describes, or a world of one; on GPUs if this process sees any.

    Raises BadValue where the machine's ranks are more than its GPUs.
    """
    rank, local_rank, size, local_size = (int(os.environ.get(name, default)) for name, default in (
        ("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
    gpus = torch.cuda.device_count()
    cuda = gpus > 0
    if cuda and gpus < local_size:
        raise BadValue(f"{local_size} ranks on this machine, but it has {gpus} GPU(s). Start --nproc-per-node={gpus}, "
                       f"or set CUDA_VISIBLE_DEVICES= (empty) to use the processor")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    ours = size > 1 and not dist.is_initialized()  # Ray Train makes one, and destroys it
    if ours:
        dist.init_process_group(process_group(cuda), timeout=timedelta(seconds=timeout_s))
    try:
        yield World(rank, local_rank, size, device)
    finally:
        if ours:
            dist.destroy_process_group()


def process_group(cuda: bool) -> str:
    """The backends that a world needs: whatever trains on GPUs also sums numbers of the processor."""
    return "cpu:gloo,cuda:nccl" if cuda else "gloo"


def leave(status: int) -> NoReturn:
    """End this process, whose work is all written, without taking the interpreter apart.

    DDP keeps the process group past its destruction, and a thread of gloo's may still hold a tensor of the last
    collective. Where it lets go of that in an interpreter that ends, the process aborts: a training that had finished
    well has ended with SIGABRT. Source: github.com/pytorch/pytorch/pull/179291.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _pack(value: Any, tensors: list[Tensor]) -> bytes:
    """`value` pickled, with a description in the place of each tensor; the tensors are added to the list."""
    class Pickler(pickle.Pickler):
        def persistent_id(self, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return None
            tensors.append(x.detach().contiguous())
            return x.shape, x.dtype, x.device.type
    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def _unpack(packed: bytes, tensors: list[Tensor], device: torch.device) -> Any:
    """The value with tensors still to be filled, which are added to the list in the order of `_pack`."""
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, described: Any) -> Tensor:
            shape, dtype, kind = described
            tensors.append(torch.empty(shape, dtype=dtype, device="cpu" if kind == "cpu" else device))
            return tensors[-1]
    return Unpickler(io.BytesIO(packed)).load()
