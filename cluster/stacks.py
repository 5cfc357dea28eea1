"""Which software goes onto which machine: image, driver and torch, as data. Nothing here was tried on a real machine.

Sources. The public parameters' names: AWS's Deep Learning AMI guide and Canonical's list, as public repositories use
them. Drivers and Python: AWS's release notes of its Base OSS images. R580 is NVIDIA's last driver for Volta, whose GPUs
the open kernel modules of newer ones exclude (NVIDIA on its transition to them, July 2024); torch's default wheels are
built with CUDA 13, which leaves Volta out as well, those of its cu126 index are not. EFA's installer, and the
fingerprint of the key that it is signed by: EC2's user guide, "Get started with EFA"; that its NCCL plugin still knows
p3dn (two copies through the host, no GPUDirect): aws-ofi-nccl, src/platform-aws.cpp.
"""
from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from cluster.ec2 import Type
from cluster.run import Refused

DLAMI = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
UBUNTU = "/aws/service/canonical/ubuntu/server/24.04/stable/current/{arch}/hvm/ebs-gp3/ami-id"
TORCH = "2.13.0"
# Where EFA's installer puts NCCL's plugin and libfabric; unverified. Since plugin 1.7 with libfabric 1.18 nothing need
# be switched on (FI_PROVIDER, FI_EFA_USE_DEVICE_RDMA), but a process that forks may run out of huge pages
# (aws-ofi-nccl, doc/efa-env-var.md). The image has plugin 1.17 or newer.
EFA = {"LD_LIBRARY_PATH": "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu:/opt/amazon/ofi-nccl/lib:/opt/amazon/efa/lib",
       "FI_EFA_USE_HUGE_PAGE": "0"}
EFA_INSTALLER = "https://efa-installer.amazonaws.com/aws-efa-installer-1.49.0.tar.gz"
EFA_SIGNED_BY = "4E9091BCBB97A96B26B15E59A05480B1DD2D3CCC"

# POSIX sh. A kernel's module cannot be copied from machine to machine as an environment can, so each does it all.
INSTALL_DRIVER = """
if ! nvidia-smi -L > /dev/null 2>&1; then
    apt="sudo -n env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300"
    $apt update && $apt install $packages && sudo -n modprobe nvidia || exit
fi
"""
INSTALL_EFA = """
if [ ! -x "${efa:=/opt/amazon/efa/bin/fi_info}" ]; then
    folder=$(mktemp -d) && cd "$folder" || exit
    export GNUPGHOME=$folder
    for url in "$installer" "$installer.sig" "${installer%/*}/aws-efa-installer.key"; do
        curl -sSf --retry 5 --connect-timeout 10 --max-time 600 -O "$url" || exit
    done
    gpg -q --batch --import aws-efa-installer.key || exit
    file=${installer##*/}
    gpg -q --batch --status-fd 1 --verify "$file.sig" "$file" | grep -q "^.GNUPG:. VALIDSIG .*$signed_by$" || {
        echo "$installer is not signed by $signed_by, the key that AWS publishes: not installed" >&2
        exit 1
    }
    tar -xzf "$file" && cd aws-efa-installer && sudo -n ./efa_installer.sh -y || exit
    cd / && rm -rf "$folder"
fi
"""


@dataclass(frozen=True)
class Stack:
    """What a kind of machine runs: what its image has, what is installed beside that, and torch."""
    name: str
    image: str                                    # SSM parameter with the image's id
    about: str
    driver: str | None                            # NVIDIA's, as expected: information, never compared
    index_url: str | None                         # of torch's wheels; None: PyPI
    torch: str = TORCH
    python: str = "python3"                       # of the image: 3.12 on Ubuntu 24.04
    ssh_user: str = "ubuntu"
    packages: tuple[str, ...] = ()                # of apt, that bring the driver where the image has none
    efa_installer: str | None = None              # where the image has no EFA software
    env: dict[str, str] = field(default_factory=dict)             # where EFA is used


CURRENT = Stack(
    "current", DLAMI, "AWS's Base OSS image for G4dn and newer, P4d and newer; CUDA 13 wheels of torch",
    driver="595", index_url=None, env=EFA)
# AWS's images with the proprietary driver that list P3dn are Amazon Linux 2, whose glibc 2.26 is too old for torch's
# manylinux_2_28 wheels; so a plain Ubuntu with Ubuntu's own build of the driver for its AWS kernel.
VOLTA = Stack(
    "volta", UBUNTU.format(arch="amd64"), "Ubuntu with NVIDIA's proprietary R580, the last for V100; CUDA 12.6 wheels "
    "of torch; EFA by AWS's installer",
    driver="580", index_url="https://download.pytorch.org/whl/cu126",
    packages=("linux-modules-nvidia-580-server-aws", "nvidia-headless-no-dkms-580-server", "nvidia-utils-580-server"),
    efa_installer=EFA_INSTALLER, env=EFA)
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


def installation(stack: Stack, efa: bool, signed_by: str = EFA_SIGNED_BY) -> str:
    """What a machine does, as root by sudo, to have what its image lacks; "" where that is nothing. POSIX sh."""
    script = f"packages={shlex.quote(' '.join(stack.packages))}\n{INSTALL_DRIVER}" if stack.packages else ""
    if efa and stack.efa_installer:
        script += f"installer={shlex.quote(stack.efa_installer)} signed_by={shlex.quote(signed_by)}\n{INSTALL_EFA}"
    return script
