"""Which machine gets which software, for types as EC2 describes them."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.ec2 import Type
from cluster.run import Refused
from cluster.stacks import CURRENT, VOLTA, installation, stack_for

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
    assert stack.env == CURRENT.env               # its image has no EFA software, so it is installed
    assert "efa_installer.sh" in installation(stack, efa=True)
    assert "efa" not in installation(stack, efa=False)


@pytest.mark.parametrize("gpu", ["A100", "H100", "A10G", "T4", "L4"])
def test_newer_gpus_get_todays_software(gpu):
    assert stack_for(replace(P4D, gpu=gpu)) is CURRENT
    assert CURRENT.index_url is None
    assert installation(CURRENT, efa=True) == ""


@pytest.mark.parametrize(("kind", "arch"), [(C5, "amd64"), (C7G, "arm64")])
def test_a_processor_gets_ubuntu_of_its_architecture_and_small_wheels(kind, arch):
    stack = stack_for(kind)
    assert stack.image == f"/aws/service/canonical/ubuntu/server/24.04/stable/current/{arch}/hvm/ebs-gp3/ami-id"
    assert stack.index_url == "https://download.pytorch.org/whl/cpu"
    assert (stack.driver, stack.env, installation(stack, efa=True)) == (None, {}, "")


@pytest.mark.parametrize("kind", [replace(P4D, name="g5g.xlarge", gpu="T4g", arch="arm64"), replace(P4D, gpu="K80")])
def test_gpus_without_software_are_refused_before_they_cost(kind):
    with pytest.raises(Refused, match=rf"{kind.name} has {kind.gpu} on {kind.arch}.*--instance_type"):
        stack_for(kind)


@pytest.mark.parametrize("stack", [CURRENT, VOLTA, stack_for(C5)], ids=lambda stack: stack.name)
def test_every_stack_trains_with_the_torch_that_is_tested_here(stack):
    requirements = (Path(__file__).resolve().parents[2] / "requirements.txt").read_text()
    assert re.search(rf"^torch=={re.escape(stack.torch)}\b", requirements, re.MULTILINE)


@pytest.fixture
def machine(tmp_path):
    """Programs that a bare image has, and a published installer signed by a key of its own: runs what it is given."""
    programs, published = tmp_path / "bin", tmp_path / "published"
    for folder in (programs, published):
        folder.mkdir()
    short = Path(tempfile.mkdtemp(prefix="txl-"))             # sockets of gpg's agent have 108 bytes for their name
    log = tmp_path / "log"

    def has(name: str, script: str) -> None:
        (programs / name).write_text(f"#!/bin/sh\n{script}\n")
        (programs / name).chmod(0o755)

    has("nvidia-smi", f"test -e {tmp_path}/driver")
    has("sudo", 'shift; exec "$@"')
    has("apt-get", f'echo apt-get "$@" >> {log}')
    has("modprobe", f"echo modprobe $1 >> {log}; touch {tmp_path}/driver")
    installer = tmp_path / "aws-efa-installer/efa_installer.sh"
    installer.parent.mkdir()
    installer.write_text(f"#!/bin/sh\necho installer $1 >> {log}\n")
    installer.chmod(0o755)
    with tarfile.open(published / "efa-1.tar.gz", "w:gz") as tar:
        tar.add(installer.parent, "aws-efa-installer")

    def gpg(*words: str) -> str:
        return subprocess.run(["gpg", "--batch", "--homedir", str(short), *words], check=True, text=True,
                              capture_output=True).stdout

    gpg("--passphrase", "", "--quick-gen-key", "tests", "ed25519")
    gpg("--detach-sign", str(published / "efa-1.tar.gz"))
    gpg("--export", "--output", str(published / "aws-efa-installer.key"))
    key = re.search(r"^fpr:+(\w+):", gpg("--with-colons", "--fingerprint"), re.MULTILINE)[1]

    def run(signed_by: str = key) -> tuple[int, str, list[str]]:
        stack = replace(VOLTA, efa_installer=(published / "efa-1.tar.gz").as_uri())
        log.write_text("")
        done = subprocess.run(["sh", "-c", f"efa={tmp_path}/fi_info\n{installation(stack, True, signed_by)}"],
                              capture_output=True, text=True, env=os.environ | {
                                  "PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(short)})
        return done.returncode, done.stderr, log.read_text().splitlines()

    yield run
    subprocess.run(["gpgconf", "--homedir", short, "--kill", "all"], check=False)
    shutil.rmtree(short)


@pytest.mark.skipif(not shutil.which("gpg") or not shutil.which("curl"), reason="needs gpg and curl")
def test_what_the_image_lacks_is_installed_once_and_efas_installer_only_as_signed(machine, tmp_path):
    apt = "apt-get -q -y -o DPkg::Lock::Timeout=300"
    driver = [f"{apt} update", f"{apt} install {' '.join(VOLTA.packages)}", "modprobe nvidia"]
    status, _, log = machine()
    assert (status, log) == (0, [*driver, "installer -y"])
    (tmp_path / "fi_info").touch(mode=0o755)
    assert machine() == (0, "", [])
    (tmp_path / "fi_info").unlink()
    status, said, log = machine(signed_by="0" * 40)
    assert (status, log) == (1, [])
    assert "is not signed by 0000" in said
    with open(tmp_path / "published/efa-1.tar.gz", "ab") as tar:
        tar.write(b"tampered")
    status, said, log = machine()
    assert (status, log) == (1, [])
    assert "not installed" in said
