"""Every config by name: frozen values. `python launch.py --help` lists them.

A config is a recipe (what can move the loss curve) and the machines that its numbers were published for.
Numbers come from four systems:
  cybertronai  its transformer-xl, launch.py and README, 2019 (V100)
  NVIDIA       DeepLearningExamples, PyTorch/LanguageModeling/Transformer-XL, wt103_{base,large}.yaml and README
  paper        arXiv:1901.02860 and the scripts of its repository, kimiyoung/transformer-xl pytorch/run_*.sh
  ours         for a machine without a GPU
"""
from __future__ import annotations

from dataclasses import replace

from cluster.spec import LOCAL, Config, Machines
from engine.config import Batch, Clock, LinearLr, Optim, Precision, Schedule, Stop
from txl.config import Context, Data, Model, Recipe

WT103 = Data("wt103", "data/wikitext-103", n_token=267735)
WT103_BPE = Data("wt103", "data/wikitext-103", vocab="bpe", n_token=50257, bpe_files="data/gpt2")
ENWIK8 = Data("enwik8", "data/enwik8", vocab="byte", n_token=256)
TEXT8 = Data("text8", "data/text8", vocab="byte", n_token=256)
LM1B = Data("lm1b", "data/one-billion-words", n_token=793471)
STDLIB = Data("stdlib", "data/stdlib", vocab="bpe", n_token=1024)

WT103_CUTOFFS = (20000, 40000, 200000)
NVIDIA_CUTOFFS = (19997, 39997, 199997)           # so that with three clusters the head has 20,000 entries
LM1B_CUTOFFS = (60000, 100000, 640000)

# LAMB of cybertronai and NVIDIA alike: no bias correction, no weight decay, eps 1e-6.
LAMB = Optim("lamb", lr=0.01, eps=1e-6, bias_correction=False)

# --- cybertronai: wikitext-103 in as little time as possible -----------------------------------------------------

# Its learning-rate rule: base_lr * sequences per step / 32, found on one machine (lr .005 for 768). Linear up to two
# machines; above, its authors lowered base_lr by hand, so that lr stays at .012 from four machines on.
LR_ONE_GPU = LinearLr(.000125 * 5 / 3 * 5, 32)
LR_TO_TWO = LinearLr(.000125 * 5 / 3, 32)
LR_FOUR = LinearLr(.000125, 32)
LR_EIGHT = LinearLr(.000125 / 2, 32)
LR_SIXTEEN = LinearLr(.000125 / 4, 32)
LR_TEST_8_16 = LinearLr(.001 / 4, 32)

CYBERTRONAI_BASE = Recipe(
    model=Model(n_layer=16, d_model=512, n_head=8, d_head=48, d_inner=2048, cutoffs=WT103_CUTOFFS),
    data=WT103,
    context=Context(tgt_len=128, mem_len=128),
    eval_context=Context(tgt_len=128, mem_len=128),
    batch=Batch(local_size=96),
    optim=replace(LAMB, lr=LR_TO_TWO),
    schedule=Schedule("cosine"),                  # to 0 at the last token, no warm-up
    stop=Stop(max_tokens=1_800_000_000),          # cybertronai's horizon; it then went on at a constant rate
    precision="fp16",
    clock=Clock(log_interval=100, eval_interval=1000),
)
CYBERTRONAI_LARGE = replace(
    CYBERTRONAI_BASE,
    model=Model(n_layer=18, d_model=1024, n_head=16, d_head=64, d_inner=4096, dropout=.2, dropatt=.2, init_std=.005,
                cutoffs=(5000, 10000, 40000)),
    data=WT103_BPE,
    context=Context(tgt_len=384, mem_len=384),
    eval_context=Context(tgt_len=128, mem_len=640),              # mem_len grows by what tgt_len loses
    batch=Batch(local_size=16),
    stop=Stop(max_tokens=36_000_000_000),
)

SCALING = "Transformer-XL base on wikitext-103, 1 to 128 GPUs (cybertronai)"
one_gpu = Config(
    replace(CYBERTRONAI_BASE, batch=Batch(local_size=32), optim=replace(LAMB, lr=LR_ONE_GPU)),
    Machines("p3.2xlarge"), SCALING,
    "cybertronai's recipe for one V100, also behind its single_machine.sh. No result was published.")
one_machine = Config(
    CYBERTRONAI_BASE, Machines("p3dn.24xlarge"), SCALING,
    "24.617 test perplexity in 2h54 on 8 V100 (cybertronai's README as corrected by its authors, commit 8a70de1). "
    "The README first said 21.5 in 2h50, which they withdrew.",
    tokens_per_s=1_800_000_000 / 10_440)          # its horizon in 2h54
two_machines = Config(
    CYBERTRONAI_BASE, Machines("p3dn.24xlarge", count=2), SCALING,
    "The last step of linear scaling, lr .010 (cybertronai's launch.py). No result was published.")
four_machines = Config(
    replace(CYBERTRONAI_BASE, optim=replace(LAMB, lr=LR_FOUR)), Machines("p3dn.24xlarge", count=4), SCALING,
    "lr held at .012 from here on (cybertronai's launch.py). No result was published.")
eight_machines = Config(
    replace(CYBERTRONAI_BASE, optim=replace(LAMB, lr=LR_EIGHT)), Machines("p3dn.24xlarge", count=8), SCALING,
    "90 seconds per epoch on 64 V100 (cybertronai's README): 1.147 million tokens/s. No perplexity was published.",
    tokens_per_s=1_147_000)
sixteen_machines = Config(
    replace(CYBERTRONAI_BASE, optim=replace(LAMB, lr=LR_SIXTEEN)), Machines("p3dn.24xlarge", count=16), SCALING,
    "The largest of cybertronai's launch.py, 128 V100. No result was published.")

# "examples/sec" of its README multiplied 96 sequences per GPU by the measured steps/s, while these configs run 16: true
# sequences/s are a sixth. Steps took 1719.90, 1785.12, 1769.33, 2027.51, 2081.99 ms (medians, in its
# generate_throughput_numbers.py).
THROUGHPUT = "Throughput of Transformer-XL large, 297M parameters (cybertronai, which calls it 277M)"
test_1 = Config(
    CYBERTRONAI_LARGE, Machines("p3dn.24xlarge"), THROUGHPUT,
    "74.4 sequences/s, 28,600 tokens/s on 8 V100. cybertronai's README says 446 examples/sec, six times too many.",
    tokens_per_s=28_600)
test_2 = Config(
    CYBERTRONAI_LARGE, Machines("p3dn.24xlarge", count=2), THROUGHPUT,
    "143.4 sequences/s, 55,100 tokens/s on 16 V100. cybertronai's README says 860 examples/sec, six times too many.",
    tokens_per_s=55_100)
test_4 = Config(
    replace(CYBERTRONAI_LARGE, optim=replace(LAMB, lr=LR_FOUR)), Machines("p3dn.24xlarge", count=4), THROUGHPUT,
    "289.4 sequences/s, 111,100 tokens/s on 32 V100. cybertronai's README says 1736 examples/sec, six times too many.",
    tokens_per_s=111_100)
test_8 = Config(
    replace(CYBERTRONAI_LARGE, optim=replace(LAMB, lr=LR_TEST_8_16)), Machines("p3dn.24xlarge", count=8), THROUGHPUT,
    "505.1 sequences/s, 193,900 tokens/s on 64 V100. cybertronai's README says 3031 examples/sec, six times too many.",
    tokens_per_s=193_900)
test_16 = Config(
    replace(CYBERTRONAI_LARGE, optim=replace(LAMB, lr=LR_TEST_8_16)), Machines("p3dn.24xlarge", count=16), THROUGHPUT,
    "983.7 sequences/s, 377,700 tokens/s on 128 V100. cybertronai's README says 5904 examples/sec, six times too many.",
    tokens_per_s=377_700)

# The same recipes on A100s.
SCALING_P4D = SCALING.replace("(cybertronai)", "(cybertronai's recipes on A100)")
THROUGHPUT_P4D = THROUGHPUT.replace("(cybertronai, which calls it 277M)", "(cybertronai's recipes on A100)")
one_gpu_p4d = Config(one_gpu.recipe, Machines("p4d.24xlarge", gpus=1), SCALING_P4D,
                     "one_gpu's recipe on one A100 of eight. Nothing was published.")
one_machine_p4d = Config(one_machine.recipe, Machines("p4d.24xlarge"), SCALING_P4D,
                         "one_machine's recipe on 8 A100; one_machine's result, 24.617, is what it should reach.")
two_machines_p4d = Config(two_machines.recipe, Machines("p4d.24xlarge", count=2), SCALING_P4D,
                          "two_machines' recipe on 16 A100. Nothing was published.")
four_machines_p4d = Config(four_machines.recipe, Machines("p4d.24xlarge", count=4), SCALING_P4D,
                           "four_machines' recipe on 32 A100. Nothing was published.")
eight_machines_p4d = Config(eight_machines.recipe, Machines("p4d.24xlarge", count=8), SCALING_P4D,
                            "eight_machines' recipe on 64 A100, to compare with its 90 s per epoch.")
sixteen_machines_p4d = Config(sixteen_machines.recipe, Machines("p4d.24xlarge", count=16), SCALING_P4D,
                              "sixteen_machines' recipe on 128 A100. Nothing was published.")
test_1_p4d = Config(test_1.recipe, Machines("p4d.24xlarge"), THROUGHPUT_P4D,
                    "test_1's recipe on 8 A100, to compare with its 74.4 sequences/s.")
test_2_p4d = Config(test_2.recipe, Machines("p4d.24xlarge", count=2), THROUGHPUT_P4D,
                    "test_2's recipe on 16 A100, to compare with its 143.4 sequences/s.")
test_4_p4d = Config(test_4.recipe, Machines("p4d.24xlarge", count=4), THROUGHPUT_P4D,
                    "test_4's recipe on 32 A100, to compare with its 289.4 sequences/s.")
test_8_p4d = Config(test_8.recipe, Machines("p4d.24xlarge", count=8), THROUGHPUT_P4D,
                    "test_8's recipe on 64 A100, to compare with its 505.1 sequences/s.")
test_16_p4d = Config(test_16.recipe, Machines("p4d.24xlarge", count=16), THROUGHPUT_P4D,
                     "test_16's recipe on 128 A100, to compare with its 983.7 sequences/s.")

# Its later configs, by the last state of its launch.py, which does not run; so no result was published. Those that
# go on from its own checkpoints, which are gone, are these with init_from and a shorter warm-up.
LATER_BASE = replace(
    CYBERTRONAI_BASE, stop=Stop(max_tokens=1_500_000_000), schedule=Schedule("cosine", eta_min_ratio=.1),
    clock=Clock(log_interval=100, eval_interval=500))
LATER_LARGE = replace(
    LATER_BASE, model=replace(CYBERTRONAI_LARGE.model, cutoffs=WT103_CUTOFFS, div_val=4), batch=Batch(local_size=16),
    context=CYBERTRONAI_LARGE.context, eval_context=CYBERTRONAI_LARGE.eval_context)
LATER_GIT = replace(
    LATER_LARGE, model=replace(LATER_LARGE.model, cutoffs=(), div_val=1),
    data=replace(WT103_BPE, dataset="git", dir="data/git"), schedule=Schedule("constant", warmup_tokens=50_000_000))
LATER_WIKI = replace(
    LATER_GIT, data=replace(LATER_GIT.data, dataset="wiki", dir="data/wiki"),
    model=replace(LATER_GIT.model, dropout=.1, dropatt=.1))
# recipe, machines, their kind, sequences a GPU, base_lr
LATER: dict[str, tuple[Recipe, int, str, int, float]] = {
    "one_machine_fp16": (LATER_BASE, 1, "p3dn.24xlarge", 96, .000125 * 5 / 3),
    "one_machine_fp16_2xlr": (LATER_BASE, 1, "p3dn.24xlarge", 96, .000125 * 5 / 3 * 2),
    "one_machine_fp16_4xlr": (LATER_BASE, 1, "p3dn.24xlarge", 96, .000125 * 5 / 3 * 4),
    "one_machine_fp16_8xlr": (LATER_BASE, 1, "p3dn.24xlarge", 96, .000125 * 5 / 3 * 8),
    "one_machine_fp16_small": (LATER_BASE, 1, "p3.16xlarge", 48, .000125 * 5 / 6),
    "two_machines_fp16": (LATER_BASE, 2, "p3dn.24xlarge", 96, .000125 * 5 / 3),
    "one_machine_fp16_large": (LATER_LARGE, 1, "p3dn.24xlarge", 16, .00025),
    "four_machine_fp16_large": (LATER_LARGE, 4, "p3dn.24xlarge", 16, .00025),
    "eight_machine_fp16_large": (LATER_LARGE, 8, "p3dn.24xlarge", 16, .00025),
    "one_small_machine": (LATER_LARGE, 1, "p3.16xlarge", 6, .00025),
    "one_small_machine_wiki": (LATER_WIKI, 1, "p3.16xlarge", 6, .00025),
    "one_tiny_machine_git": (LATER_GIT, 1, "p3.2xlarge", 6, .00025),
    "one_small_machine_git": (LATER_GIT, 1, "p3.16xlarge", 6, .00025),
    "one_machine_git": (LATER_GIT, 1, "p3dn.24xlarge", 18, .00025),
}


def later(name: str) -> Config:
    """A row of LATER."""
    recipe, machines, kind, per_gpu, base_lr = LATER[name]
    return Config(
        replace(recipe, batch=Batch(local_size=per_gpu), optim=replace(LAMB, lr=LinearLr(base_lr, 32))),
        Machines(kind, count=machines), "cybertronai's later configs",
        "Its authors say that it gives NaN after 30 seconds." if name.endswith("8xlr") else "No result was published.")


LATER_CONFIGS = {name: later(name) for name in LATER}

# --- NVIDIA: the best published training of these models ---------------------------------------------------------

# `size` is over all GPUs and `micro_size` what NVIDIA let one GPU take at a time; its batch_chunk follows from the two
# on any number of GPUs. base: 32 on A100, and on V100 16 GB in fp16, else 16. large: 16 on A100 in fp16, 8 in tf32;
# 4 and 2 on V100 16 GB; 8 on V100 32 GB, in its multi-node runs in fp16 16.
NVIDIA_BASE = Recipe(
    model=Model(n_layer=16, d_model=512, n_head=8, d_head=64, d_inner=2048, cutoffs=NVIDIA_CUTOFFS),
    data=WT103,
    context=Context(tgt_len=192, mem_len=192),
    eval_context=Context(tgt_len=192, mem_len=192),
    test_context=Context(tgt_len=64, mem_len=640, clamp_len=400, same_length=True),
    roll=True,
    batch=Batch(size=256, micro_size=32),
    optim=LAMB,
    schedule=Schedule("cosine", warmup_steps=1000, eta_min=.001),
    stop=Stop(max_steps=40000),
    precision="fp16",
    clock=Clock(log_interval=10, eval_interval=5000),
)
NVIDIA_LARGE = replace(
    NVIDIA_BASE,
    model=Model(n_layer=18, d_model=1024, n_head=16, d_head=64, d_inner=4096, dropout=.2, dropatt=.2, init_std=.005,
                cutoffs=NVIDIA_CUTOFFS, div_val=4),
    context=Context(tgt_len=384, mem_len=384),
    eval_context=Context(tgt_len=128, mem_len=640),
    test_context=Context(tgt_len=128, mem_len=1600, clamp_len=1000, same_length=True),
    batch=Batch(size=128, micro_size=16),
    schedule=Schedule("cosine", warmup_steps=16000, eta_min=.0001),
    stop=Stop(max_steps=100000),
    clock=Clock(log_interval=100, eval_interval=5000),
)
NVIDIA_LARGE_MULTINODE = replace(
    NVIDIA_LARGE, batch=Batch(size=512, micro_size=16), optim=replace(LAMB, lr=.02), stop=Stop(max_steps=25000),
    eval_streams=128, clock=Clock(log_interval=100, eval_interval=1000))

NVIDIA = "NVIDIA's recipes on wikitext-103"
nvidia_base = Config(
    NVIDIA_BASE, Machines("p4d.24xlarge"), NVIDIA,
    "23.24 test perplexity in 76 min on 8 A100 40GB with AMP (NVIDIA's README; 16 seeds: 23.24 +- .078), "
    "at 449,890 tokens/s.",
    tokens_per_s=449_890)
nvidia_base_p3dn = Config(
    NVIDIA_BASE, Machines("p3dn.24xlarge"), NVIDIA,
    "23.18 test perplexity in 121 min on 8 V100 16GB with AMP (NVIDIA's README), at 258,648 tokens/s.",
    tokens_per_s=258_648)
nvidia_large = Config(
    NVIDIA_LARGE, Machines("p4d.24xlarge"), NVIDIA,
    "18.19 test perplexity in 430 min on 8 A100 40GB with AMP (NVIDIA's README; 16 seeds: 18.17 +- .040), "
    "at 191,148 tokens/s.",
    tokens_per_s=191_148)
nvidia_large_p3dn = Config(
    replace(NVIDIA_LARGE, batch=Batch(size=128, micro_size=8)), Machines("p3dn.24xlarge"), NVIDIA,
    "18.17 test perplexity in 984 min on 8 V100 16GB with AMP and micro-batch 4 (NVIDIA's README). With 8, "
    "8 GPUs of a DGX-2H reached 107,073 tokens/s.")
nvidia_large_multinode = Config(
    NVIDIA_LARGE_MULTINODE, Machines("p4d.24xlarge", count=16), NVIDIA,
    "18.28 test perplexity in 74 min on 128 V100, 8 DGX-2H, with AMP (NVIDIA's README; 10 seeds: 18.30 +- .027); here "
    "on as many A100. eta_min is .0001 as in its yaml; its README says .0002.")
nvidia_large_multinode_p3dn = Config(
    NVIDIA_LARGE_MULTINODE, Machines("p3dn.24xlarge", count=16), NVIDIA,
    "18.28 test perplexity in 74 min on 128 V100, 8 DGX-2H, with AMP (NVIDIA's README), at 1,189,700 tokens/s.")

nvidia_tf_base = Config(                          # run_wt103_base.sh; its weight decay stands in its code
    replace(NVIDIA_BASE, model=replace(NVIDIA_BASE.model, untie_r=True), optim=replace(LAMB, weight_decay=.01),
            schedule=Schedule("cosine", warmup_steps=1000, eta_min_ratio=.1), batch=Batch(size=256, micro_size=16)),
    Machines("p4d.24xlarge"), NVIDIA,
    "23.48 test perplexity in 142 min on 8 A100 40GB with AMP (README of NVIDIA's TensorFlow version; 20 seeds: "
    "23.38 +- .088), at 155,656 tokens/s.",
    tokens_per_s=155_656)

# Its entries by machine, as values: they differ in how many sequences a GPU takes at a time, and in the precision. A
# DGX is a machine of one's own: the one the command is typed on, or --hosts. For fewer GPUs --set machines.gpus=4, for
# fewer nodes --machines=4 --set recipe.eval_streams=64 (16 a node): batch_chunk follows from the number of GPUs.
DGX = {"dgx1": (8, "V100 16GB"), "dgx2": (16, "V100 32GB"), "dgxa100": (8, "A100 40GB")}     # GPUs of each
NVIDIA_RECIPES = {"base": NVIDIA_BASE, "large": NVIDIA_LARGE, "multinode": NVIDIA_LARGE_MULTINODE}
# micro_size; test perplexity, minutes and tokens/s that its README has, with all GPUs, of multinode with 8 nodes.
MEASURED: dict[tuple[str, str, Precision], tuple[int, float, int, int]] = {
    ("base", "dgx1", "fp16"): (32, 23.18, 121, 258_648), ("base", "dgx1", "fp32"): (16, 23.17, 316, 97_005),
    ("base", "dgx2", "fp16"): (16, 23.22, 80, 414_994), ("base", "dgx2", "fp32"): (16, 23.22, 149, 222_920),
    ("base", "dgxa100", "fp16"): (32, 23.24, 76, 449_890), ("base", "dgxa100", "tf32"): (32, 23.24, 110, 305_933),
    ("large", "dgx1", "fp16"): (4, 18.17, 984, 66_716), ("large", "dgx1", "fp32"): (2, 18.22, 2983, 24_595),
    ("large", "dgx2", "fp16"): (8, 18.20, 394, 211_387), ("large", "dgx2", "fp32"): (8, 18.21, 1075, 77_568),
    ("large", "dgxa100", "fp16"): (16, 18.19, 430, 191_148), ("large", "dgxa100", "tf32"): (8, 18.18, 735, 106_651),
    ("multinode", "dgx2", "fp16"): (16, 18.28, 74, 1_189_700), ("multinode", "dgx2", "fp32"): (8, 18.27, 156, 514_500),
}


def on_dgx(model: str, machine: str, precision: Precision) -> Config:
    """A row of MEASURED."""
    micro_size, ppl, minutes, tokens_per_s = MEASURED[model, machine, precision]
    recipe, (gpus, gpu), nodes = NVIDIA_RECIPES[model], DGX[machine], 8 if model == "multinode" else 1
    return Config(
        replace(recipe, batch=replace(recipe.batch, micro_size=micro_size), precision=precision),
        Machines(LOCAL, count=nodes, gpus=gpus), "NVIDIA's recipes on machines of one's own",
        f"{ppl} test perplexity in {minutes} min on {nodes * gpus} {gpu} (NVIDIA's README), "
        f"at {tokens_per_s:,} tokens/s.", tokens_per_s)


def trainbench(config: Config) -> Config:
    """NVIDIA's entry to measure speed with: the first 500 steps of a recipe on its machines, each of them logged."""
    recipe = config.recipe
    return replace(
        config, about="The first 500 steps of the recipe, each logged, to measure tokens/s (NVIDIA's trainbench).",
        recipe=replace(recipe, stop=Stop(max_steps=500),
                       schedule=replace(recipe.schedule, horizon_steps=recipe.stop.max_steps),
                       clock=replace(recipe.clock, log_interval=1, eval_interval=None, test=False)))


nvidia_base_trainbench = trainbench(nvidia_base)
nvidia_large_trainbench = trainbench(nvidia_large)
nvidia_multinode_trainbench = trainbench(nvidia_large_multinode)
ON_DGX = {f"nvidia_{'_'.join(key)}": on_dgx(*key) for key in MEASURED}

# --- paper: the original scripts ---------------------------------------------------------------------------------

PAPER_WT103_BASE = Recipe(
    model=Model(n_layer=16, d_model=410, n_head=10, d_head=41, d_inner=2100, cutoffs=WT103_CUTOFFS),
    data=WT103,
    context=Context(tgt_len=150, mem_len=150),
    eval_context=Context(tgt_len=150, mem_len=150),
    test_context=Context(tgt_len=64, mem_len=640, clamp_len=400, same_length=True),
    eval_streams=10,
    batch=Batch(size=60),
    optim=Optim("adam", lr=.00025),
    schedule=Schedule("cosine"),
    stop=Stop(max_steps=200_000),
    clock=Clock(log_interval=200),
)
PAPER_WT103_LARGE = replace(
    PAPER_WT103_BASE,
    model=Model(n_layer=18, d_model=1024, n_head=16, d_head=64, d_inner=4096, dropout=.2, dropatt=.2,
                cutoffs=WT103_CUTOFFS, div_val=4),
    context=Context(tgt_len=384, mem_len=384),
    eval_context=Context(tgt_len=128, mem_len=640),
    test_context=Context(tgt_len=128, mem_len=1600, clamp_len=1000, same_length=True),
    batch=Batch(size=128, micro_size=8),
    schedule=Schedule("cosine", warmup_steps=16_000),
    stop=Stop(max_steps=4_000_000),
)
PAPER_BYTES_BASE = replace(
    PAPER_WT103_BASE,
    model=Model(n_layer=12, d_model=512, n_head=8, d_head=64, d_inner=2048),
    data=ENWIK8,
    context=Context(tgt_len=512, mem_len=512),
    eval_context=Context(tgt_len=128, mem_len=896),
    test_context=Context(tgt_len=80, mem_len=2100, clamp_len=820, same_length=True),
    batch=Batch(size=22),
    stop=Stop(max_steps=400_000),
)
PAPER_BYTES_LARGE = replace(
    PAPER_BYTES_BASE,
    model=Model(n_layer=24, d_model=1024, n_head=8, d_head=128, d_inner=3072, dropout=.15, dropatt=.15),
    context=Context(tgt_len=768, mem_len=768),
    eval_context=Context(tgt_len=128, mem_len=1408),
    test_context=Context(tgt_len=128, mem_len=3800, clamp_len=1000, same_length=True),
    batch=Batch(size=64, micro_size=4),
    schedule=Schedule("cosine", warmup_steps=4000),
)
PAPER_LM1B_BASE = replace(
    PAPER_WT103_BASE,
    model=Model(n_layer=18, d_model=1024, n_head=8, d_head=128, d_inner=4096, dropout=0,
                cutoffs=LM1B_CUTOFFS, div_val=4, tie_projs=(False, False, False, False)),
    data=LM1B,
    context=Context(tgt_len=32, mem_len=32),
    eval_context=Context(tgt_len=32, mem_len=32),
    test_context=Context(tgt_len=32, mem_len=128, same_length=True),
    eval_streams=64,
    shuffle_sentences=True,
    batch=Batch(size=224),
    schedule=Schedule("cosine", warmup_steps=20_000),
    stop=Stop(max_steps=500_000),
)
PAPER_LM1B_LARGE = replace(
    PAPER_LM1B_BASE,
    model=Model(n_layer=24, d_model=1280, n_head=16, d_head=80, d_inner=8192, dropout=.05, dropatt=.05,
                cutoffs=LM1B_CUTOFFS, div_val=4, tie_projs=(False, False, False, False)),
    eval_streams=8,
    batch=Batch(size=512),
    schedule=Schedule("cosine", warmup_steps=30_000),
    stop=Stop(max_steps=1_200_000),
)

# The published large results came from pods of TPUs; the machines below are ours, and no time was published for them.
PAPER = "The paper's models, by the scripts of its repository"
BYTES = "The ancestors' loader drops line ends, which leaves 204 symbols of enwik8; here every byte counts."
SENTENCES = "Sentences are shuffled anew in each epoch, as the repository does."
wt103_base_paper = Config(
    PAPER_WT103_BASE, Machines("p3.8xlarge"), PAPER,
    "24.03 test perplexity with 151M parameters on 4 GPUs of at least 11 GB (repository's README; paper: 24.0).")
wt103_large_paper = Config(
    PAPER_WT103_LARGE, Machines("p4d.24xlarge"), PAPER,
    "18.3 test perplexity (paper, table 1), which calls it 257M parameters; it has 285M.")
enwik8_base = Config(
    PAPER_BYTES_BASE, Machines("p3.8xlarge"), PAPER,
    f"1.06 bits per character with 12 layers, 41M parameters (paper, table 2). {BYTES}")
enwik8_large = Config(
    PAPER_BYTES_LARGE, Machines("p4d.24xlarge"), PAPER,
    f"0.99 bits per character with 24 layers, 277M parameters (paper, table 2). {BYTES}")
text8_base = Config(
    replace(PAPER_BYTES_BASE, data=TEXT8), Machines("p3.8xlarge"), PAPER,
    "enwik8_base's recipe on text8, a script of the repository. The paper has no result for it.")
text8_large = Config(
    replace(PAPER_BYTES_LARGE, data=TEXT8, schedule=Schedule("cosine")), Machines("p4d.24xlarge"), PAPER,
    "1.08 bits per character with 24 layers, 277M parameters (paper, table 3).")
lm1b_base = Config(
    PAPER_LM1B_BASE, Machines("p3.8xlarge"), PAPER,
    "23.5 test perplexity with 0.46B parameters (paper, table 4); the repository's script makes 0.36B. "
    f"{SENTENCES}")
lm1b_large = Config(
    PAPER_LM1B_LARGE, Machines("p4d.24xlarge"), PAPER,
    f"21.8 test perplexity with 0.8B parameters (paper, table 4). {SENTENCES}")

# --- ours: what the ancestors' recipes become with another optimizer ------------------------------------------------

base_muon = Config(
    replace(NVIDIA_BASE, optim=Optim("muon", lr=.002, betas=(.9, .98), momentum=.95)), Machines("p4d.24xlarge"),
    "NVIDIA's base with Muon in LAMB's place",
    "The same model, data and tokens as nvidia_base. On a small model and a million tokens its perplexity over 5 "
    "seeds was 56.8, LAMB's 478.7, and 76.8 at half its rate (benchmarks/quality.md). Not trained at this size.")

# --- ours: the machine the command is typed on --------------------------------------------------------------------

HERE = "For this machine, without a GPU"
TINY = Recipe(
    model=Model(n_layer=2, d_model=64, n_head=2, d_head=32, d_inner=128),
    data=STDLIB,
    context=Context(tgt_len=32, mem_len=32),
    eval_context=Context(tgt_len=32, mem_len=32),
    eval_streams=256,                             # a few long steps: most of a run's time is evaluation
    eval_max_segments=5,
    batch=Batch(size=8),
    optim=Optim("adam", lr=.004),
    schedule=Schedule("cosine", warmup_steps=5),
    stop=Stop(max_steps=60),
    clock=Clock(log_interval=10, eval_interval=30, checkpoint_interval=20),
)
DEMO = replace(
    TINY,
    model=Model(n_layer=4, d_model=128, n_head=4, d_head=32, d_inner=512, dropout=0),     # less than one epoch
    data=replace(STDLIB, n_token=2048),
    context=Context(tgt_len=32, mem_len=128),
    eval_context=Context(tgt_len=32, mem_len=128),
    eval_streams=64, eval_max_segments=None,
    batch=Batch(size=16),
    optim=Optim("adamw", lr=.003, betas=(.9, .98), weight_decay=.01),
    schedule=Schedule("cosine", warmup_steps=100, eta_min=.00015),
    stop=Stop(max_steps=2000),
    clock=Clock(log_interval=50, eval_interval=1000, checkpoint_interval=500),
)
tiny = Config(
    TINY, Machines(LOCAL), HERE,
    "The smallest that goes all the way, in seconds: the guinea pig of the tests. Its perplexity means nothing.")
demo = Config(
    DEMO, Machines(LOCAL), HERE,
    "What single_machine.sh trains on a processor: below 40% of a unigram model's perplexity on the text that comes "
    "with Python, in minutes.")
demo_wt103 = Config(
    replace(DEMO, model=replace(DEMO.model, cutoffs=WT103_CUTOFFS, div_val=4), data=WT103),
    Machines(LOCAL), HERE, "demo on wikitext-103 and its 267,735 words. Nothing was published.")

CONFIGS = {name: x for name, x in globals().items() if isinstance(x, Config)} | ON_DGX | LATER_CONFIGS
