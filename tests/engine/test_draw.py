from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engine import draw as module
from engine.draw import draw

NORMAL = partial(Tensor.normal_, mean=3.0, std=0.5)


def uniform_(x: Tensor, generator: torch.Generator) -> Tensor:
    return x.uniform_(-2.0, 1.0, generator=generator)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 1000)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def drawn(seed: int, threads: int = 1) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    normal, uniform = torch.nn.Parameter(torch.empty(300, 101)), torch.nn.Parameter(torch.empty(7777))
    draw([(normal, NORMAL), (uniform, uniform_)])
    return normal.detach(), uniform.detach()


def test_a_seed_gives_the_same_numbers_on_any_number_of_threads_and_another_one_others():
    once = drawn(1)
    for threads in (1, 2, 5):
        for got, wanted in zip(drawn(1, threads), once):
            assert torch.equal(got, wanted)
    assert drawn(2)[0].ne(once[0]).float().mean() > 0.99


def test_numbers_have_their_distribution_and_those_of_one_block_are_not_those_of_another():
    normal, uniform = drawn(0)
    assert normal.mean().item() == pytest.approx(3.0, abs=5 * 0.5 / normal.numel() ** 0.5)
    assert normal.std().item() == pytest.approx(0.5, abs=5 * 0.5 / (2 * normal.numel()) ** 0.5)
    assert uniform.mean().item() == pytest.approx(-0.5, abs=5 * 3 / (12 * uniform.numel()) ** 0.5)
    assert -2 <= uniform.min() < -1.99 < 0.99 < uniform.max() <= 1
    blocks = ((normal.flatten()[:30_000].view(30, 1000) - 3) / 0.5).double()
    correlation = blocks @ blocks.T / 1000
    assert correlation.fill_diagonal_(0).abs().max() < 6 / 1000 ** 0.5


def test_what_comes_after_from_torchs_generator_does_not_depend_on_what_was_drawn():
    def after(size: int) -> Tensor:
        torch.manual_seed(0)
        draw([(torch.empty(size), NORMAL)])
        return torch.rand(3)
    assert torch.equal(after(5), after(5000))


def test_tensors_without_numbers_stay_without():
    meta = torch.empty(5000, device="meta")
    with FakeTensorMode():
        fake = torch.empty(5000)
        draw([(meta, NORMAL), (fake, NORMAL)])
    assert (meta.device.type, fake.shape) == ("meta", (5000,))
    assert fake.untyped_storage().device.type == "meta"
