"""Other projects' Transformer-XL, run from a checkout beside ours: which it is, how it is built, called and stepped.

Nothing of theirs is here. Their modules are imported as they are into a process of their own, made to run with today's
torch in memory: masks that are bytes become booleans, torch has a version of CUDA while they look for one, and calls
that it has given up (add_(number, tensor)) are understood. Packages of theirs for logging and the like are empty.

cybertronai's optimizer is the package that its requirements name:  pip install --no-deps --target CHECKOUT pytorch-lamb
"""
from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from engine.values import BadValue
from txl.config import Context, Model

ABSENT = ("dllogger", "pynvml", "portalocker", "sacremoses", "tensorboardX")


@dataclass(frozen=True)
class Peer:
    """A checkout. Its modules can be imported in this process only once, and no other peer's beside them."""
    name: str
    folder: Path                                  # where mem_transformer.py lies

    def load(self) -> Any:
        """Its module of the model."""
        for name in ABSENT:
            sys.modules.setdefault(name, MagicMock())
        sys.path[:0] = [str(self.folder), str(self.folder / "utils")]
        with _today():
            return importlib.import_module("mem_transformer")

    def build(self, model: Model, n_token: int, context: Context) -> nn.Module:
        """Of the same shape, and initialised by the same rules, as ours. Raises BadValue where it cannot be."""
        if model.attn_type != "rel" or model.untie_r or model.final_lnorm or model.sample_softmax:
            raise BadValue(f"{self.name} is raced with attn_type rel, and without untie_r, final_lnorm and "
                           f"sample_softmax")
        kind = self.load().MemTransformerLM
        net = kind(n_token, model.n_layer, model.n_head, model.d_model, model.d_head, model.d_inner, model.dropout,
                   model.dropatt, tie_weight=model.tie_weight, d_embed=model.d_embed or model.d_model,
                   div_val=model.div_val, tie_projs=[model.ties_proj(i) for i in range(len(model.cutoffs) + 1)],
                   pre_lnorm=model.pre_lnorm, cutoffs=list(model.cutoffs), attn_type=0, tgt_len=context.tgt_len,
                   ext_len=context.ext_len, mem_len=context.mem_len, same_length=context.same_length,
                   clamp_len=context.clamp_len or -1, **self._more())
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.endswith("layer_norm.weight"):
                    parameter.normal_(1.0, model.init_std)
                elif name.endswith("bias") and not name.startswith("r_"):
                    parameter.zero_()
                else:
                    parameter.normal_(0.0, model.proj_init_std if "_projs." in name else model.init_std)
        return net

    def forward(self, net: nn.Module, tokens_QB: Tensor, targets_TB: Tensor, memory: Any) -> tuple[Tensor, Any]:
        """-log p of the targets, in an order of its own, and the next memory; None is an empty one."""
        nll_TB, *memory = net(tokens_QB, targets_TB, *(memory or ()))
        return nll_TB, memory

    def optimizer(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        """As its train.py makes the one that its recipes name."""
        return torch.optim.Adam(parameters, lr=lr)

    def _more(self) -> dict[str, Any]:
        return {}


class Cybertronai(Peer):
    def optimizer(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        for name, tensors in (("add_", 1), ("addcmul_", 2)):
            setattr(Tensor, name, _number_first(getattr(Tensor, name), tensors))
        try:
            return importlib.import_module("pytorch_lamb").Lamb(parameters, lr=lr, weight_decay=0.0)
        except ModuleNotFoundError as error:
            raise BadValue(f"The checkout of {self.name} has no pytorch_lamb, its optimizer: "
                           f"pip install --no-deps --target {self.folder} pytorch-lamb") from error


class Nvidia(Peer):
    def forward(self, net: nn.Module, tokens_QB: Tensor, targets_TB: Tensor, memory: Any) -> tuple[Tensor, Any]:
        return net(tokens_QB, targets_TB, memory)

    def optimizer(self, parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
        return importlib.import_module("lamb").JITLamb(parameters, lr=lr, weight_decay=0.0)

    def _more(self) -> dict[str, Any]:
        return {"dtype": None}


def find_all(paths: Sequence[str]) -> list[Peer]:
    """The peers of several checkouts, one each. Raises BadValue."""
    found = [find(path) for path in paths]
    if len({peer.name for peer in found}) < len(found):
        raise BadValue("--against: two of these checkouts are of the same project")
    return found


def find(path: str) -> Peer:
    """The peer whose checkout this is: its top or its pytorch folder. Raises BadValue."""
    for folder in (Path(path).absolute() / "pytorch", Path(path).absolute()):
        if not (folder / "mem_transformer.py").is_file():
            continue
        if (folder / "lamb.py").is_file():
            return Nvidia("NVIDIA", folder)
        return Cybertronai("cybertronai", folder) if (folder / "globals.py").is_file() else Peer("original", folder)
    raise BadValue(f"--against={path}: there is no mem_transformer.py, nor in a folder pytorch below it. Give a "
                   f"checkout of kimiyoung/transformer-xl, cybertronai/transformer-xl or, of NVIDIA/"
                   f"DeepLearningExamples, PyTorch/LanguageModeling/Transformer-XL")


@contextmanager
def _today() -> Iterator[None]:
    """What their modules need of torch to be imported, and to run: booleans stay, this process is theirs."""
    tensor: Any = Tensor
    tensor.byte = tensor.bool
    version, torch.version.cuda = torch.version.cuda, torch.version.cuda or "0.0"     # they take it apart
    try:
        yield
    finally:
        torch.version.cuda = version


def _number_first(method: Any, tensors: int) -> Any:
    """add_ and addcmul_ that also take their factor as the first of the arguments, before the tensors."""
    def call(self: Tensor, *given: Any, **more: Any) -> Tensor:
        if len(given) == tensors + 1:
            return method(self, *given[1:], **{"alpha" if tensors == 1 else "value": given[0]})
        return method(self, *given, **more)
    return call
