"""Which processors ranks keep to, on machines as they are sold; the topologies are written out by hand."""
from __future__ import annotations

import itertools
import os
from dataclasses import replace

import pytest

from engine import affinity
from engine.affinity import Topology, cores_of, cpus_in, listed, placed
from engine.config import Clock
from tests.ranks import run_ranks
from tests.txl.small import RECIPE, train_here


def machine(groups: int, cores: int, gpus_near: list[int]) -> Topology:
    """`groups` of so many cores, each with two threads: n and n + all cores. `gpus_near`: of each GPU, its group."""
    total = groups * cores
    near = tuple(frozenset(cpu for core in range(g * cores, (g + 1) * cores) for cpu in (core, core + total))
                 for g in gpus_near)
    return Topology(near, tuple((core, core + total) for core in range(total)))


MACHINES = {
    "DGX-1": machine(2, 20, [0, 0, 0, 0, 1, 1, 1, 1]),
    "DGX-2": machine(2, 24, [0] * 8 + [1] * 8),
    "DGX A100": machine(8, 16, [3, 3, 1, 1, 7, 7, 5, 5]),        # four parts of each of two sockets
    "p3dn": machine(2, 24, [0, 0, 0, 0, 1, 1, 1, 1]),
    "one socket": machine(1, 8, [0]),
    "uneven": machine(1, 7, [0, 0, 0]),
}
UNIQUE = ["socket_unique_interleaved", "socket_unique_continuous"]


@pytest.mark.parametrize("mode", [*UNIQUE, "single_unique"])
@pytest.mark.parametrize("name", MACHINES)
def test_unique_modes_give_no_core_to_two_ranks_and_keep_each_near_its_gpu(name, mode):
    topology = MACHINES[name]
    ranks = placed(mode, topology)
    core_of = {cpu: core for core in topology.cores for cpu in core}
    for one, other in itertools.combinations(ranks, 2):
        assert not {core_of[cpu] for cpu in one} & {core_of[cpu] for cpu in other}
    for mine, near in zip(ranks, topology.near):
        assert mine
        assert mine <= near
        assert len(mine) == 1 or mode != "single_unique"


@pytest.mark.parametrize("mode", UNIQUE)
@pytest.mark.parametrize("name", MACHINES)
def test_socket_unique_modes_share_out_all_that_is_near_evenly_and_whole_cores(name, mode):
    topology = MACHINES[name]
    ranks = placed(mode, topology)
    assert frozenset().union(*ranks) == frozenset().union(*topology.near)
    for near in set(topology.near):
        sizes = [len(mine) for mine, its in zip(ranks, topology.near) if its == near]
        assert max(sizes) - min(sizes) <= 2                      # a core
    for mine, core in itertools.product(ranks, topology.cores):
        assert len(mine & set(core)) in (0, 2)


def test_the_modes_by_hand_on_a_dgx_1():
    def first_two(mode):
        return [listed(cpus) for cpus in placed(mode, MACHINES["DGX-1"])[:2]]
    assert first_two("socket") == ["0-19,40-59"] * 2
    assert first_two("single") == ["0", "0"]
    assert first_two("single_unique") == ["0", "1"]
    assert first_two("socket_unique_continuous") == ["0-4,40-44", "5-9,45-49"]
    assert first_two("socket_unique_interleaved") == ["0,4,8,12,16,40,44,48,52,56", "1,5,9,13,17,41,45,49,53,57"]
    assert first_two("disabled") == ["", ""]
    assert listed(placed("socket", MACHINES["DGX-1"])[7]) == "20-39,60-79"


@pytest.mark.parametrize("mode", [*UNIQUE, "single_unique"])
def test_more_ranks_than_cores_share_them_all(mode):
    crowded = machine(1, 2, [0, 0, 0])
    assert placed(mode, crowded) == crowded.near


@pytest.mark.parametrize("mode", ["socket", "single", "single_unique", *UNIQUE])
def test_a_rank_that_is_given_nothing_near_its_gpu_stays_where_it_is(mode):
    """A container may have only processors of the other socket."""
    topology = replace(MACHINES["DGX-1"], near=(frozenset(), frozenset()))
    assert placed(mode, topology) == (frozenset(), frozenset())


def test_the_kernels_lists_are_read_and_written():
    assert cpus_in("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert cpus_in("") == set()
    assert listed(frozenset({0, 1, 2, 3, 8, 10, 11})) == "0-3,8,10-11"


def test_cores_and_what_is_near_a_gpu_come_from_sys(tmp_path):
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        topology = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(siblings + "\n")
    (tmp_path / "devices/system/cpu/online").write_text("0-3\n")
    gpu = tmp_path / "bus/pci/devices/0000:07:00.0"
    gpu.mkdir(parents=True)
    (gpu / "local_cpulist").write_text("1,3\n")
    assert cores_of(tmp_path, {0, 1, 2, 3}) == ((0, 2), (1, 3))
    assert cores_of(tmp_path, {0, 1, 3}) == ((0,), (1, 3))       # what was not given is not used
    assert cores_of(tmp_path / "absent", {4, 1}) == ((1,), (4,))
    assert affinity._local(tmp_path, "0000:07:00.0") == {1, 3}
    assert affinity._local(tmp_path, "0000:08:00.0") == {0, 1, 2, 3}


def _processors(folder, mode):
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]    # as torchrun says
    train_here(folder, replace(RECIPE, clock=replace(RECIPE.clock, affinity=mode)), None, 1)
    return os.sched_getaffinity(0)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one processor cannot be shared out")
def test_two_ranks_without_gpus_share_the_processors_only_where_asked(tmp_path):
    given = os.sched_getaffinity(0)
    first, second = run_ranks(2, _processors, tmp_path / "shared", "socket_unique_continuous")
    assert first | second == given
    assert not first & second
    assert run_ranks(2, _processors, tmp_path / "default", Clock().affinity) == [given, given]
