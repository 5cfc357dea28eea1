from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.spec import LOCAL
from configs import CONFIGS
from engine.config import Batch
from engine.schedule import lr_at
from txl.config import Context, n_params

# The tables of the ancestors, written out again.
CYBERTRONAI = {          # machines, sequences per GPU, global batch, lr, tokens per step, steps to max_tokens
    "one_gpu": (1, 32, 32, .0010417, 4_096, 439_454),
    "one_machine": (1, 96, 768, .005, 98_304, 18_311),
    "two_machines": (2, 96, 1536, .010, 196_608, 9_156),
    "four_machines": (4, 96, 3072, .012, 393_216, 4_578),
    "eight_machines": (8, 96, 6144, .012, 786_432, 2_289),
    "sixteen_machines": (16, 96, 12288, .012, 1_572_864, 1_145),
    "test_1": (1, 16, 128, .000833, 49_152, 732_422),
    "test_2": (2, 16, 256, .001667, 98_304, 366_211),
    "test_4": (4, 16, 512, .002, 196_608, 183_106),
    "test_8": (8, 16, 1024, .008, 393_216, 91_553),
    "test_16": (16, 16, 2048, .016, 786_432, 45_777),
}
PARAMETERS = {
    "wt103_base_paper": 151_107_538, "one_machine": 186_707_162, "nvidia_base": 191_950_298,
    "nvidia_large": 285_167_482, "test_1": 297_051_220, "wt103_large_paper": 285_170_506,
    "nvidia_tf_base": 191_965_658, "lm1b_base": 357_812_082, "lm1b_large": 841_295_982,
}


@pytest.mark.parametrize("suffix", ["", "_p4d"])
@pytest.mark.parametrize("name", CYBERTRONAI)
def test_cybertronais_configs_have_its_numbers_on_both_kinds_of_machine(name, suffix):
    machines, per_gpu, batch, lr, tokens, steps = CYBERTRONAI[name]
    config = CONFIGS[name + suffix]
    ranks = config.machines.count * config.machines.gpus_per_machine
    recipe, total = config.recipe, config.recipe.batch.total(ranks)
    assert config.machines.count == machines
    v100 = "p3.2xlarge" if name == "one_gpu" else "p3dn.24xlarge"
    assert config.machines.kind == ("p4d.24xlarge" if suffix else v100)
    assert config.machines.spot
    assert (recipe.batch.local_size, total) == (per_gpu, batch)
    assert recipe.optim.peak_lr(total) == pytest.approx(lr, rel=5e-4)
    assert total * recipe.tokens_per_sequence == tokens
    assert -(-recipe.stop.max_tokens // tokens) == steps
    assert (recipe.optim.name, recipe.optim.weight_decay, recipe.optim.clip, recipe.optim.bias_correction) == \
           ("lamb", 0, .25, False)
    assert (recipe.schedule.warmup_steps, recipe.schedule.warmup_tokens, recipe.schedule.eta_min) == (0, 0, 0)
    assert recipe == CONFIGS[name].recipe         # the twin differs in its machines alone


LATER = {                # of its last launch.py: machines, sequences per GPU, lr, warm-up tokens, lr at the end over lr
    "one_machine_fp16": (1, 96, .005, 0, .1), "one_machine_fp16_2xlr": (1, 96, .010, 0, .1),
    "one_machine_fp16_4xlr": (1, 96, .020, 0, .1), "one_machine_fp16_8xlr": (1, 96, .040, 0, .1),
    "one_machine_fp16_small": (1, 48, .00125, 0, .1), "two_machines_fp16": (2, 96, .010, 0, .1),
    "one_machine_fp16_large": (1, 16, .001, 0, .1), "four_machine_fp16_large": (4, 16, .004, 0, .1),
    "eight_machine_fp16_large": (8, 16, .008, 0, .1), "one_small_machine": (1, 6, .000375, 0, .1),
    "one_small_machine_wiki": (1, 6, .000375, 50e6, 1), "one_tiny_machine_git": (1, 6, .000046875, 50e6, 1),
    "one_small_machine_git": (1, 6, .000375, 50e6, 1), "one_machine_git": (1, 18, .001125, 50e6, 1),
}


@pytest.mark.parametrize("name", LATER)
def test_cybertronais_later_configs_have_its_numbers(name):
    machines, per_gpu, lr, warmup, end = LATER[name]
    config = CONFIGS[name]
    recipe, total = config.recipe, config.recipe.batch.total(machines * config.machines.gpus_per_machine)
    assert (config.machines.count, recipe.batch.local_size, recipe.precision) == (machines, per_gpu, "fp16")
    peak = recipe.optim.peak_lr(total)
    assert peak == pytest.approx(lr, rel=1e-6)
    assert recipe.stop.max_tokens == 1.5e9
    for tokens, expected in ((1e6, 1e6 / warmup if warmup else 1), (1.5e9 - 1, end)):
        at = lr_at(recipe.schedule, peak, recipe.stop, step=9, tokens=int(tokens), tokens_after=int(tokens),
                   valid_losses=[])
        assert at == pytest.approx(expected * lr, rel=1e-4)
    assert recipe.params == {"fp16": 186_707_162, "git": 297_048_145, "wiki": 297_048_145}.get(
        next(part for part in reversed(name.split("_")) if part in ("fp16", "large", "git", "wiki", "machine")),
        285_170_506)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_those_of_the_published_models(name):
    assert CONFIGS[name].recipe.params == PARAMETERS[name]


@pytest.mark.parametrize(("name", "count"), [("enwik8_base", 41_055_436), ("enwik8_large", 277_231_820)])
def test_with_the_ancestors_204_symbols_the_byte_models_have_their_size(name, count):
    assert n_params(CONFIGS[name].recipe.model, 204) == count


# NVIDIA's batch_chunk: batch, {what a GPU takes at a time: [(GPUs, batch_chunk)]} from its yaml files.
CHUNKS = [
    (256, 32, {8: 1, 4: 2, 2: 4, 1: 8}),                     # base dgx1 fp16
    (256, 16, {8: 2, 4: 4, 2: 8, 1: 16}),                    # base dgx1 fp32
    (256, 16, {16: 1, 8: 2, 4: 4, 2: 8, 1: 16}),             # base dgx2, both
    (256, 32, {8: 1, 4: 2, 2: 4, 1: 8}),                     # base dgxa100, both
    (128, 4, {8: 4, 4: 8, 2: 16, 1: 32}),                    # large dgx1 fp16
    (128, 2, {8: 8, 4: 16, 2: 32, 1: 64}),                   # large dgx1 fp32
    (128, 8, {16: 1, 8: 2, 4: 4, 2: 8, 1: 16}),              # large dgx2, both
    (128, 16, {8: 1, 4: 2, 2: 4, 1: 8}),                     # large dgxa100 fp16
    (128, 8, {8: 2, 4: 4, 2: 8, 1: 16}),                     # large dgxa100 tf32
    (512, 16, {128: 1, 64: 1, 32: 1, 16: 2}),                # large multi-node fp16
    (512, 8, {128: 1, 64: 1, 32: 2, 16: 4}),                 # large multi-node fp32
]


@pytest.mark.parametrize(("size", "micro_size", "chunks"), CHUNKS)
def test_the_micro_batch_rule_gives_every_batch_chunk_of_nvidia(size, micro_size, chunks):
    batch = Batch(size=size, micro_size=micro_size)
    assert {gpus: len(batch.micro_batches(0, gpus)) for gpus in chunks} == chunks


# Its yaml files again, entry by entry: batch_chunk by the number of GPUs.
ENTRIES = {
    "nvidia_base_dgx1_fp16": ("fp16", {8: 1, 4: 2, 2: 4, 1: 8}),
    "nvidia_base_dgx1_fp32": ("fp32", {8: 2, 4: 4, 2: 8, 1: 16}),
    "nvidia_base_dgx2_fp16": ("fp16", {16: 1, 8: 2, 4: 4, 2: 8, 1: 16}),
    "nvidia_base_dgx2_fp32": ("fp32", {16: 1, 8: 2, 4: 4, 2: 8, 1: 16}),
    "nvidia_base_dgxa100_fp16": ("fp16", {8: 1, 4: 2, 2: 4, 1: 8}),
    "nvidia_base_dgxa100_tf32": ("tf32", {8: 1, 4: 2, 2: 4, 1: 8}),
    "nvidia_large_dgx1_fp16": ("fp16", {8: 4, 4: 8, 2: 16, 1: 32}),
    "nvidia_large_dgx1_fp32": ("fp32", {8: 8, 4: 16, 2: 32, 1: 64}),
    "nvidia_large_dgx2_fp16": ("fp16", {16: 1, 8: 2, 4: 4, 2: 8, 1: 16}),
    "nvidia_large_dgx2_fp32": ("fp32", {16: 1, 8: 2, 4: 4, 2: 8, 1: 16}),
    "nvidia_large_dgxa100_fp16": ("fp16", {8: 1, 4: 2, 2: 4, 1: 8}),
    "nvidia_large_dgxa100_tf32": ("tf32", {8: 2, 4: 4, 2: 8, 1: 16}),
    "nvidia_multinode_dgx2_fp16": ("fp16", {128: 1, 64: 1, 32: 1, 16: 2}),
    "nvidia_multinode_dgx2_fp32": ("fp32", {128: 1, 64: 1, 32: 2, 16: 4}),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_nvidias_entries_by_machine_have_its_batch_chunk_precision_and_recipe(name):
    precision, chunks = ENTRIES[name]
    of = {"base": "nvidia_base", "large": "nvidia_large", "multinode": "nvidia_large_multinode"}[name.split("_")[1]]
    config, recipe, plain = CONFIGS[name], CONFIGS[name].recipe, CONFIGS[of].recipe
    for gpus, chunk in chunks.items():
        assert {len(recipe.batch.micro_batches(rank, gpus)) for rank in range(gpus)} == {chunk}
    assert config.machines.count * config.machines.gpus_per_machine == max(chunks)
    assert recipe.precision == precision
    assert replace(recipe, precision="fp16", batch=replace(recipe.batch, micro_size=None)) == \
           replace(plain, batch=replace(plain.batch, micro_size=None))


@pytest.mark.parametrize(("name", "of"), [
    ("nvidia_base_trainbench", "nvidia_base"), ("nvidia_large_trainbench", "nvidia_large"),
    ("nvidia_multinode_trainbench", "nvidia_large_multinode")])
def test_trainbench_is_the_beginning_of_its_recipe(name, of):
    bench, recipe = CONFIGS[name].recipe, CONFIGS[of].recipe
    assert (bench.stop.max_steps, bench.clock.log_interval) == (500, 1)
    assert replace(bench, stop=recipe.stop, schedule=recipe.schedule, clock=recipe.clock) == recipe
    for step in range(500):
        lrs = [lr_at(x.schedule, .01, x.stop, step=step, tokens=step * 49152, tokens_after=(step + 1) * 49152)
               for x in (bench, recipe)]
        assert lrs[0] == lrs[1] > 0


@pytest.mark.parametrize(("name", "size", "micro_size"), [
    ("nvidia_base", 256, 32), ("nvidia_base_p3dn", 256, 32), ("nvidia_large", 128, 16), ("nvidia_large_p3dn", 128, 8),
    ("nvidia_large_multinode", 512, 16), ("nvidia_large_multinode_p3dn", 512, 16)])
def test_nvidias_configs_take_what_fits_their_gpus(name, size, micro_size):
    assert CONFIGS[name].recipe.batch == Batch(size=size, micro_size=micro_size)


def test_nvidias_tensorflow_recipe_is_its_other_one_but_for_what_its_script_says():
    tf, torch = CONFIGS["nvidia_tf_base"].recipe, CONFIGS["nvidia_base"].recipe
    assert (tf.optim.weight_decay, tf.model.untie_r, tf.schedule.lowest(.01)) == (.01, True, .001)
    assert replace(tf, model=torch.model, optim=torch.optim, schedule=torch.schedule, batch=torch.batch) == torch
    assert (tf.batch.size, tf.stop.max_steps, tf.context) == (256, 40_000, Context(192, 192))


@pytest.mark.parametrize(("name", "lr", "eta_min", "warmup", "steps", "tokens"), [
    ("nvidia_base", .01, .001, 1000, 40_000, 1_966_080_000),
    ("nvidia_large", .01, .0001, 16_000, 100_000, 4_915_200_000),
    ("nvidia_large_multinode", .02, .0001, 16_000, 25_000, 4_915_200_000),
])
def test_nvidias_configs_have_its_schedule(name, lr, eta_min, warmup, steps, tokens):
    recipe = CONFIGS[name].recipe
    assert (recipe.optim.lr, recipe.schedule.eta_min, recipe.schedule.warmup_steps, recipe.stop.max_steps) == \
           (lr, eta_min, warmup, steps)
    assert steps * recipe.batch.size * recipe.tokens_per_sequence == tokens


# Layers, d_model, heads, d_head, d_inner, dropout, dropatt; batch, tgt = mem, eval_tgt, warmup, steps, test.
PAPER = {
    "wt103_base_paper": (16, 410, 10, 41, 2100, .1, 0, 60, 150, 150, 0, 200_000, (64, 640, 400)),
    "wt103_large_paper": (18, 1024, 16, 64, 4096, .2, .2, 128, 384, 128, 16_000, 4_000_000, (128, 1600, 1000)),
    "enwik8_base": (12, 512, 8, 64, 2048, .1, 0, 22, 512, 128, 0, 400_000, (80, 2100, 820)),
    "text8_base": (12, 512, 8, 64, 2048, .1, 0, 22, 512, 128, 0, 400_000, (80, 2100, 820)),
    "enwik8_large": (24, 1024, 8, 128, 3072, .15, .15, 64, 768, 128, 4_000, 400_000, (128, 3800, 1000)),
    "text8_large": (24, 1024, 8, 128, 3072, .15, .15, 64, 768, 128, 0, 400_000, (128, 3800, 1000)),
    "lm1b_base": (18, 1024, 8, 128, 4096, 0, 0, 224, 32, 32, 20_000, 500_000, (32, 128, None)),
    "lm1b_large": (24, 1280, 16, 80, 8192, .05, .05, 512, 32, 32, 30_000, 1_200_000, (32, 128, None)),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_configs_have_its_numbers(name):
    *shape, size, length, eval_length, warmup, steps, (tgt_len, mem_len, clamp_len) = PAPER[name]
    recipe, model = CONFIGS[name].recipe, CONFIGS[name].recipe.model
    assert [model.n_layer, model.d_model, model.n_head, model.d_head, model.d_inner] == shape[:5]
    assert [model.dropout, model.dropatt] == shape[5:]
    assert (recipe.batch.size, recipe.schedule.warmup_steps, recipe.stop.max_steps) == (size, warmup, steps)
    assert (recipe.optim.name, recipe.optim.lr, recipe.optim.clip) == ("adam", .00025, .25)
    assert recipe.schedule.name == "cosine"
    assert recipe.context == Context(length, length)
    assert recipe.eval_context == Context(eval_length, 2 * length - eval_length)    # memory takes what tgt_len loses
    assert recipe.test_context == Context(tgt_len, mem_len, clamp_len=clamp_len, same_length=True)


def test_cybertronais_claims_stand_beside_their_corrections():
    assert "24.617" in CONFIGS["one_machine"].about
    assert "21.5" in CONFIGS["one_machine"].about
    for name, claimed, true in [("test_1", 446, 74.4), ("test_2", 860, 143.4), ("test_4", 1736, 289.4),
                                ("test_8", 3031, 505.1), ("test_16", 5904, 983.7)]:
        assert claimed / 6 == pytest.approx(true, rel=2e-3)
        assert str(claimed) in CONFIGS[name].about
        assert f"{true} sequences/s" in CONFIGS[name].about


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_says_what_it_stands_for_and_feeds_all_its_gpus(name):
    config = CONFIGS[name]
    assert config.about.endswith(".")
    if config.machines.kind != LOCAL:
        assert config.recipe.batch.total(config.machines.count * config.machines.gpus_per_machine)
        assert config.machines.usd_per_hour > 0
