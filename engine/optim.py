"""Optimizers by name, LAMB, and gradient clipping: multi-tensor kernels, and no wait for the device.

LAMB's last write, where each tensor has a ratio of its own on the device, is still one small kernel a tensor.
"""
from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from engine.config import Optim
from engine.split import of_tables, over_ranks


def build(params: Iterable[tuple[str, Tensor]], optim: Optim, lr: float) -> torch.optim.Optimizer:
    """The optimizer `optim` names, over all (name, parameter) that train, in one group with learning rate `lr`.

    Weight decay is decoupled in lamb, adamw and muon, and an L2 term of the gradient in adam, sgd and adagrad, as in
    torch.optim. It covers biases and norms too, as in the ancestors: it is 0 in their recipes for PyTorch, and
    0.01 on everything in the TensorFlow one. The fused kernels want gradients laid out like their parameters, as
    autograd makes them.
    """
    trained = [(name, p) for name, p in params if p.requires_grad]
    common: dict[str, Any] = {"lr": lr, "weight_decay": optim.weight_decay}
    adam = common | {"betas": optim.betas, "eps": optim.eps}
    if optim.name == "lamb":
        return Lamb(trained, **adam, bias_correction=optim.bias_correction, trust_ratio=optim.trust_ratio,
                    max_weight_norm=optim.max_weight_norm)
    if optim.name == "adamw":
        return _light(torch.optim.AdamW)(trained, **adam, fused=True)
    if optim.name == "adam":
        return _light(torch.optim.Adam)(trained, **adam, fused=True)
    if optim.name == "sgd":
        return _light(torch.optim.SGD)(trained, **common, momentum=optim.momentum, fused=True)
    if optim.name == "adagrad":
        return _light(torch.optim.Adagrad)(trained, **common, eps=optim.eps, foreach=True)
    if optim.name == "muon":
        return Muon(trained, **adam, momentum=optim.momentum)
    raise ValueError(f"no optimizer is called {optim.name!r}")


def clip_(parameters: Iterable[Tensor], max_norm: float | None, optimizer: torch.optim.Optimizer | None = None,
          split: Sequence[tuple[Tensor, Tensor]] = ()) -> tuple[Tensor, Tensor]:
    """Scale the gradients so that their norm, taken as one vector, is at most `max_norm`; None only measures.

    Returns that norm and the norm of every gradient there is, both from before the scaling and on the device.
    The arithmetic is that of torch.nn.utils.clip_grad_norm_. With `optimizer`, one of `build`, its next step scales
    them where it reads them, if it can: a pass over all gradients less. `split`: of the parameters, heads of tables and
    this rank's rows of their tails (engine/split.py); the norm of the latter is that of all ranks' rows.
    """
    present = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in present if p.grad is not None]
    if not grads:
        return torch.zeros(()), torch.zeros(0)
    norms = over_ranks(torch.stack(torch._foreach_norm(grads)), present, split)
    total = torch.linalg.vector_norm(norms)
    if max_norm is None:
        return total, norms
    if optimizer is not None and optimizer.defaults.get("fused") and total.dtype == torch.float32:
        # what torch's fused kernels divide by: a float32, too coarse for other gradients
        cast(Any, optimizer).grad_scale = ((total + 1e-6) / max_norm).clamp(min=1.0)
    else:
        torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total, norms


class _Light(torch.optim.Optimizer):
    """torch wraps these calls, and its optimizers' `step`, to keep them out of torch.compile, and for that imports
    torch._dynamo: 800 modules, 75 MB, two seconds. No optimizer is compiled here."""
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


def _light(kind: type[torch.optim.Optimizer]) -> Any:
    return type(kind.__name__, (_Light, kind), {"step": torch.no_grad()(inspect.unwrap(kind.step))})


class _MultiTensor(_Light):
    """A step for all tensors of a group at once."""
    grad_scale: Tensor | None = None              # what gradients are to be divided by

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        self._move([(group, params) for group, params in groups if params])
        return loss

    def _move(self, groups: list[tuple[dict, list[Tensor]]]) -> None:
        """Groups, and those of their parameters that have gradients."""
        raise NotImplementedError

    def _adamw(self, weights: list[Tensor], params: list[Tensor], group: dict, *, lr: float | Tensor,
               weight_decay: float, first_step: float = 0.0) -> None:
        """torch's fused AdamW by the gradients and moments of `params`, added to `weights`. `first_step`: where the
        count of a parameter's steps begins."""
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.full((), first_step, device=p.device), exp_avg=torch.zeros_like(p),
                                     exp_avg_sq=torch.zeros_like(p))
        grads = [_laid_out_like(p, p.grad) for p in params if p.grad is not None]
        m, v, steps = ([self.state[p][x] for p in params] for x in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(weights, grads, m, v, [], steps, lr=lr, beta1=beta1, beta2=beta2,
                            weight_decay=weight_decay, eps=group["eps"], amsgrad=False, maximize=False,
                            grad_scale=self.grad_scale)


class Lamb(_MultiTensor):
    """Layer-wise adaptive moments: Adam whose step in each tensor is a fraction lr of the tensor's own norm.

    For each tensor w with gradient g, at the t-th gradient of that tensor:

        m = β1·m + (1 - β1)·g                   m̂ = m / (1 - β1^t)
        v = β2·v + (1 - β2)·g²                  v̂ = v / (1 - β2^t)     without bias_correction: m̂ = m, v̂ = v
        r = m̂ / (√v̂ + eps) + weight_decay·w
        trust = min(‖w‖, max_weight_norm) / ‖r‖                        1 where a norm is 0, or without trust_ratio
        w = w - lr·trust·r

    You et al., arXiv:1904.00962, algorithm 2, with phi(x) = min(x, max_weight_norm), or x where that is None. The
    paper's version 3 and the 2019 codes leave the bias correction out; NVIDIA's NVLAMB has it (and divides the
    gradient by its global norm first: that is `clip_`'s part here). The cybertronai code had no guard
    against ‖w‖ = 0, so that what began at zero, all biases, never moved; here it does. Without trust_ratio this is
    torch.optim.AdamW.

    Parameters and moments are float32. After a step `norms` holds ‖w‖, ‖r‖ and trust on the device, one entry for each
    tensor that had a gradient, by the names of the 2019 histograms: weight_norm, adam_norm, trust_ratio.
    """

    def __init__(self, params: Iterable, lr: float | Tensor, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-6, weight_decay: float = 0.0, *, bias_correction: bool = True,
                 trust_ratio: bool = True, max_weight_norm: float | None = 10.0):
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "bias_correction": bias_correction,
            "trust_ratio": trust_ratio, "max_weight_norm": max_weight_norm,
            "fused": True})               # makes load_state_dict put "step" on the parameter's device, in float32
        for group in self.param_groups:
            if any(p.dtype in (torch.float16, torch.bfloat16) for p in group["params"]):
                raise TypeError("LAMB's moments have the precision of the parameters, and 16 bits are too few. "
                                "Keep the parameters in float32 and compute under autocast.")
        self.norms: dict[str, Tensor] = {}
        self.split: Sequence[tuple[Tensor, Tensor]] = ()          # of one tensor each: see clip_

    def _move(self, groups: list[tuple[dict, list[Tensor]]]) -> None:
        moved = [self._step(params, group) for group, params in groups]
        self.norms = {name: torch.cat([norms[name] for norms in moved]) for name in (moved[0] if moved else ())}

    def _step(self, params: list[Tensor], group: dict) -> dict[str, Tensor]:
        updates = self._updates(params, group)
        norms = torch.stack([torch.stack(torch._foreach_norm(x)) for x in (params, updates)])
        weight_norm, update_norm = of_tables(norms, params, self.split)
        trust = torch.ones_like(weight_norm)
        if group["trust_ratio"]:
            cap = group["max_weight_norm"]
            phi = weight_norm if cap is None else weight_norm.clamp(max=cap)
            trust = torch.where((weight_norm > 0) & (update_norm > 0), phi / update_norm, trust)
        # The ratios stay on the device, one scalar a tensor, and are multiplied in while the weights are written.
        torch._foreach_addcmul_(params, updates, list((trust * -group["lr"]).unbind()))
        return {"weight_norm": weight_norm, "adam_norm": update_norm, "trust_ratio": trust}

    def _updates(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """r of every tensor. Moves the moments on; leaves gradients and weights as they are.

        torch's fused AdamW adds its step, at a learning rate of -1, to what it takes for weights and is weight_decay·w:
        one pass over gradients and moments, and the one temporary is r.
        """
        decay = group["weight_decay"]
        updates = list(torch._foreach_mul(params, decay)) if decay else [torch.empty_like(p) for p in params]
        if not decay:
            torch._foreach_zero_(updates)
        begin = 0.0 if group["bias_correction"] else math.inf          # where β^t is 0, and the correction none
        self._adamw(updates, params, group, lr=-1.0, weight_decay=0.0, first_step=begin)
        return updates


class Muon(_MultiTensor):
    """Steps of the layers' matrices that are orthogonal, so that no direction of a gradient drowns the others; AdamW
    for all else: embeddings, softmax, norms, biases.

    For a matrix w, two-dimensional and called layers.*, with gradient g:

        b = momentum·b + (1 - momentum)·g
        u = momentum·b + (1 - momentum)·g
        w = w - lr·(weight_decay·w + 0.2·√(larger side of w)·orthogonal(u))

    Jordan et al., "Muon", 2024; the factor, which gives the entries of a step the size that they have with AdamW and so
    one lr to both, is of Liu et al., arXiv:2502.16982. With betas, eps, lr and weight_decay the rest is AdamW's.
    Each rank makes all matrices orthogonal for itself: 0.67 TFLOP a step for nvidia_base, 3 % of what one GPU has to do
    for its 49,152 tokens, and a quarter of what each of 8 has.
    """

    def __init__(self, params: Iterable, lr: float | Tensor, betas: tuple[float, float] = (0.9, 0.999),
                 eps: float = 1e-8, weight_decay: float = 0.0, *, momentum: float = 0.95):
        named = list(params)
        super().__init__(named, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                 "momentum": momentum, "fused": True})
        self._matrices = {p for name, p in named if p.ndim == 2 and name.startswith("layers.")}

    def _move(self, groups: list[tuple[dict, list[Tensor]]]) -> None:
        for group, params in groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in params:
                if p in self._matrices:
                    by_shape.setdefault(p.shape, []).append(p)
            for alike in by_shape.values():
                self._turn(alike, group)
            if rest := [p for p in params if p not in self._matrices]:
                self._adamw(rest, rest, group, lr=group["lr"], weight_decay=group["weight_decay"])

    def _turn(self, params: list[Tensor], group: dict) -> None:
        """A step of matrices of one shape: one product for all of them."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in params if p.grad is not None]
        if self.grad_scale is not None:
            torch._foreach_div_(grads, self.grad_scale)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        steps = orthogonal(torch.stack(torch._foreach_lerp(grads, momenta, group["momentum"])))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(steps.unbind()),
                            alpha=-0.2 * math.sqrt(max(params[0].shape)) * group["lr"])


def orthogonal(matrices: Tensor) -> Tensor:
    """U Vᵀ of each matrix U S Vᵀ, [..., rows, columns], nearly: singular values come to lie about 0.7 to 1.2.

    Five Newton-Schulz steps x <- a·x + b·(x xᵀ) x + c·(x xᵀ)² x, whose a, b and c (Jordan's) raise small singular
    values quickly and do not converge. In bfloat16 where the device has it in hardware.
    """
    fast = matrices.is_cuda and torch.cuda.get_device_capability(matrices.device) >= (8, 0)
    x = matrices.to(torch.bfloat16 if fast else torch.float32)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def _laid_out_like(p: Tensor, grad: Tensor) -> Tensor:
    """The fused kernel reads memory in order: on a CPU (torch 2.13) other strides give wrong numbers and no error."""
    return grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
