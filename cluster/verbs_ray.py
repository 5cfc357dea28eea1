"""`ray_yaml`: a file for Ray's own cluster launcher, for those who want its autoscaler. It is printed; that is all.

Ray's launcher starts machines one after the other and keeps what it gets: it has no gang, no placement group of its own
making and no end at a deadline. What a file can say against that it says.
"""
from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.follow import FINISHED
from cluster.local import CHECKOUT
from cluster.plan import Plan
from cluster.run import Refused
from engine.cli import flag

TESTED = "2.60.0"                                 # Ray, where there is none here
TOKEN = "~/.ray/auth_token"
VENV = "$HOME/txl-venv"
# A job is started as `python`, which is then the one that Ray runs with.
ENV = f"PATH={VENV}/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0"


@dataclass(frozen=True)
class Yaml:
    config: str = flag("whose machines")
    name: str | None = flag("of the cluster; else the config's", None)
    machines: int | None = flag("how many, instead of the config's", None)
    instance_type: str | None = flag("which kind, instead of the config's", None)
    nospot: bool = flag("on-demand machines rather than spot", False)
    region: str | None = flag("of AWS; else as its environment says", None)
    image: str | None = flag("ami-..., or an SSM parameter; else what the kind of machine needs", None)
    ssh_user: str | None = flag("on the machines; else the image's", None)
    ssh_cidr: str | None = flag("who may reach their port 22; else this machine's address", None)
    disk_gib: int = flag("of each machine's disk", 200)


def ray_yaml(words: Sequence[str], flags: Yaml) -> int:
    import launch  # the front door's own plan, of the same flags
    given = {name: value for name, value in vars(flags).items() if value is not None}
    asked = launch.Flags(**given, backend="aws")
    plan = launch.make_plan(asked, launch.find_config(asked))
    print("\n".join(yaml_lines(plan)))
    return FINISHED


def yaml_lines(plan: Plan) -> Iterator[str]:
    """The file, with how to use it. Raises Refused where the plan was made without an account."""
    about = ray_up(plan)
    yield f"# {plan.config_name} for Ray's cluster launcher. The machines come one by one, and what comes costs."
    yield "#   ray get-auth-token --generate             once: only who has it may use the cluster"
    yield "#   ray up THIS_FILE"
    yield "#   ray dashboard THIS_FILE                   in a terminal of its own: a tunnel, http://localhost:8265"
    yield (f"#   python launch.py --config={plan.config_name} --backend=ray --ray_address=http://localhost:8265 "
           f"--storage_path=s3://BUCKET/PREFIX")
    yield "#   ray down THIS_FILE                        the machines do not go by themselves; the head never does"
    yield "# Machines without iam_instance_profile get a role by Ray, with full access to EC2 and S3."
    yield from _yaml(about)


def ray_up(plan: Plan) -> dict[str, Any]:
    """What `ray up` reads. Pure. Raises Refused."""
    facts, machines, terms = plan.layout.facts, plan.config.machines, plan.terms
    if facts.account is None:
        raise Refused("A file for `ray up` names an image and zones: it needs an AWS account and its credentials.")
    account, stack = facts.account, facts.stack
    node = {
        "ImageId": account.image.id, "InstanceType": facts.type.name,
        "BlockDeviceMappings": [{"DeviceName": account.image.root_device, "Ebs": {
            "VolumeSize": max(terms.disk_gib, account.image.size_gib), "VolumeType": "gp3", "Encrypted": True,
            "DeleteOnTermination": True}}],
        "MetadataOptions": {"HttpEndpoint": "enabled", "HttpTokens": "required"},
        "InstanceInitiatedShutdownBehavior": "terminate"}
    if machines.spot:
        node["InstanceMarketOptions"] = {"MarketType": "spot", "SpotOptions": {
            "SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"}}
    resources = {"CPU": facts.type.cores, "GPU": facts.type.gpus}
    others, ray = machines.count - 1, f"{VENV}/bin/ray"
    index = f" --index-url {stack.index_url}" if stack.index_url else ""
    return {
        "cluster_name": plan.name, "max_workers": others, "idle_timeout_minutes": 10,
        "provider": {"type": "aws", "region": account.cloud.region, "availability_zone": ",".join(facts.zones),
                     "cache_stopped_nodes": False,
                     "security_group": {"GroupName": f"txl-ray-{plan.name}", "IpPermissions": [
                         {"FromPort": 22, "ToPort": 22, "IpProtocol": "tcp",
                          "IpRanges": [{"CidrIp": account.cidr}]}]}},
        "auth": {"ssh_user": terms.ssh_user or stack.ssh_user},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"node_config": node, "resources": resources, "min_workers": 0, "max_workers": 0},
            **({"worker": {"node_config": node, "resources": resources, "min_workers": others, "max_workers": others}}
               if others else {})},
        "file_mounts": {TOKEN: TOKEN},
        "cluster_synced_files": [],
        "setup_commands": [
            f"{stack.python} -m venv {VENV}",
            f"{VENV}/bin/pip install -q torch=={stack.torch}{index}",
            f"{VENV}/bin/pip install -q {' '.join(_needs())} 'ray[default,train]=={_ray_version()}'"],
        "head_start_ray_commands": [
            f"{ray} stop",
            f"{ENV} {ray} start --head --port=6379 --dashboard-host=127.0.0.1 --disable-usage-stats "
            f"--autoscaling-config=~/ray_bootstrap_config.yaml"],
        "worker_start_ray_commands": [
            f"{ray} stop", f"{ENV} {ray} start --address=$RAY_HEAD_IP:6379 --disable-usage-stats"]}


def _needs() -> list[str]:
    """The training's packages, as requirements.txt has them."""
    lines = [line.partition("#")[0].strip() for line in (Path(CHECKOUT) / "requirements.txt").read_text().splitlines()]
    return [f"'{line}'" for line in lines if line.startswith(("numpy", "tensorboard", "tokenizers"))]


def _ray_version() -> str:
    try:
        return importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return TESTED


def _yaml(value: Any, indent: str = "") -> Iterator[str]:
    """Maps and lists in YAML's own form, all else as JSON, which is YAML too."""
    for key, x in value.items() if isinstance(value, dict) else ((None, x) for x in value):
        head = f"{indent}-" if key is None else f"{indent}{key if key.isidentifier() else json.dumps(key)}:"
        if isinstance(x, (dict, list)) and x:
            yield head
            yield from _yaml(x, indent + "    ")
        else:
            yield f"{head} {json.dumps(x)}"
