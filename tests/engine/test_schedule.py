import math
import random
from itertools import pairwise

import pytest
import torch

from engine.config import Schedule, Stop
from engine.schedule import lr_at

PEAK = 0.01
NAMES = ["cosine", "inv_sqrt", "constant"]


def lrs(schedule: Schedule, stop: Stop, steps: int, tokens_per_step: int = 100, losses=()) -> list[float]:
    """The learning rate of each of the first `steps` updates."""
    return [lr_at(schedule, PEAK, stop, step=i, tokens=i * tokens_per_step, tokens_after=(i + 1) * tokens_per_step,
                  valid_losses=losses) for i in range(steps)]


def torch_lrs(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = make(optimizer)
    out = []
    for _ in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return out


def test_cosine_without_warmup_is_torchs():
    expected = torch_lrs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=0.001), 50)
    assert lrs(Schedule("cosine", eta_min=0.001), Stop(max_steps=50), 50) == pytest.approx(expected)


def test_cosine_after_warmup_is_torchs_begun_at_its_end():
    ours = lrs(Schedule("cosine", warmup_steps=10, eta_min=0.001), Stop(max_steps=60), 60)
    expected = torch_lrs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=0.001), 50)
    assert ours[10:] == pytest.approx(expected)


def test_inv_sqrt_is_the_ancestors_times_sqrt_of_warmup():
    def ancestor(step):                                       # of the update that follows `step` others
        return (step + 1) / 10 / math.sqrt(10) if step < 10 else step ** -0.5
    expected = torch_lrs(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda i: math.sqrt(10) * ancestor(i)), 100)
    assert lrs(Schedule("inv_sqrt", warmup_steps=10), Stop(max_steps=100), 100) == pytest.approx(expected)


def test_inv_sqrt_without_warmup_falls_with_the_root_of_steps():
    ours = lrs(Schedule("inv_sqrt"), Stop(max_steps=100), 6)
    assert ours == pytest.approx([PEAK, PEAK, PEAK / 2**0.5, PEAK / 3**0.5, PEAK / 2, PEAK / 5**0.5])


def test_constant_is_constant():
    assert lrs(Schedule("constant"), Stop(max_steps=5), 9) == [PEAK] * 9


@pytest.mark.parametrize("name", [*NAMES, "plateau"])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 8}, {"warmup_tokens": 800}])
def test_warmup_counts_the_step_being_taken_and_joins_what_follows(name, warmup):
    ours = lrs(Schedule(name, **warmup), Stop(max_steps=10_000), 10)
    assert ours[:8] == pytest.approx([PEAK * i / 8 for i in range(1, 9)])
    assert ours[8] == pytest.approx(PEAK)
    assert ours[9] == pytest.approx(PEAK, rel=0.1)


def test_warmup_that_ends_within_a_step_is_over_for_that_step():
    ours = lrs(Schedule("cosine", warmup_tokens=250), Stop(max_tokens=10_000), 5)
    assert ours[:3] == pytest.approx([PEAK * 100 / 250, PEAK * 200 / 250, PEAK])
    assert PEAK > ours[3] > ours[4]


@pytest.mark.parametrize("horizon", [{"horizon_steps": 40}, {"horizon_tokens": 4000}, {}])
@pytest.mark.parametrize("warmup", [{}, {"warmup_steps": 10}, {"warmup_tokens": 1000}])
def test_cosine_falls_to_eta_min_at_the_horizon_and_stays_there(horizon, warmup):
    stop = Stop(max_steps=100 if horizon else 40)
    ours = lrs(Schedule("cosine", eta_min=0.001, **horizon, **warmup), stop, 60)
    end = 10 if warmup else 0
    assert all(a < b for a, b in pairwise(ours[:end]))
    assert all(a > b for a, b in pairwise(ours[end:41]))
    assert ours[40:] == [0.001] * 20
    assert ours[39] > 0.001


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tokens_per_step", [1, 100, 4097])
def test_steps_and_tokens_agree_in_any_mixture_when_every_step_has_as_many_tokens(name, tokens_per_step):
    warmups = [{"warmup_steps": 10}, {"warmup_tokens": 10 * tokens_per_step}]
    stops = [Stop(max_steps=50), Stop(max_tokens=50 * tokens_per_step)]
    first, *others = [lrs(Schedule(name, **warmup), stop, 55, tokens_per_step) for warmup in warmups for stop in stops]
    for other in others:
        assert other == pytest.approx(first, abs=1e-15)


def test_with_two_ends_cosine_runs_to_the_one_that_comes_first():
    schedule = Schedule("cosine", warmup_steps=5)
    steps_first = lrs(schedule, Stop(max_steps=50, max_tokens=10_000), 50)
    tokens_first = lrs(schedule, Stop(max_steps=100, max_tokens=5_000), 50)
    assert steps_first == lrs(schedule, Stop(max_steps=50), 50)
    assert tokens_first == lrs(schedule, Stop(max_tokens=5_000), 50)


def test_a_warmup_in_the_other_unit_gives_a_smooth_fall_whatever_the_batches_hold():
    rng = random.Random(1)
    tokens, last = 0, PEAK
    schedule, stop = Schedule("cosine", warmup_steps=20), Stop(max_tokens=20_000)
    for step in range(500):
        after = tokens + rng.randrange(10, 200)
        lr = lr_at(schedule, PEAK, stop, step=step, tokens=tokens, tokens_after=after)
        if step >= 20:
            assert 0 <= last - lr < 0.05 * PEAK
            last = lr
        tokens = after
    assert last == 0


def test_a_warmup_longer_than_the_run_only_rises():
    ours = lrs(Schedule("cosine", warmup_steps=100), Stop(max_steps=50), 50)
    assert ours == pytest.approx([PEAK * i / 100 for i in range(1, 51)])


@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("eta_min", [0.0, 0.0004])
def test_plateau_replays_reduce_lr_on_plateau(patience, eta_min):
    rng = random.Random(patience)
    losses = [rng.choice([5.0, 4.0, 4.0 - i // 10, math.nan]) for i in range(60)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=PEAK)
    judge = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=0, min_lr=eta_min, eps=0)
    schedule = Schedule("plateau", decay_rate=0.5, patience=patience, eta_min=eta_min)
    for i, loss in enumerate(losses):
        judge.step(loss)
        ours = lr_at(schedule, PEAK, Stop(max_steps=9), step=100, tokens=1, tokens_after=2, valid_losses=losses[:i + 1])
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert ours < PEAK


def test_before_the_first_evaluation_plateau_is_at_its_peak():
    assert lrs(Schedule("plateau"), Stop(max_steps=9), 1) == [PEAK]


@pytest.mark.parametrize("name", ["cosine", "plateau"])
def test_the_lowest_rate_may_be_a_fraction_of_the_peak(name):
    """cybertronai's lr / 10 and NVIDIA's min_lr_ratio: it follows a peak that follows the batch."""
    stop, losses = Stop(max_steps=50), [1.0] * 40
    for peak in (0.01, 0.5):
        ratio, absolute = (Schedule(name, horizon_steps=30, **lowest)
                           for lowest in ({"eta_min_ratio": 0.1}, {"eta_min": 0.1 * peak}))
        for step in range(50):
            at = {"step": step, "tokens": step, "tokens_after": step + 1, "valid_losses": losses}
            assert lr_at(ratio, peak, stop, **at) == lr_at(absolute, peak, stop, **at) >= 0.1 * peak * (1 - 1e-12)
        assert lr_at(ratio, peak, stop, **at) == pytest.approx(0.1 * peak)


def test_two_ways_of_giving_the_lowest_rate_exclude_each_other():
    with pytest.raises(ValueError, match="eta_min or eta_min_ratio, not both"):
        Schedule(eta_min=0.1, eta_min_ratio=0.1)


@pytest.mark.parametrize(("peak", "top"), [(0.01, 1.0), (5.0, 5.0)])
@pytest.mark.parametrize("stop", [Stop(max_steps=100), Stop(max_tokens=3200)])
def test_the_finder_rises_by_the_same_factor_each_step_from_a_thousandth_of_the_peak_to_one(peak, top, stop):
    """Whatever warm-up and horizon the recipe has besides."""
    schedule = Schedule("finder", warmup_steps=30, horizon_steps=1000)
    rates = [lr_at(schedule, peak, stop, step=step, tokens=32 * step, tokens_after=32 * step + 32)
             for step in range(101)]
    assert rates[0] == pytest.approx(peak / 1000)
    assert rates[100] == pytest.approx(top)
    assert [b / a for a, b in pairwise(rates)] == pytest.approx([(1000 * top / peak) ** 0.01] * 100)


@pytest.mark.parametrize("horizon", [{"horizon_steps": 40}, {"horizon_tokens": 40 * 64}])
@pytest.mark.parametrize("warmup", [{"warmup_steps": 5}, {"warmup_tokens": 5 * 64}])
@pytest.mark.parametrize("stop", [Stop(max_steps=60), Stop(max_tokens=10 * 64), Stop(max_steps=20, max_tokens=10 * 64)])
def test_where_training_stops_does_not_move_a_curve_that_has_a_horizon(horizon, warmup, stop):
    """In either unit: the cosine by its formula, whether the run ends before it is lowest or goes on behind it."""
    schedule = Schedule("cosine", eta_min=0.02, **horizon, **warmup)
    for step in range(60):
        rate = lr_at(schedule, 1.0, stop, step=step, tokens=64 * step, tokens_after=64 * (step + 1))
        fallen = min(1, max(0, step - 5) / 35)
        assert rate == pytest.approx(min(1, (step + 1) / 5) * (0.02 + 0.98 * (1 + math.cos(math.pi * fallen)) / 2))
