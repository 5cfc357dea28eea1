import torch

from engine import memory
from engine.fused import Part, softmax_nll


def test_memory_apart_is_given_again_when_nothing_shares_it_any_more_and_not_before(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1000)
    like = torch.ones(50, 10).t()
    first = memory.empty_like(like).fill_(1)
    assert (first.shape, first.dtype, first.is_contiguous()) == (like.shape, like.dtype, True)
    place, part = first.data_ptr(), first[3:]
    del first
    second = memory.empty_like(like).fill_(2)
    assert second.data_ptr() != place
    assert part.eq(1).all()
    del part
    assert memory.empty_like(like).data_ptr() == place


def test_a_gradient_is_made_where_the_last_steps_was_and_not_where_one_is_kept(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1000)
    table, bias = torch.randn(60, 8, requires_grad=True), torch.zeros(60)
    h, target = torch.randn(5, 8), torch.arange(5)

    def backward() -> int:
        softmax_nll([h], [target], [[Part(0, 0, 60)]], [table], [bias])[0].sum().backward()
        return table.grad.data_ptr()
    place = backward()
    once = table.grad.clone()
    assert backward() == place                    # a second micro-batch, added to the first
    torch.testing.assert_close(table.grad, 2 * once)
    table.grad = None
    backward()
    torch.testing.assert_close(table.grad, once)
    assert len(memory._spare[table.nbytes]) == 1  # of the two that were needed at once
