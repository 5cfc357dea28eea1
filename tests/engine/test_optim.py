import copy
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from engine import optim
from engine.config import Optim
from engine.optim import Lamb, clip_

SHAPES = [(3, 4), (5,), (2, 3, 2), (1,)]


def tensors(dtype=torch.float32, scale=1.0, seed=0) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(scale * torch.randn(shape, generator=g, dtype=dtype)) for shape in SHAPES]


def gradients(params, step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in params]


def trained(kind, *, steps=20, lr=lambda step: 0.02, params=None, **options) -> list[torch.Tensor]:
    params = params or tensors()
    optimizer = kind(params, lr=lr(0), **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr(step)
        for p, grad in zip(params, gradients(params, step)):
            p.grad = grad
        optimizer.step()
    return [p.detach() for p in params]


def lamb_in_loops(w, grads, lr, betas, eps, weight_decay, bias_correction, cap) -> list[float]:
    """One tensor as a list of numbers, line by line from algorithm 2 of arXiv:1904.00962."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for t, grad in enumerate(grads, start=1):
        r = []
        for i, g in enumerate(grad):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            m_hat = m[i] / (1 - betas[0] ** t) if bias_correction else m[i]
            v_hat = v[i] / (1 - betas[1] ** t) if bias_correction else v[i]
            r.append(m_hat / (math.sqrt(v_hat) + eps) + weight_decay * w[i])
        weight_norm, r_norm = math.hypot(*w), math.hypot(*r)
        phi = weight_norm if cap is None else min(weight_norm, cap)
        w = [x - lr * phi / r_norm * y for x, y in zip(w, r)]
    return w


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize(("weight_decay", "cap"), [(0.0, 10.0), (0.1, None), (0.1, 1.5)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_lamb_is_the_papers_formula(bias_correction, weight_decay, cap, dtype, rtol):
    start = tensors(dtype)
    result = trained(Lamb, params=copy.deepcopy(start), steps=6, betas=(0.9, 0.99), eps=1e-3,
                     weight_decay=weight_decay, bias_correction=bias_correction, max_weight_norm=cap)
    for i, (before, after) in enumerate(zip(start, result)):
        grads = [gradients(start, step)[i].double().flatten().tolist() for step in range(6)]
        expected = lamb_in_loops(before.detach().double().flatten().tolist(), grads, 0.02, (0.9, 0.99), 1e-3,
                                 weight_decay, bias_correction, cap)
        assert_close(after.flatten().double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_its_trust_ratio_lamb_is_adamw(weight_decay):
    options = {"betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    assert_close(trained(Lamb, trust_ratio=False, **options), trained(torch.optim.AdamW, **options))


def test_a_tensor_that_missed_some_gradients_is_corrected_by_its_own_count():
    def sometimes(kind, **options):
        params = tensors()
        optimizer = kind(params, lr=0.01, weight_decay=0.0, eps=1e-8, **options)
        for step in range(6):
            for i, (p, grad) in enumerate(zip(params, gradients(params, step))):
                p.grad = None if i == 1 and step < 4 else grad
            before = params[1].detach().clone()
            optimizer.step()
            assert torch.equal(before, params[1]) == (step < 4)
        return params
    assert_close(sometimes(Lamb, trust_ratio=False), sometimes(torch.optim.AdamW))


def test_with_no_gradient_at_all_nothing_happens():
    params = tensors()
    optimizer = Lamb(params, lr=1.0)
    optimizer.step()
    assert_close(params, tensors(), rtol=0, atol=0)
    assert optimizer.norms == {}
    assert not optimizer.state


def test_a_tensor_of_zeros_moves_by_lr_times_adams_step():
    bias = torch.nn.Parameter(torch.zeros(4))
    optimizer = Lamb([bias], lr=0.5, eps=0.0)
    bias.grad = torch.tensor([1.0, -2.0, 3.0, -4.0])
    optimizer.step()
    assert_close(bias.detach(), torch.tensor([-0.5, 0.5, -0.5, 0.5]))       # m̂/√v̂ is the gradient's sign


def test_a_gradient_of_zeros_changes_nothing_and_makes_no_nan():
    params = tensors()
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = Lamb(params, lr=1.0)
    optimizer.step()
    assert_close(params, tensors(), rtol=0, atol=0)
    assert optimizer.norms["trust_ratio"].tolist() == [1.0] * len(params)


def test_a_step_moves_each_tensor_by_lr_times_its_capped_norm():
    small, large = torch.nn.Parameter(torch.full((4,), 0.5)), torch.nn.Parameter(torch.full((4,), 50.0))
    small.grad = large.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    optimizer = Lamb([small, large], lr=0.1, max_weight_norm=10.0)
    optimizer.step()
    assert (small - 0.5).norm().item() == pytest.approx(0.1 * 1)
    assert (large - 50).norm().item() == pytest.approx(0.1 * 10, rel=1e-5)
    assert optimizer.norms["weight_norm"].tolist() == [1.0, 100.0]
    assert_close(optimizer.norms["trust_ratio"], torch.tensor([1.0, 10.0]) / optimizer.norms["adam_norm"])


def test_the_learning_rate_of_a_group_takes_effect_at_once_and_may_be_a_tensor():
    def falling(step):
        return 0.1 / (1 + step)
    for p, q, start in zip(trained(Lamb, lr=falling, steps=3),
                           trained(Lamb, lr=lambda step: torch.tensor(falling(step)), steps=3),
                           trained(Lamb, steps=0)):
        assert_close(p, q)
        assert not torch.equal(p, start)
    still = trained(Lamb, lr=lambda step: 0.0)
    assert_close(still, trained(Lamb, steps=0), rtol=0, atol=0)


def test_groups_have_their_own_learning_rates_and_their_norms_stand_in_a_row():
    params = tensors()
    optimizer = Lamb([{"params": params[:1], "lr": 0.0}, {"params": params[1:]}], lr=0.1)
    for p, grad in zip(params, gradients(params, 0)):
        p.grad = grad
    optimizer.step()
    assert [torch.equal(p, start) for p, start in zip(params, tensors())] == [True, False, False, False]
    assert_close(optimizer.norms["weight_norm"], torch.stack([start.detach().norm() for start in tensors()]))


def test_a_gradient_with_other_strides_gives_the_same_step():
    row, column = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
    row.grad = torch.arange(12.0).reshape(3, 4)
    column.grad = row.grad.t().contiguous().t()
    for p in (row, column):
        Lamb([p], lr=0.1).step()
    assert_close(row, column, rtol=0, atol=0)


def test_a_step_leaves_the_gradients_alone():
    params = tensors()
    for p, grad in zip(params, gradients(params, 0)):
        p.grad = grad
    Lamb(params, lr=0.1).step()
    assert_close([p.grad for p in params], gradients(params, 0), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lamb", "adamw", "adam", "sgd", "adagrad"])
def test_stopped_and_resumed_equals_never_stopped_to_the_last_bit(name):
    def run(params, optimizer, steps):
        for step in steps:
            for p, grad in zip(params, gradients(params, step)):
                p.grad = grad
            optimizer.step()

    def fresh():
        params = tensors()
        named = [(f"layer.{i}", p) for i, p in enumerate(params)]
        return params, optim.build(named, Optim(name, lr=0.1, weight_decay=0.01, momentum=0.9), lr=0.02)

    through, optimizer = fresh()
    run(through, optimizer, range(10))
    stopped, optimizer = fresh()
    run(stopped, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"weights": stopped, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, optimizer = fresh()
    torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(saved["weights"]), resumed)
    optimizer.load_state_dict(saved["optimizer"])
    run(resumed, optimizer, range(4, 10))
    assert_close(resumed, through, rtol=0, atol=0)
    assert not torch.equal(stopped[0], through[0])


@pytest.mark.parametrize(("name", "judge"), [
    ("adamw", lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.1)),
    ("adam", lambda p: torch.optim.Adam(p, lr=0.02, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.1)),
    ("sgd", lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1)),
    ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.02, eps=1e-5, weight_decay=0.1)),
    ("lamb", lambda p: Lamb(p, lr=0.02, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.1)),
])
def test_build_makes_the_optimizer_that_is_named(name, judge):
    values = Optim(name, lr=5.0, betas=(0.8, 0.9), eps=1e-5, weight_decay=0.1, momentum=0.9)
    named = trained(lambda p, lr: optim.build([(str(i), x) for i, x in enumerate(p)], values, lr))
    assert_close(named, trained(lambda p, lr: judge(p)))


def of_layers(params) -> list[tuple[str, torch.nn.Parameter]]:
    """As a model names them: matrices of layers, one elsewhere, a bias."""
    return [(name, params[i]) for i, name in enumerate(("layers.0.w", "table.w", "layers.0.b", "layers.1.w"))]


def matrices() -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in ((6, 4), (5, 3), (4,), (4, 6))]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_what_is_made_orthogonal_keeps_its_singular_vectors_and_has_singular_values_near_one(shape):
    g = torch.Generator().manual_seed(0)
    several = torch.randn(3, *shape, generator=g) * 100
    for before, after in zip(several, optim.orthogonal(several)):
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        rotated = u.T @ after @ vh.T
        assert_close(rotated, rotated.diagonal().diag(), atol=2e-3, rtol=0)
        assert s.max() / s.min() > 2
        assert rotated.diagonal().min() > 0.6
        assert rotated.diagonal().max() < 1.3


def test_muon_is_torchs_for_the_layers_matrices_and_adamw_for_the_rest():
    ours, theirs = matrices(), matrices()
    options = {"betas": (0.8, 0.9), "eps": 1e-5, "weight_decay": 0.1}
    moving = optim.build(of_layers(ours), Optim("muon", lr=5.0, momentum=0.9, **options), lr=0.02)
    judges = [torch.optim.Muon([theirs[0], theirs[3]], lr=0.02, momentum=0.9, weight_decay=0.1,
                               adjust_lr_fn="match_rms_adamw"),
              torch.optim.AdamW([theirs[1], theirs[2]], lr=0.02, **options)]
    for step in range(10):
        for p, q, grad in zip(ours, theirs, gradients(ours, step)):
            p.grad, q.grad = grad, grad.clone()
        for optimizer in (moving, *judges):
            optimizer.step()
    for p, q in zip(ours[1:3], theirs[1:3]):
        assert_close(p, q)
    for p, q, before in zip(ours, theirs, matrices()):           # torch's Newton-Schulz is in bfloat16, of 8 bits
        assert (p - q).norm() < 0.02 * (q - before).norm()


def test_muon_stopped_and_resumed_is_muon():
    def some(params, optimizer, steps):
        for step in steps:
            for p, grad in zip(params, gradients(params, step)):
                p.grad = grad
            optimizer.step()
    through, stopped = matrices(), matrices()
    whole = optim.build(of_layers(through), Optim("muon", lr=1.0, momentum=0.9), lr=0.02)
    some(through, whole, range(6))
    first = optim.build(of_layers(stopped), Optim("muon", lr=1.0, momentum=0.9), lr=0.02)
    some(stopped, first, range(3))
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in stopped]
    second = optim.build(of_layers(resumed), Optim("muon", lr=1.0, momentum=0.9), lr=0.02)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    some(resumed, second, range(3, 6))
    assert_close(resumed, through, rtol=0, atol=0)


@pytest.mark.parametrize("option", [{"bias_correction": False}, {"trust_ratio": False}, {"max_weight_norm": 1.0},
                                    {"max_weight_norm": None}])
def test_build_hands_lambs_options_on(option):
    optimizer = optim.build([("w", tensors()[0])], Optim("lamb", lr=0.1, **option), lr=0.1)
    expected = {"bias_correction": True, "trust_ratio": True, "max_weight_norm": 10.0} | option
    assert {name: optimizer.param_groups[0][name] for name in expected} == expected


def test_build_leaves_frozen_parameters_out():
    params = tensors()
    params[0].requires_grad_(False)
    optimizer = optim.build([(str(i), p) for i, p in enumerate(params)], Optim("lamb", lr=0.1), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["1", "2", "3"]


def test_lamb_refuses_16_bit_parameters():
    with pytest.raises(TypeError, match="Keep the parameters in float32"):
        Lamb([torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], lr=0.1)


@pytest.mark.parametrize("max_norm", [0.25, 3.0, 1e9, None])
def test_clipping_is_torchs(max_norm):
    ours, theirs = tensors(), tensors()
    for params in (ours, theirs):
        for p, grad in zip(params, gradients(params, 0)):
            p.grad = grad
        params[2].grad = None
    total, norms = clip_(iter(ours), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    assert_close(total, expected, rtol=0, atol=0)
    assert_close(norms, torch.stack([gradients(ours, 0)[i].norm() for i in (0, 1, 3)]))
    for p, q in zip(ours, theirs):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


def test_clipping_nothing_measures_zero():
    total, norms = clip_(tensors(), 0.25)
    assert total.item() == 0
    assert norms.shape == (0,)


class Ops(TorchDispatchMode):
    """The names of the operations that reach a device."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def ops_of_a_clipped_step(n: int) -> list[str]:
    params = [torch.nn.Parameter(torch.randn(3)) for _ in range(n)]
    optimizer = Lamb(params, lr=0.1, weight_decay=0.01)
    for p in params:
        p.grad = torch.randn(3)
    optimizer.step()                                   # makes the moments
    with Ops() as ops:
        clip_(params, 0.25)
        optimizer.step()
    return ops.names


def test_a_lamb_step_takes_as_many_operations_for_fifty_tensors_as_for_two():
    assert ops_of_a_clipped_step(50) == ops_of_a_clipped_step(2)


def test_a_lamb_step_never_waits_for_the_device():
    waits = ("_local_scalar_dense", "_to_copy", "nonzero", "is_nonzero", "equal.default")
    assert not [name for name in ops_of_a_clipped_step(3) if any(wait in name for wait in waits)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bias_correction", [False, True])
def test_on_a_gpu_clipping_and_lamb_give_the_cpus_numbers_without_waiting(bias_correction):
    def run(device):
        params = [torch.nn.Parameter(p.detach().to(device)) for p in tensors()]
        optimizer = Lamb(params, lr=0.02, weight_decay=0.1, bias_correction=bias_correction)
        for step in range(5):
            for p, grad in zip(params, gradients(tensors(), step)):
                p.grad = grad.to(device)
            torch.cuda.set_sync_debug_mode("error")
            try:
                clip_(params, 0.25)
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [p.detach().cpu() for p in params]
    assert_close(run("cuda"), run("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_goes_on_from_a_state_that_was_loaded_on_the_cpu():
    def step(params, optimizer):
        for p, grad in zip(params, gradients(tensors(), 0)):
            p.grad = grad.to(p.device)
        optimizer.step()
    here = tensors()
    optimizer = Lamb(here, lr=0.02)
    step(here, optimizer)
    there = [torch.nn.Parameter(p.detach().cuda()) for p in here]
    other = Lamb(there, lr=0.02)
    other.load_state_dict(optimizer.state_dict())
    step(here, optimizer)
    step(there, other)
    assert_close([p.detach().cpu() for p in there], [p.detach() for p in here])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad", "lamb", "muon"])
@pytest.mark.parametrize("max_norm", [0.25, 1e9, None])
def test_a_step_that_clips_as_it_reads_is_one_of_gradients_that_were_clipped(name, max_norm):
    def weights(clip):
        params = tensors()
        named = [(f"layers.{i}", p) for i, p in enumerate(params)]
        optimizer = optim.build(named, Optim(name, lr=.02, weight_decay=.1), .02)
        for step in range(3):
            for p, grad in zip(params, gradients(params, step)):
                p.grad = grad
            clip(params, optimizer)
            optimizer.step()
        return [p.detach() for p in params]

    def first(params, optimizer):
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, max_norm)
    assert_close(weights(lambda params, optimizer: clip_(params, max_norm, optimizer)), weights(first))


def test_no_optimizer_loads_what_compiles():
    """It would take seconds and 75 MB, of every process."""
    program = """
import sys, typing, torch
from engine import optim
from engine.config import Optim
for name in typing.get_args(typing.get_type_hints(Optim)["name"]):
    p = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = optim.build([("layers.p", p)], Optim(name, lr=.1), .1)
    p.grad = torch.ones(3, 3)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    print(name, p.requires_grad, (p < 1).all().item(), "torch._dynamo" in sys.modules)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                          cwd=Path(optim.__file__).parent.parent).stdout
    assert said.splitlines() == [f"{name} True True False"
                                 for name in ("lamb", "adamw", "adam", "sgd", "adagrad", "muon")]
