"""The model against the paper's formulas in loops, in float64: forward and every gradient."""
from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from tests.txl import reference
from txl.adaptive import IGNORE, chance
from txl.config import Context, Model, body_params, flops_per_token, n_params
from txl.model import TransformerXL, distances, rel_shift, sinusoids

SMALL = {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 10, "dropout": 0.0}
V = 13                                            # vocabulary
MODELS = {
    "plain": Model(**SMALL),
    "pre_lnorm": Model(**SMALL, pre_lnorm=True),
    "pre_lnorm_final": Model(**SMALL, pre_lnorm=True, final_lnorm=True),
    "untie_r": Model(**SMALL, untie_r=True),
    "shaw": Model(**SMALL, attn_type="shaw", positions=9),
    "shaw_short": Model(**SMALL, attn_type="shaw", positions=3, untie_r=True, pre_lnorm=True),
    "abs": Model(**SMALL, attn_type="abs"),
    "abs_pre_lnorm": Model(**SMALL, attn_type="abs", pre_lnorm=True),
    "learned": Model(**SMALL, attn_type="learned", positions=9),
    "learned_short": Model(**SMALL, attn_type="learned", positions=3, pre_lnorm=True),
    "adaptive": Model(**SMALL, cutoffs=(4, 9)),
    "adaptive_untied": Model(**SMALL, cutoffs=(4, 9), tie_weight=False),
    "adaptive_div": Model(**SMALL, cutoffs=(4, 9), div_val=2),
    "adaptive_div_all_tied": Model(**SMALL, cutoffs=(4, 9), div_val=2, tie_projs=(True, True, True)),
    "adaptive_div_none_tied": Model(**SMALL, cutoffs=(4, 9), div_val=2, tie_projs=(False, False, False)),
    "projected": Model(**SMALL, d_embed=6),
    "projected_adaptive": Model(**SMALL, d_embed=6, cutoffs=(4, 9), tie_projs=(False, True, False)),
    "projected_untied": Model(**SMALL, d_embed=6, cutoffs=(4, 9), tie_weight=False),
}
CONTEXTS = {
    "memory": Context(tgt_len=4, mem_len=5),
    "no_memory": Context(tgt_len=4, mem_len=0),
    "short_memory": Context(tgt_len=4, mem_len=2),
    "clamp_len": Context(tgt_len=4, mem_len=5, clamp_len=3),
    "same_length": Context(tgt_len=4, mem_len=5, same_length=True),
    "same_length_clamped": Context(tgt_len=4, mem_len=3, same_length=True, clamp_len=2),
    "ext_len": Context(tgt_len=3, mem_len=4, ext_len=2),
    "ext_len_no_memory": Context(tgt_len=3, mem_len=0, ext_len=2),
}


PLACED = ("shaw", "abs", "learned")               # by how positions come in


def build(model: Model, n_token: int = V, seed: int = 0) -> TransformerXL:
    torch.manual_seed(seed)
    net = TransformerXL(model, n_token).double()
    with torch.no_grad():                         # away from the initial values, where much is zero or tiny
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return net


def run_slowly(net, model, tokens, context):
    """The negative log-likelihoods [B][T] of all segments, by the reference, its memory kept as lists."""
    B, T = len(tokens), context.tgt_len
    past = [[[] for _ in range(B)] for _ in range(model.n_layer)]
    nlls = []
    for first in range(0, len(tokens[0]) - 1, T):
        again = min(context.ext_len, first)
        window = [stream[first - again:first + T] for stream in tokens]
        hidden, inputs = reference.forward(net, model, window, past, context)
        for b in range(B):
            for t in range(T):
                nlls.append(-reference.log_prob(net, model, hidden[b][again + t], tokens[b][first + t + 1]))
        for i in range(model.n_layer):
            for b in range(B):
                remembered = inputs[i][b][:max(0, len(window[b]) - context.ext_len)]
                whole = past[i][b] + [h.detach() for h in remembered]
                past[i][b] = whole[len(whole) - context.mem_len:] if context.mem_len < len(whole) else whole
    return torch.stack(nlls)


def run_fast(net, tokens, context):
    tokens = torch.tensor(tokens)
    memory, nlls = None, []
    for first in range(0, tokens.size(1) - 1, context.tgt_len):
        again = min(context.ext_len, first)
        nll, memory = net(tokens[:, first - again:first + context.tgt_len],
                          tokens[:, first + 1:first + 1 + context.tgt_len], memory, context)
        nlls.append(nll.flatten())
    return torch.cat(nlls)


@pytest.mark.parametrize(("model", "context"), [
    *((MODELS[name], CONTEXTS["memory"]) for name in MODELS),
    *((MODELS["plain"], CONTEXTS[name]) for name in CONTEXTS if name != "memory"),
    (MODELS["pre_lnorm"], CONTEXTS["same_length"]),
    (MODELS["untie_r"], CONTEXTS["ext_len"]),
    *((MODELS[name], CONTEXTS[context]) for name in PLACED for context in ("clamp_len", "same_length", "ext_len")),
], ids=[*MODELS, *(name for name in CONTEXTS if name != "memory"), "pre_lnorm_same_length", "untie_r_ext_len",
        *(f"{name}_{context}" for name in PLACED for context in ("clamp_len", "same_length", "ext_len"))])
def test_three_segments_match_the_formulas_forward_and_backward(model, context):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, V, (2, 3 * context.tgt_len + 1), generator=generator).tolist()
    net = build(model)

    expected = run_slowly(net, model, tokens, context)
    weights = torch.randn(len(expected), generator=generator, dtype=torch.float64)   # every target counts differently
    (expected * weights).sum().backward()
    expected_gradients = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    found = run_fast(net, tokens, context)
    (found * weights).sum().backward()

    assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for name, p in net.named_parameters():
        gradient = torch.zeros_like(p) if expected_gradients[name] is None else expected_gradients[name]
        assert_close(p.grad, gradient, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_two_segments_with_memory_equal_one_long_segment():
    for model in (MODELS["plain"], MODELS["pre_lnorm"], MODELS["adaptive_div"], MODELS["shaw"]):
        net, tokens = build(model), torch.randint(0, V, (3, 17)).tolist()
        for clamp_len in (None, 4):
            long = run_fast(net, tokens, Context(16, 0, clamp_len=clamp_len)).view(3, 16)
            short = run_fast(net, tokens, Context(8, 8, clamp_len=clamp_len)).view(2, 3, 8)
            assert_close(torch.cat([*short], dim=1), long, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("name", ["plain", "pre_lnorm_final", "untie_r", "shaw_short", "abs", "learned_short"])
def test_reading_by_keys_that_are_kept_is_reading_by_hidden_states(name, context):
    """From an empty memory to a full one, and to an end that is shorter."""
    net, T = build(MODELS[name]).eval(), context.tgt_len
    tokens = torch.randint(0, V, (2, 4 * T + 3))
    hidden, kept = None, net.reading(2, context)
    for first in range(0, 4 * T + 2, T):
        targets = tokens[:, first + 1:first + 1 + T]
        inputs = tokens[:, max(0, first - context.ext_len):first + targets.size(1)]
        with torch.no_grad():
            expected, hidden = net(inputs, targets, hidden, context)
            found, kept = net(inputs, targets, kept, context)
        assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_what_is_kept_is_fit_for_autocast():
    net, context = build(MODELS["plain"]).float().eval(), CONTEXTS["same_length"]
    tokens = torch.randint(0, V, (2, 5, 4))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden, kept = None, net.reading(2, context)
        for inputs in tokens.unbind(1):
            expected, hidden = net(inputs, inputs, hidden, context)
            found, kept = net(inputs, inputs, kept, context)
            assert found.dtype == torch.float32
            assert {x.dtype for x in kept.kv} == {torch.bfloat16}
            assert_close(found, expected, rtol=.05, atol=.05)


def test_in_absolute_positions_a_memory_stands_further_back_with_each_segment():
    """What was remembered gets the positions of now: seen from the segment's end, as one long segment has them."""
    for name in ("abs", "learned"):
        net, tokens = build(replace(MODELS[name], n_layer=1)), torch.randint(0, V, (3, 17)).tolist()
        long = run_fast(net, tokens, Context(16, 0)).view(3, 16)[:, 8:]
        short = run_fast(net, tokens, Context(8, 8)).view(2, 3, 8)[1]
        assert_close(short, long, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("wrong", "said"), [
    ({"attn_type": "shaw"}, "positions, at least 1, is for attn_type shaw and learned"),
    ({"attn_type": "learned", "positions": 0}, "at least 1"),
    ({"positions": 5}, "here attn_type is rel"),
    ({"attn_type": "abs", "untie_r": True}, "untie_r is about u and v"),
])
def test_positions_that_nothing_would_read_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Model(**SMALL, **wrong)


def test_same_length_lets_every_query_see_mem_len_tokens_before_it():
    """What a query sees decides what it predicts: changing a token further back changes nothing."""
    net = build(Model(**SMALL | {"n_layer": 1}))
    context = Context(tgt_len=6, mem_len=4, same_length=True)
    tokens = torch.randint(0, V, (1, 13)).tolist()
    changed = [tokens[0].copy()]
    changed[0][1] = (changed[0][1] + 1) % V
    difference = (run_fast(net, tokens, context) - run_fast(net, changed, context)).abs() > 1e-12
    # token 1 is a target at 0, the input at 1, and seen by the 4 queries after it
    assert difference.nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_rel_shift_matches_its_definition():
    scores = torch.randn(2, 3, 4, 8)                              # B=2 N=3 Q=4 K=7: the spare column, memory of 3
    shifted = rel_shift(scores)
    assert shifted.shape == (2, 3, 4, 7)
    for q in range(4):
        for k in range(4 + q):                                    # the keys that query q may see
            assert_close(shifted[..., q, k], scores[..., q, k + 4 - q])


def test_positions_are_the_papers_sinusoids_of_clamped_distances():
    embedding = sinusoids(distances(6, 3, torch.device("cpu")), like=torch.empty(10, dtype=torch.float64))
    for row, distance in enumerate([3, 3, 3, 3, 2, 1, 0]):
        assert_close(embedding[row], reference.sinusoid(distance, 10))


@pytest.mark.parametrize("name", [name for name in MODELS if "adaptive" in name])
def test_adaptive_probabilities_sum_to_one_over_the_whole_vocabulary(name):
    net = build(MODELS[name])
    hidden = torch.randn(5, 8, dtype=torch.float64)
    log_prob = net.vocabulary.double().log_prob(hidden)
    assert_close(log_prob.double().exp().sum(1), torch.ones(5, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    for token in range(V):
        nll = net.vocabulary.nll(hidden, torch.full((5,), token))
        assert_close(-nll.double(), log_prob[:, token].double(), rtol=1e-5, atol=1e-6)


def test_adaptive_softmax_of_one_word_clusters_equals_a_full_softmax():
    """With a cluster per word its tail has nothing to choose, so head and cluster logits are one full softmax."""
    adaptive = build(Model(**SMALL, cutoffs=(10, 11, 12)))
    full = build(Model(**SMALL))
    with torch.no_grad():
        vocabulary = adaptive.vocabulary
        full.vocabulary.tables[0].copy_(torch.cat([vocabulary.tables[0][:10], vocabulary.cluster_weight]))
        full.vocabulary.bias.copy_(torch.cat([vocabulary.bias[:10], vocabulary.cluster_bias]))
    hidden, target = torch.randn(40, 8, dtype=torch.float64), torch.randint(0, V, (40,))
    assert_close(vocabulary.nll(hidden, target), full.vocabulary.nll(hidden, target))


def test_a_cluster_without_targets_still_gets_a_zero_gradient():
    net = build(MODELS["adaptive_div_none_tied"])
    net.vocabulary.nll(torch.randn(6, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, IGNORE])).sum().backward()
    for name in ("vocabulary.out_projs.1", "vocabulary.out_projs.2", "vocabulary.tables.2"):
        assert_close(net.get_parameter(name).grad, torch.zeros_like(net.get_parameter(name)))


def test_ignored_targets_have_no_loss_and_no_gradient():
    for model in (MODELS["plain"], MODELS["adaptive"]):
        net = build(model)
        hidden = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        nll = net.vocabulary.nll(hidden, torch.tensor([IGNORE, 5, IGNORE]))
        nll.sum().backward()
        assert nll[0] == nll[2] == 0
        assert hidden.grad[0].abs().sum() == hidden.grad[2].abs().sum() == 0
        assert hidden.grad[1].abs().sum() > 0


def sampled(samples: int):
    net = build(Model(**SMALL, sample_softmax=samples))
    hidden = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    return net.vocabulary, hidden, torch.tensor([0, 5, 12, IGNORE])


def test_a_sampled_softmax_that_draws_every_word_is_the_full_softmax_also_in_its_gradients():
    vocabulary, hidden, target = sampled(20_000)
    found = vocabulary.train().nll(hidden, target)
    expected = vocabulary.eval().nll(hidden, target)
    assert_close(found, expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    of_found, of_expected = (torch.autograd.grad((x * weights).sum(), [hidden, *vocabulary.parameters()])
                             for x in (found, expected))
    for x, y in zip(of_found, of_expected):
        assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_sampled_softmax_expects_the_sum_over_all_words():
    """Over many draws what the drawn words add to the target's own exp(logit) is, on average, what all others have."""
    vocabulary, hidden, target = sampled(2)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([vocabulary.train().nll(hidden, target) for _ in range(20_000)])[:, :3]
        logits = hidden @ vocabulary.tables[0].T + vocabulary.bias
        tries = 4
    for row, word in enumerate([0, 5, 12]):
        p = math.log((word + 2) / (word + 1)) / math.log(V + 1)
        q = 1 - (1 - p) ** tries
        others = (drawn[:, row].exp().mean() - 1) * logits[row, word].exp() / q
        assert others.item() == pytest.approx((logits[row].exp().sum() - logits[row, word].exp()).item(), rel=0.04)


def test_the_chance_to_be_drawn_is_exact_also_of_the_rarest_word():
    found = chance(torch.tensor([0, 1, 200_000, 267_734]), 267_735, 8192)
    for x, n in zip(found.tolist(), [0, 1, 200_000, 267_734]):
        p = math.log((n + 2) / (n + 1)) / math.log(267_736)
        assert x == pytest.approx(1 - (1 - p) ** 8192, rel=1e-5)


def test_a_sampled_softmax_draws_the_frequent_words_more_often_and_evaluates_all():
    vocabulary, hidden, target = sampled(1)
    assert_close(vocabulary.eval().nll(hidden, target)[:3], -vocabulary.log_prob(hidden)[[0, 1, 2], [0, 5, 12]],
                 check_dtype=False, rtol=1e-6, atol=1e-6)
    assert not torch.equal(vocabulary.train().nll(hidden, target), vocabulary.nll(hidden, target))
    with pytest.raises(ValueError, match="sample_softmax must be at least 1, and is for"):
        Model(**SMALL, sample_softmax=10, cutoffs=(4, 9))


CUTOFFS, NVIDIA_CUTOFFS, WORDS = (20000, 40000, 200000), (19997, 39997, 199997), 267735
COUNTS = {                                        # the reference's table of named models
    "paper wt103 base": (151_107_538, Model(16, 410, 10, 41, 2100, cutoffs=CUTOFFS), WORDS),
    "cybertronai base": (186_707_162, Model(16, 512, 8, 48, 2048, cutoffs=CUTOFFS), WORDS),
    "nvidia base": (191_950_298, Model(16, 512, 8, 64, 2048, cutoffs=NVIDIA_CUTOFFS), WORDS),
    "nvidia large": (285_167_482, Model(18, 1024, 16, 64, 4096, cutoffs=NVIDIA_CUTOFFS, div_val=4), WORDS),
    "paper wt103 large": (285_170_506, Model(18, 1024, 16, 64, 4096, cutoffs=CUTOFFS, div_val=4), WORDS),
    "cybertronai large": (297_051_220, Model(18, 1024, 16, 64, 4096, cutoffs=(5000, 10000, 40000)), 50257),
    "enwik8 base": (41_055_436, Model(12, 512, 8, 64, 2048), 204),
    "enwik8 large": (277_231_820, Model(24, 1024, 8, 128, 3072), 204),
    "lm1b base": (357_812_082, Model(18, 1024, 8, 128, 4096, cutoffs=(60000, 100000, 640000), div_val=4,
                                     tie_projs=(False,) * 4), 793471),
}


@pytest.mark.parametrize(("count", "model", "n_token"), COUNTS.values(), ids=COUNTS)
def test_named_models_have_the_published_number_of_parameters(count, model, n_token):
    with torch.device("meta"):
        net = TransformerXL(model, n_token)
    assert sum(p.numel() for p in net.parameters()) == count == n_params(model, n_token)


def test_parameter_count_without_building_agrees_with_the_built_model():
    for model in MODELS.values():
        net = build(model)
        assert n_params(model, V) == sum(p.numel() for p in net.parameters())
        assert body_params(model) == n_params(model, V) - sum(p.numel() for p in net.vocabulary.parameters())


def test_flops_per_token_agree_with_the_reference():
    """Reference figures include the tail clusters (a few per cent), ours do not."""
    base = Model(16, 512, 8, 64, 2048, cutoffs=NVIDIA_CUTOFFS)
    assert flops_per_token(base, Context(192, 192), WORDS) == pytest.approx(459e6, rel=0.06)
    large = Model(18, 1024, 16, 64, 4096, cutoffs=NVIDIA_CUTOFFS, div_val=4)
    assert flops_per_token(large, Context(384, 384), WORDS) == pytest.approx(1862e6, rel=0.06)


def test_flops_count_the_products_of_a_layer_and_of_a_full_softmax():
    """d_model 2, one head of 2, d_inner 4, one target, no memory: multiply-adds by hand, times 2, times 3 passes."""
    model = Model(1, 2, 1, 2, 4)
    projections, feed_forward, attention, softmax = 4 * 2 * 2, 2 * 2 * 4, 3 * 2 * 0.5, 2 * 7
    by_hand = 6 * (projections + feed_forward + attention + softmax)
    assert flops_per_token(model, Context(1, 0), 7) == by_hand
    drawn = replace(model, sample_softmax=2)      # 4 words in place of 7
    assert flops_per_token(drawn, Context(1, 0), 7) == by_hand - 6 * 2 * 3


def test_initial_values_follow_the_ancestors_rules():
    torch.manual_seed(1)
    model = Model(2, 256, 4, 64, 1024, cutoffs=(500, 1000), div_val=2, init_std=0.05, proj_init_std=0.003)
    net = TransformerXL(model, 3000)
    for name, p in net.named_parameters():
        mean, std = p.mean().item(), p.std().item()
        if "norm" in name and name.endswith("weight"):
            assert mean == pytest.approx(1, abs=0.02)
            assert std == pytest.approx(0.05, rel=0.2)
        elif name.endswith("bias"):
            assert p.abs().max() == 0
        else:
            expected = 0.003 if "proj" in name else 0.05
            assert mean == pytest.approx(0, abs=expected / 5), name
            assert std == pytest.approx(expected, rel=0.12), name
    uniform = TransformerXL(Model(**SMALL, init="uniform", init_range=0.2), 50)
    weight = uniform.layers[0].feed_forward[0].weight
    assert weight.abs().max() <= 0.2
    assert weight.std().item() == pytest.approx(0.2 / math.sqrt(3), rel=0.2)


@pytest.mark.parametrize("name", ["plain", "adaptive_div", "projected", "pre_lnorm_final", *PLACED])
def test_autocast_keeps_positions_and_residuals_in_fp32(name):
    """A long context: positions in 16 bits would be off by whole tokens, and the loss with them."""
    model = MODELS[name]
    net = build(model).float()
    tokens = torch.randint(0, V, (1, 600))
    context = Context(tgt_len=600, mem_len=600)
    exact, _ = net(tokens, tokens, None, context)
    with torch.autocast("cpu", torch.bfloat16):
        found, memory = net(tokens, tokens, None, context)
    assert memory[0].dtype == found.dtype == torch.float32
    assert (found - exact).abs().mean() < 0.1


def test_dropout_acts_in_training_only():
    net = build(Model(**SMALL | {"dropout": 0.5}, dropatt=0.5))
    tokens = torch.randint(0, V, (2, 9)).tolist()
    context = CONTEXTS["memory"]
    assert not torch.equal(run_fast(net, tokens, context), run_fast(net, tokens, context))
    net.eval()
    assert torch.equal(run_fast(net, tokens, context), run_fast(net, tokens, context))
