"""The judges are torch's own layers in float64, and formulas."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.fused import Dropout, Linear, Part, as_on_a_gpu, attention, softmax_nll


def grads(loss: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, tensors)


def random(*shape: int, dtype: torch.dtype = torch.float64, requires_grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(requires_grad)


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (1, 1, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_and_its_gradients_are_those_of_float64(shape, bias):
    torch.manual_seed(0)
    truth = torch.nn.Linear(5, 6, bias=bias, dtype=torch.float64)
    ours = Linear(5, 6, bias=bias)
    ours.load_state_dict(truth.state_dict())
    truth.load_state_dict(ours.state_dict())      # rounded
    x = random(*shape, dtype=torch.float32)
    exact = x.detach().double().requires_grad_()
    weights = random(*shape[:-1], 6, requires_grad=False)
    y, z = ours(x), truth(exact)
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=1e-6)
    for got, wanted in zip(grads((y * weights.float()).sum(), x, *ours.parameters()),
                           grads((z * weights).sum(), exact, *truth.parameters())):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_making_a_linear_map_draws_nothing():
    before = torch.get_rng_state()
    Linear(5, 6)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_linear_map_takes_what_is_not_laid_out_in_rows():
    torch.manual_seed(0)
    layer, x = Linear(5, 6), random(5, 7, dtype=torch.float32).t()
    layer.load_state_dict(torch.nn.Linear(5, 6).state_dict())
    torch.testing.assert_close(layer(x), F.linear(x.contiguous(), layer.weight, layer.bias))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_and_the_mean(p):
    """Within five standard deviations of a binomial's, at every place modulo the four that share a draw."""
    torch.manual_seed(0)
    n = 100_003
    dropped = Dropout(p)(torch.ones(n))
    for first in range(4):
        part = dropped[first::4]
        share = (part != 0).double().mean().item()
        assert abs(share - (1 - p)) < 5 * (p * (1 - p) / len(part)) ** 0.5
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=2e-4, atol=0)


def test_dropout_drops_the_gradient_of_what_it_drops_and_is_another_each_time():
    torch.manual_seed(0)
    x, layer = torch.ones(50, 41, requires_grad=True), Dropout(.3)
    y = layer(x)
    assert torch.equal(grads(y.sum(), x)[0], y.detach())
    assert not torch.equal(layer(x), y)
    torch.manual_seed(0)
    assert torch.equal(layer(x), y)
    assert torch.equal(layer.eval()(x), x)


def losses(h, table, extra, bias, tail_bias, target, rows):
    """A head of 6 words and 2 more scores, and a tail of the 5 words that follow, over the rows that are in it."""
    head_target = torch.where(target >= 6, 6, target)
    return ([h, h[rows]], [head_target, target[rows] - 6], [[Part(0, 0, 6), Part(1, 0, 2)], [Part(0, 6, 11)]],
            [table, extra], [bias, tail_bias])


@pytest.mark.parametrize("tail", [[1, 4], []])
def test_losses_and_gradients_of_several_softmaxes_are_those_of_autograd(tail):
    torch.manual_seed(0)
    target, rows = torch.tensor([0, 7, 5, -1, 10, 2]), torch.tensor(tail, dtype=torch.int64)
    if not tail:
        target = target.clamp(max=5)
    tensors = (random(6, 4), random(11, 4), random(2, 4), random(8), random(5))
    weights = torch.rand(6, dtype=torch.float64)
    h, table, extra, bias, tail_bias = tensors
    states, targets, parts, ws, biases = losses(*tensors, target, rows)

    ours = softmax_nll(states, targets, parts, ws, biases)
    truth = (F.cross_entropy(h @ torch.cat([table[:6], extra]).T + bias, targets[0], ignore_index=-1, reduction="none"),
             F.cross_entropy(h[rows] @ table[6:].T + tail_bias, targets[1], reduction="none"))
    for got, wanted in zip(ours, truth):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    both = [(x[0] * weights).sum() + (x[1] * weights[rows]).sum() for x in (ours, truth)]
    for got, wanted in zip(grads(both[0], *tensors), grads(both[1], *tensors)):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_scores_in_many_pieces_lose_what_those_in_one_lose(monkeypatch):
    torch.manual_seed(0)
    h, table, bias, target = random(9, 4), random(50, 4), random(50), torch.randint(0, 50, (9,))
    def loss():
        nll, = softmax_nll([h], [target], [[Part(0, 0, 50)]], [table], [bias])
        return nll, *grads(nll.sum(), h, table, bias)
    whole = loss()
    monkeypatch.setattr("engine.fused.CHUNK_BYTES", {True: 1000, False: 1000})
    for got, wanted in zip(loss(), whole):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [1 << 14, 7])
def test_under_autocast_losses_are_float32_and_gradients_within_16_bits(monkeypatch, rows):
    """Also where the table is turned into 16 bits in pieces."""
    monkeypatch.setattr("engine.fused.BLOCK", rows)
    torch.manual_seed(0)
    h, table, bias, target = (random(40, 16, dtype=torch.float32), random(30, 16, dtype=torch.float32),
                              random(30, dtype=torch.float32), torch.randint(0, 30, (40,)))
    with torch.autocast("cpu", torch.bfloat16):
        nll, = softmax_nll([h], [target], [[Part(0, 0, 30)]], [table], [bias])
    exact = F.cross_entropy(F.linear(h, table, bias), target, reduction="none")
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, exact, rtol=.02, atol=.05)
    for got, wanted in zip(grads(nll.mean(), h, table, bias), grads(exact.mean(), h, table, bias)):
        assert got.dtype == torch.float32
        assert (got - wanted).norm() < .02 * wanted.norm()


def test_a_weight_that_is_frozen_gets_no_gradient_and_spoils_no_other():
    torch.manual_seed(0)
    h, table, bias, target = random(9, 4), random(7, 4, requires_grad=False), random(7), torch.randint(0, 7, (9,))
    nll, = softmax_nll([h], [target], [[Part(0, 0, 7)]], [table], [bias])
    nll.sum().backward()
    assert table.grad is None
    exact = F.cross_entropy(h @ table.T + bias, target, reduction="sum")
    torch.testing.assert_close((h.grad, bias.grad), grads(exact, h, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows_differ", [False, True])
def test_attention_with_a_learned_bias_and_its_gradients_are_the_formulas(rows_differ):
    torch.manual_seed(0)
    B, N, Q, K, H = 2, 3, 4, 6, 5
    q, k, v, bias = random(B, N, Q, H), random(B, N, K, H), random(B, N, K, H), random(B, N, Q, K)
    visible = torch.ones(Q, K, dtype=torch.bool).tril(K - Q)
    if rows_differ:
        visible = visible.expand(B, 1, Q, K).clone()
        visible[1, :, :, :2] = False
    seen = visible.expand(B, N, Q, K)
    weights = torch.rand(B, N, Q, H, dtype=torch.float64)

    truth = torch.zeros(B, N, Q, H, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for i in range(Q):
                keys = [j for j in range(K) if seen[b, n, i, j]]
                e = torch.stack([((q[b, n, i] * k[b, n, j]).sum() + bias[b, n, i, j]) / H ** .5 for j in keys]).exp()
                truth[b, n, i] = sum(e[x] / e.sum() * v[b, n, j] for x, j in enumerate(keys))
    ours = attention(q, k, v, bias, visible)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v, bias, visible), truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    for got, wanted in zip(grads((ours * weights).sum(), q, k, v, bias), grads((truth * weights).sum(), q, k, v, bias)):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_a_gpus_operations_give_the_numbers_of_a_cpus():
    torch.manual_seed(0)
    x = [random(2, 3, 4, 5, dtype=torch.float32) for _ in range(3)]
    bias, visible = random(2, 3, 4, 4, dtype=torch.float32), torch.ones(4, 4, dtype=torch.bool).tril()
    layer = Linear(5, 6)
    layer.load_state_dict(torch.nn.Linear(5, 6).state_dict())

    def run():
        y = layer(attention(*x, bias, visible))
        return y, *grads(y.sum(), *x, bias)
    ours = run()
    with as_on_a_gpu():
        theirs = run()
    for got, wanted in zip(ours, theirs):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
