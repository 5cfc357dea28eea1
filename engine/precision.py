"""Precision as a value: which numbers the matrix products use, and whether gradients are scaled."""
from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from engine.config import Precision as Name
from engine.values import BadValue


@dataclass(frozen=True)
class Precision:
    """Weights, optimizer state, norms and the loss are fp32 in all of them."""
    name: Name
    device: torch.device
    compute: torch.dtype                          # of matrix products
    scaled: bool                                  # fp16: the loss is scaled so that small gradients survive

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales nothing where the precision needs no scaling. Starts at 2**16, doubles after 1000 clean steps."""
        return torch.amp.GradScaler(self.device.type, init_scale=2.0 ** 16, growth_interval=1000, enabled=self.scaled)


def precision_for(name: Name, device: torch.device) -> Precision:
    """Raises BadValue where the device cannot do it. Sets the process's mode for fp32 products: tf32 or not."""
    if name == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise BadValue(f"tf32 needs an NVIDIA GPU of the Ampere generation or newer; here is {describe(device)}. "
                       f"Use --set recipe.precision=fp32")
    if name == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise BadValue(f"{describe(device)} has no bf16. Use --set recipe.precision=fp16")
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
    return Precision(name, device, compute, scaled=name == "fp16")


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
