"""Which machine gets which software, for types as EC2 describes them."""
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.ec2 import Type
from cluster.run import Refused
from cluster.stacks import CURRENT, VOLTA, stack_for

P4D = Type("p4d.24xlarge", 96, 1152, 8, "A100", 40, "x86_64", efa=4, cards=4, nvme_gib=7450, spot=True)
P3DN = replace(P4D, name="p3dn.24xlarge", gpu="V100", efa=1, cards=1)
C5 = Type("c5.large", 2, 4, 0, None, 0, "x86_64", efa=0, cards=1, nvme_gib=0, spot=True)
C7G = replace(C5, name="c7g.large", arch="arm64")


def test_v100_gets_the_last_software_that_runs_it():
    stack = stack_for(P3DN)
    assert stack is VOLTA
    assert stack.index_url == "https://download.pytorch.org/whl/cu126"
    assert stack.driver == "580"
    assert all("580" in name and "open" not in name for name in stack.packages)      # the open modules leave Volta out
    assert stack.env == {}                        # no EFA software in its image


@pytest.mark.parametrize("gpu", ["A100", "H100", "A10G", "T4", "L4"])
def test_newer_gpus_get_todays_software(gpu):
    assert stack_for(replace(P4D, gpu=gpu)) is CURRENT
    assert CURRENT.index_url is None
    assert CURRENT.packages == ()


@pytest.mark.parametrize(("kind", "arch"), [(C5, "amd64"), (C7G, "arm64")])
def test_a_processor_gets_ubuntu_of_its_architecture_and_small_wheels(kind, arch):
    stack = stack_for(kind)
    assert stack.image == f"/aws/service/canonical/ubuntu/server/24.04/stable/current/{arch}/hvm/ebs-gp3/ami-id"
    assert stack.index_url == "https://download.pytorch.org/whl/cpu"
    assert (stack.driver, stack.env, stack.packages) == (None, {}, ())


@pytest.mark.parametrize("kind", [replace(P4D, name="g5g.xlarge", gpu="T4g", arch="arm64"), replace(P4D, gpu="K80")])
def test_gpus_without_software_are_refused_before_they_cost(kind):
    with pytest.raises(Refused, match=rf"{kind.name} has {kind.gpu} on {kind.arch}.*--instance_type"):
        stack_for(kind)


@pytest.mark.parametrize("stack", [CURRENT, VOLTA, stack_for(C5)], ids=lambda stack: stack.name)
def test_every_stack_trains_with_the_torch_that_is_tested_here(stack):
    requirements = (Path(__file__).resolve().parents[2] / "requirements.txt").read_text()
    assert re.search(rf"^torch=={re.escape(stack.torch)}\b", requirements, re.MULTILINE)
