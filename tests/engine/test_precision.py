"""Precision: refused where the device cannot, and what MFU is measured against."""
from __future__ import annotations

import json

import pytest
import torch

from engine.metrics import Metrics, brief, peak_flops, ppl
from engine.precision import precision_for
from engine.values import BadValue

CPU = torch.device("cpu")


def test_tf32_on_a_processor_is_refused_with_what_to_use():
    with pytest.raises(BadValue, match=r"recipe\.precision=fp32"):
        precision_for("tf32", CPU)


@pytest.mark.parametrize(("name", "dtype"), [
    ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_matrix_products_have_the_precision_and_the_loss_has_fp32(name, dtype):
    x = torch.randn(4, 4)
    with precision_for(name, CPU).autocast():
        assert (x @ x).dtype == dtype
        assert torch.nn.functional.cross_entropy(x @ x, torch.arange(4)).dtype == torch.float32


def test_only_fp16_scales_its_loss():
    assert [precision_for(name, CPU).scaler().is_enabled() for name in ("fp32", "bf16", "fp16")] == [False, False, True]


def test_peaks_are_known_by_gpu_and_precision():
    assert peak_flops("Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert peak_flops("NVIDIA A100-SXM4-40GB", "tf32") == 156e12
    assert peak_flops("Tesla V100-SXM2-32GB", "bf16") is None
    assert peak_flops("a CPU", "fp32") is None


def test_numbers_are_brief():
    assert [brief(x) for x in (12, 1234, 78_640_000, 1.8e9)] == ["12", "1.23k", "78.6M", "1.8G"]
    assert ppl(0.0) == 1
    assert ppl(1e6) == float("inf")


def test_resumed_metrics_forget_what_came_after_the_checkpoint(tmp_path):
    records = [{"kind": "train", "step": 1}, {"kind": "train", "step": 5}, {"kind": "test", "step": 5},
               {"kind": "train", "step": 6}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"kind": "tra')
    metrics = Metrics(tmp_path, step=5, tokens=100, active=True)
    metrics.write("train", 7, 140, loss=1.0, mfu=None)
    metrics.close()
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kept == [*records[:2], {"kind": "train", "step": 7, "tokens": 140, "loss": 1.0}]
