"""How fast a GPU can be at best. Standard library only: the launcher estimates with it, the trainer measures by it."""
from __future__ import annotations

# Dense peak in TFLOP/s by GPU and precision, from NVIDIA's data sheets (SXM variants); without sparsity.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "V100": {"fp32": 15.7, "fp16": 125},
    "A100": {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312},
    "H100": {"fp32": 67, "tf32": 494, "bf16": 989, "fp16": 989},
    "H200": {"fp32": 67, "tf32": 494, "bf16": 989, "fp16": 989},
}
