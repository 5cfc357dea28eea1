from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.backends import Wish
from cluster.local import Here, lay_out
from cluster.plan import Layout, Node, Plan, price, torchrun
from cluster.run import NEW, Standing
from cluster.spec import Config, Machines, Terms
from configs import CONFIGS, one_machine, tiny
from engine.values import override

LAPTOP = Here("/env/python", gpus=(), cores=4, port=6000)
SERVER = Here("/env/python", gpus=("0", "1", "2", "3"), cores=32, port=6000, pythonpath="/code")


def wish(config: Config, name: str = "x", **terms) -> Wish:
    return Wish(name, config, NEW, Terms(**terms))


def test_a_plan_is_this_text():
    config = override(CONFIGS["two_machines"], "about=It stands for nothing.", "recipe.precision=bf16",
                      "recipe.batch.micro_size=40")
    plan = Plan("trial", "two_machines", config, "local", lay_out(wish(config, "trial"), LAPTOP),
                ("recipe.precision=bf16", "recipe.batch.micro_size=40"), "python launch.py --config=two_machines",
                Standing("unfinished", 300, changes=("clock.log_interval: 10 -> 5",)))
    assert str(plan) == """\
run       runs/trial: goes on from step 300, now with clock.log_interval: 10 -> 5
config    two_machines: It stands for nothing.
set       recipe.precision=bf16
set       recipe.batch.micro_size=40
machines  this machine: 2 nodes, each with 1 rank on its processor (--backend=local)
cost      $0 here. The config's own machines, 2 x p3dn.24xlarge: $62.42 per hour on demand
model     txl, 186,707,162 parameters, bf16
batch     192 sequences over 2 rank(s), 96 each, in 3 micro-batch(es)
lr        lamb, peak 0.00125
length    73,243 steps of 24,576 tokens: 1,800,019,968 to the end
setup     none: /env/python as it is
note      2 ranks instead of 16: a smaller batch, and with it another curve.
node 0    127.0.0.1: OMP_NUM_THREADS=2 GLOO_SOCKET_IFNAME=lo GOMP_SPINCOUNT=10000 CUDA_VISIBLE_DEVICES='' \
/env/python -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --node-rank=0 --master-addr=127.0.0.1 \
--master-port=6000 -m txl.train runs/trial/recipe.json
node 1    127.0.0.1: OMP_NUM_THREADS=2 GLOO_SOCKET_IFNAME=lo GOMP_SPINCOUNT=10000 CUDA_VISIBLE_DEVICES='' \
/env/python -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --node-rank=1 --master-addr=127.0.0.1 \
--master-port=6000 -m txl.train runs/trial/recipe.json"""


def test_a_node_is_this_value():
    config = replace(one_machine, machines=Machines("p4d.24xlarge", count=2))
    assert lay_out(wish(config), SERVER).nodes[1] == Node(
        rank=1, address="127.0.0.1", ranks=2,
        env={"OMP_NUM_THREADS": "8", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": "/code", "CUDA_VISIBLE_DEVICES": "2,3"},
        command=("/env/python", "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--node-rank=1",
                 "--master-addr=127.0.0.1", "--master-port=6000", "-m", "txl.train", "runs/x/recipe.json"))


@pytest.mark.parametrize(("machines", "here", "ranks", "visible"), [
    (Machines("p3dn.24xlarge"), LAPTOP, [1], [""]),
    (Machines("p3dn.24xlarge", count=3), LAPTOP, [1, 1, 1], ["", "", ""]),
    (Machines("p3dn.24xlarge"), SERVER, [4], ["0,1,2,3"]),
    (Machines("p3dn.24xlarge", count=3), SERVER, [1, 1, 1], ["0", "1", "2"]),
    (Machines("p3dn.24xlarge", count=5), SERVER, [1] * 5, [""] * 5),              # too few GPUs for all: none for any
    (Machines("p3.2xlarge"), SERVER, [1], ["0"]),                                 # the config uses one
    (Machines("p4d.24xlarge", gpus=2), SERVER, [2], ["0,1"]),
    (Machines("local"), SERVER, [4], ["0,1,2,3"]),
    (Machines("x1.unheard-of"), SERVER, [4], ["0,1,2,3"]),
])
def test_nodes_share_the_gpus_that_are_here(machines, here, ranks, visible):
    nodes = lay_out(wish(replace(one_machine, machines=machines)), here).nodes
    assert [node.ranks for node in nodes] == ranks
    assert [node.env["CUDA_VISIBLE_DEVICES"] for node in nodes] == visible
    assert [node.env["OMP_NUM_THREADS"] for node in nodes] == [str(max(1, here.cores // sum(ranks)))] * len(nodes)


def test_a_small_batch_leaves_gpus_idle_rather_than_ranks_without_a_sequence():
    config = override(tiny, "recipe.batch.size=2")
    assert lay_out(wish(config), SERVER).ranks == 2


def test_more_nodes_than_sequences_cannot_be_planned():
    config = override(tiny, "machines.count=9")
    with pytest.raises(ValueError, match="leaves some of the 9 ranks without a sequence"):
        Plan("x", "tiny", config, "local", lay_out(wish(config), LAPTOP))


def test_notes_say_what_differs_from_the_configs_own_machines():
    unheard = lay_out(wish(replace(one_machine, machines=Machines("x1.unheard-of"))), LAPTOP)
    assert unheard.notes == (
        "x1.unheard-of is not in the table of cluster/spec.py: its GPUs and price are unknown.",
        "fp16 is for GPUs. On a processor take --set recipe.precision=fp32")
    assert "price unknown" in unheard.cost
    assert lay_out(wish(tiny), LAPTOP).notes == ()


def test_terms_that_mean_nothing_here_are_named():
    assert lay_out(wish(tiny, budget=5.0, wait=1.0, skip_setup=True), LAPTOP).notes == (
        "without effect on this machine: --wait, --budget",)


def test_uneven_shares_are_shown_as_a_span():
    config = override(tiny, "machines.count=3", "recipe.batch.micro_size=2")
    plan = Plan("x", "tiny", config, "local", lay_out(wish(config), LAPTOP))
    assert "8 sequences over 3 rank(s), 2 to 3 each, in 1 to 2 micro-batch(es)" in str(plan)


def test_a_run_does_not_go_on_with_another_batch():
    config = override(tiny, "machines.count=2", "recipe.batch.size=none", "recipe.batch.local_size=8")
    layout = lay_out(wish(config), LAPTOP)
    with pytest.raises(ValueError, match=r"runs/x went up to step 40 with 8 sequences a step, batch.local_size=8 on "
                                         r"each of 1 rank\(s\). Here it would have 2 rank\(s\) and 16 sequences"):
        Plan("x", "tiny", config, "local", layout, standing=Standing("unfinished", 40, ranks=1))
    for standing in (Standing("unfinished", 40, ranks=2), Standing("unfinished"), Standing("finished", 60)):
        Plan("x", "tiny", config, "local", layout, standing=standing)


def test_the_same_batch_may_go_on_with_other_ranks_and_the_plan_says_what_that_costs():
    layout = lay_out(wish(override(tiny, "machines.count=2")), LAPTOP)
    plan = Plan("x", "tiny", tiny, "local", layout, standing=Standing("unfinished", 40, ranks=1))
    assert str(plan).startswith("run       runs/x: goes on from step 40, with 2 rank(s) instead of 1: memories start "
                                "empty\n")
    plan = Plan("x", "tiny", tiny, "local", layout, standing=Standing("unfinished", 40, ranks=2))
    assert str(plan).startswith("run       runs/x: goes on from step 40\n")


@pytest.mark.parametrize(("overrides", "steps"), [
    (["recipe.stop.max_steps=7"], 7),
    (["recipe.stop.max_steps=none", "recipe.stop.max_tokens=1000"], 4),            # 256 a step
    (["recipe.stop.max_steps=3", "recipe.stop.max_tokens=1000"], 3),
])
def test_a_run_is_as_long_as_the_nearer_of_its_two_ends(overrides, steps):
    config = override(tiny, *overrides)
    assert Plan("x", "tiny", config, "local", lay_out(wish(config), LAPTOP)).steps == steps


def test_prices_are_those_of_all_machines():
    assert price(CONFIGS["test_16"]) == "16 x p3dn.24xlarge: $499.39 per hour on demand"
    assert price(tiny) == "$0"


def test_a_backend_may_lay_out_nodes_with_different_ranks():
    nodes = tuple(Node(i, f"10.0.0.{i}", ranks, {}, torchrun(
        "python3", "txl.train", Path("runs/x/recipe.json"), nnodes=2, node_rank=i, ranks=ranks, master_addr="10.0.0.0",
        master_port=29500)) for i, ranks in enumerate([8, 4]))
    layout = Layout(nodes, "2 machines elsewhere", "unknown", "pip install")
    assert layout.ranks == 12
    assert str(nodes[1]) == ("python3 -m torch.distributed.run --nnodes=2 --nproc-per-node=4 --node-rank=1 "
                             "--master-addr=10.0.0.0 --master-port=29500 -m txl.train runs/x/recipe.json")
