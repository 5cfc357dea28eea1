"""What was published, for benchmarks.scaling: the links of machines, and speeds by number of GPUs."""
from __future__ import annotations

from dataclasses import dataclass

from engine.scaling import Links


@dataclass(frozen=True)
class Kind:
    """Machines of a kind; how its two bandwidths are known."""
    name: str
    gpu: str
    links: Links
    nvlink_source: str
    nic_source: str


LINKS = {kind.name: kind for kind in (
    Kind("p3dn.24xlarge", "V100", Links(8, 120e9, 6.25e9),
         "assumed, 80% of what NVLink has each way",
         "50 Gb/s of 100, which cybertronai saw NCCL reach on 8 to 32 of them, and 80 on 2 (NVIDIA/nccl #235, 2019)"),
    Kind("p4d.24xlarge", "A100", Links(8, 220e9, 37e9),
         "nccl-tests show 231 on one machine (NVIDIA/nccl #527)",
         "assumed, 74% of 400 Gb/s; NVIDIA/nccl #527 has 30 on 4 of them with an NCCL of 2021"),
    Kind("p5.48xlarge", "H100", Links(8, 470e9, 296e9),
         "nccl-tests show 476 on one machine with NVLink SHARP (NVIDIA/nccl-tests #290)",
         "assumed, 74% of 3,200 Gb/s as on p4d"),
    Kind("dgx1", "V100", Links(8, 120e9, 37e9), "assumed, as on p3dn", "assumed, 74% of 4 x 100 Gb/s"),
    Kind("dgx2h", "V100", Links(16, 120e9, 74e9), "assumed, as on p3dn", "assumed, 74% of 8 x 100 Gb/s"),
    Kind("dgxa100", "A100", Links(8, 220e9, 148e9), "as on p4d", "assumed, 74% of 8 x 200 Gb/s"),
)}


@dataclass(frozen=True)
class Series:
    """Weak scaling as published: tokens/s by GPUs, each with `sequences` a step."""
    name: str
    config: str                                   # which has that model and segment length
    kind: str
    sequences: int
    bits: int                                     # of a gradient's element: 16 with AMP (apex O2), cybertronai's fp16
    tokens_per_s: dict[int, float]


def _nvidia(name: str, config: str, kind: str, sequences: int, bits: int, *rates: int, first: int = 1) -> Series:
    return Series(f"NVIDIA {name}", config, kind, sequences, bits,
                  {first << i: float(rate) for i, rate in enumerate(rates)})


# cybertronai: medians of its generate_throughput_numbers.py, and its README as corrected. NVIDIA: the README of its
# PyTorch version; its rows are of one micro-batch a step, as its times to train say, which accumulate and are faster.
SERIES = (
    Series("cybertronai large, fp16, 16 a GPU", "test_1", "p3dn.24xlarge", 16, 16, {
        8 * n: 8 * n * 16 * 384 / (ms / 1000)
        for n, ms in {1: 1719.90, 2: 1785.12, 4: 1769.33, 8: 2027.51, 16: 2081.99}.items()}),
    Series("cybertronai base, fp16, 96 a GPU", "one_machine", "p3dn.24xlarge", 96, 16, {8: 172_000, 64: 1_147_000}),
    _nvidia("base, AMP, 32 a GPU", "nvidia_base", "dgxa100", 32, 16, 59_961, 113_238, 225_609, 449_890),
    _nvidia("base, TF32, 32 a GPU", "nvidia_base", "dgxa100", 32, 32, 41_527, 77_625, 153_945, 305_933),
    _nvidia("large, AMP, 16 a GPU", "nvidia_large", "dgxa100", 16, 16, 25_084, 48_562, 95_997, 191_148),
    _nvidia("large, AMP, 8 a GPU", "nvidia_large", "dgxa100", 8, 16, 21_554, 40_222, 80_226, 159_185),
    _nvidia("large, TF32, 8 a GPU", "nvidia_large", "dgxa100", 8, 32, 14_497, 27_304, 53_756, 106_651),
    _nvidia("base, AMP, 32 a GPU", "nvidia_base", "dgx1", 32, 16, 36_692, 65_889, 133_838, 258_648),
    _nvidia("base, AMP, 16 a GPU", "nvidia_base", "dgx1", 16, 16, 26_639, 45_299, 92_618, 170_532),
    _nvidia("base, FP32, 16 a GPU", "nvidia_base", "dgx1", 16, 32, 13_981, 23_163, 48_893, 97_005),
    _nvidia("large, AMP, 4 a GPU", "nvidia_large", "dgx1", 4, 16, 10_210, 17_984, 36_340, 66_716),
    _nvidia("large, AMP, 2 a GPU", "nvidia_large", "dgx1", 2, 16, 6_907, 11_272, 22_530, 40_920),
    _nvidia("large, FP32, 2 a GPU", "nvidia_large", "dgx1", 2, 32, 3_558, 6_153, 12_492, 24_595),
    _nvidia("base, AMP, 16 a GPU", "nvidia_base", "dgx2h", 16, 16, 32_875, 59_058, 113_985, 223_907, 414_994),
    _nvidia("base, FP32, 16 a GPU", "nvidia_base", "dgx2h", 16, 32, 16_150, 29_712, 58_011, 114_655, 222_920),
    _nvidia("large, AMP, 8 a GPU", "nvidia_large", "dgx2h", 8, 16, 14_787, 27_710, 54_207, 107_073, 211_387),
    _nvidia("large, FP32, 8 a GPU", "nvidia_large", "dgx2h", 8, 32, 5_169, 9_977, 19_691, 39_157, 77_568),
    _nvidia("large, AMP, 4 a GPU", "nvidia_large", "dgx2h", 4, 16, 154_950, 307_520, 605_530, 1_189_700, first=16),
    _nvidia("large, FP32, 4 a GPU", "nvidia_large", "dgx2h", 4, 32, 69_070, 136_960, 270_120, 514_500, first=16),
)
