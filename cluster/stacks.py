"""Which software goes onto which machine: image, driver and torch, as data. Nothing here was tried on a real machine.

Sources. The public parameters' names: AWS's Deep Learning AMI guide and Canonical's list, as public repositories use
them. Drivers and Python: AWS's release notes of its Base OSS images. R580 is NVIDIA's last driver for Volta, whose GPUs
the open kernel modules of newer ones exclude (NVIDIA on its transition to them, July 2024); torch's default wheels are
built with CUDA 13, which leaves Volta out as well, those of its cu126 index are not.
"""
from __future__ import annotations

from dataclasses import dataclass, field

from cluster.ec2 import Type
from cluster.run import Refused

DLAMI = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/{arch}/hvm/ebs-gp3/ami-id"
TORCH = "2.13.0"
# Where EFA's installer puts NCCL's plugin and libfabric; unverified. Since plugin 1.7 with libfabric 1.18 nothing need
# be switched on (FI_PROVIDER, FI_EFA_USE_DEVICE_RDMA), but a process that forks may run out of huge pages
# (aws-ofi-nccl, doc/efa-env-var.md). The image has plugin 1.17 or newer.
EFA = {"LD_LIBRARY_PATH": "/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib", "FI_EFA_USE_HUGE_PAGE": "0"}


@dataclass(frozen=True)
class Stack:
    """What a kind of machine runs. A machine is complete when the image's boot, `packages` and torch are in place."""
    name: str
    image: str                                    # SSM parameter with the image's id
    about: str
    driver: str | None                            # NVIDIA's, as expected: information, never compared
    index_url: str | None                         # of torch's wheels; None: PyPI
    torch: str = TORCH
    python: str = "python3"                       # of the image: 3.12 on Ubuntu 24.04
    ssh_user: str = "ubuntu"
    packages: tuple[str, ...] = ()                # of apt, that bring the driver where the image has none
    env: dict[str, str] = field(default_factory=dict)             # where EFA is used; {}: no EFA software there


CURRENT = Stack(
    "current", DLAMI, "AWS's Base OSS image for G4dn and newer, P4d and newer; CUDA 13 wheels of torch",
    driver="595", index_url=None, env=EFA)
# AWS's images with the proprietary driver that list P3dn are Amazon Linux 2, whose glibc 2.26 is too old for torch's
# manylinux_2_28 wheels; so a plain Ubuntu with Ubuntu's own build of the driver for its AWS kernel.
VOLTA = Stack(
    "volta", UBUNTU.format(arch="amd64"), "Ubuntu with NVIDIA's proprietary R580, the last for V100; CUDA 12.6 wheels "
    "of torch; NCCL over TCP, without EFA",
    driver="580", index_url="https://download.pytorch.org/whl/cu126",
    packages=("linux-modules-nvidia-580-server-aws", "nvidia-headless-no-dkms-580-server", "nvidia-utils-580-server"))
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def stack_for(kind: Type) -> Stack:
    """Raises Refused for GPUs that no wheel of torch is known to serve."""
    if kind.gpus and (kind.arch != "x86_64" or kind.gpu in ("K80", "M60")):
        raise Refused(f"{kind.name} has {kind.gpu} on {kind.arch}, for which no driver and torch {TORCH} are known to "
                      f"go together. Take another --instance_type, for example p4d.24xlarge")
    if kind.gpus:
        return VOLTA if kind.gpu == "V100" else CURRENT
    arch = {"x86_64": "amd64"}.get(kind.arch, kind.arch)
    return Stack(f"cpu-{arch}", UBUNTU.format(arch=arch), "Ubuntu and CPU wheels of torch", driver=None,
                 index_url=CPU_INDEX)
