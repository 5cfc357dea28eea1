"""A run in S3: what machines may do there, what they keep there and go on from, and what a launch says of it.

S3 is the rehearsal's; a machine's keys are those of its role, checked against its policy.
"""
from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import boto3
import pytest

pytest.importorskip("moto", reason="S3 is the rehearsal's, which needs moto[server]")

import launch
from cluster import aws, bucket, verbs
from cluster.backends import Job
from cluster.bucket import Place
from cluster.ec2 import Cloud
from cluster.journal import owner_name
from cluster.rehearsal.bench import Bench
from cluster.run import Refused, read_status
from engine.cli import parse
from engine.values import BadValue
from tests.cluster.launching import Person, launched, plan_of, requests, until
from tests.cluster.sshd import needs_sshd
from tests.cluster.test_contract import make_text

CHECKOUT = Path(__file__).parents[2]
BUCKET = "txl-test"


# --- names and policies ---

@pytest.mark.parametrize(("text", "place"), [
    ("my-bucket", Place("my-bucket")), ("s3://my-bucket", Place("my-bucket")), ("s3://my-bucket/", Place("my-bucket")),
    ("s3://my-bucket/some/prefix", Place("my-bucket", "some/prefix")),
    ("s3://my.bucket/wikitext-103/", Place("my.bucket", "wikitext-103"))])
def test_a_place_in_s3_is_a_bucket_and_a_prefix(text, place):
    assert bucket.parse(text) == place
    assert bucket.parse(str(place)) == place


@pytest.mark.parametrize("text", ["", "My_Bucket", "ab", "my-bucket/prefix", "s3:/my-bucket", "s3://my-bucket//x",
                                  "s3://my-bucket/a/../b", "s3://my-bucket/a*", "s3://my-bucket/a?", "s3://b-b-b/${x}",
                                  "https://my-bucket.s3.amazonaws.com/x", "s3://my-bucket/a b", "s3://my-bucket/a\n"])
def test_what_is_no_place_in_s3_is_refused_before_anything_else(text):
    with pytest.raises(ValueError, match="is no place in S3"):
        bucket.parse(text)
    with pytest.raises(ValueError, match="is no place in S3"):
        aws.Terms(bucket=text)


def test_the_policy_of_a_run_is_its_folder_to_keep_and_the_data_to_read_and_nothing_else():
    assert bucket.policy(Place("mine", "some/prefix/run"), Place("data-of-all", "wikitext-103")) == {
        "Version": "2012-10-17", "Statement": [
            {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "arn:aws:s3:::mine",
             "Condition": {"StringLike": {"s3:prefix": "some/prefix/run/*"}}},
            {"Effect": "Allow", "Resource": "arn:aws:s3:::mine/some/prefix/run/*",
             "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]},
            {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "arn:aws:s3:::data-of-all",
             "Condition": {"StringLike": {"s3:prefix": "wikitext-103/*"}}},
            {"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": "arn:aws:s3:::data-of-all/wikitext-103/*"}]}


def test_data_alone_may_only_be_read_also_where_it_is_a_whole_bucket_of_another_partition():
    assert bucket.policy(None, Place("data"), "aws-us-gov") == {"Version": "2012-10-17", "Statement": [
        {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "arn:aws-us-gov:s3:::data",
         "Condition": {"StringLike": {"s3:prefix": "*"}}},
        {"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": "arn:aws-us-gov:s3:::data/*"}]}


def test_only_ec2_may_take_on_the_role():
    assert bucket.trust() == {"Version": "2012-10-17", "Statement": [
        {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}, "Action": "sts:AssumeRole"}]}


def test_a_role_is_named_within_iams_limit_by_owner_run_and_region_and_found_by_its_path():
    names = {bucket.role_name(*x) for x in (("ann", "x" * 63, "us-east-1"), ("ann", "x" * 63, "eu-west-1"),
                                           ("bob", "x" * 63, "us-east-1"), ("ann", "x" * 62, "us-east-1"))}
    assert len(names) == 4
    assert all(name.startswith("txl-") and len(name) == 20 for name in names)
    assert bucket.role_path("ann", "two") == "/txl/ann/two/"
    assert bucket.role_path("ann") == "/txl/ann/"
    assert bucket.role_path() == bucket.role_path(None, "two") == "/txl/"


# --- launches ---

TEXT = ("--set=recipe.data.dataset=text", "--set=recipe.data.dir=data/little", "--set=recipe.data.vocab=word",
        "--set=recipe.data.n_token=none")
STORY = (*TEXT, "--set=recipe.clock.log_interval=1", "--set=recipe.stop.max_steps=100000",
         "--set=recipe.clock.checkpoint_interval=1000000", "--set=recipe.clock.eval_interval=1000000")


@pytest.fixture
def s3(bench) -> Any:
    """The user's client, and a bucket that is as new."""
    client = boto3.client("s3")
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=BUCKET)
    for key in objects(client):
        client.delete_object(Bucket=BUCKET, Key=key)
    return client


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder of a data set, with tokens."""
    folder = tmp_path_factory.mktemp("data") / "little"
    make_text(folder)
    subprocess.run([sys.executable, "-m", "txl.data", "--dataset=text", "--vocab=byte", f"--dir={folder}"],
                   cwd=CHECKOUT, check=True, timeout=300)
    return folder


def objects(client: Any, prefix: str = "") -> dict[str, bytes]:
    found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {x["Key"].removeprefix(prefix): client.get_object(Bucket=BUCKET, Key=x["Key"])["Body"].read() for x in found}


def files(folder: Path, *without: str) -> dict[str, bytes]:
    return {name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
            and (name := path.relative_to(folder).as_posix()) not in without and not name.startswith("nodes/")}


def followed(job: Job, seconds: float = 300) -> tuple[int, ...]:
    assert until(lambda: job.poll() is not None, seconds)
    statuses = job.poll()
    job.close()
    return statuses


def trained_until(job: Job, run_dir: Path, words: str) -> None:
    def logged() -> bool:
        assert job.poll() is None
        log = run_dir / "logs/rank-0.log"
        return log.exists() and words in log.read_text()
    assert until(logged, 300)


def stopped(job: Job, run_dir: Path, words: str) -> dict[str, Any]:
    """Once it has logged `words`. Its last word."""
    trained_until(job, run_dir, words)
    job.stop()
    assert followed(job) == (0,) * len(job.shells)
    return read_status(run_dir)


def as_machine(bench: Bench, script: str) -> str:
    """What Python says on the first machine, with the keys of its role."""
    host = bench.hosts[bench.alive()[0].id]
    done = subprocess.run([sys.executable, "-c", f"import boto3\ns3 = boto3.client('s3')\n{script}"], text=True,
                          env=host.environment | {"AWS_DEFAULT_REGION": "us-east-1"}, capture_output=True, timeout=300)
    return done.stdout + done.stderr


@needs_sshd
@pytest.mark.slow
def test_a_run_goes_on_from_its_bucket_when_laptop_and_machines_are_gone(bench, s3):
    make_text(Path("data/little"))
    flags, run_dir = (f"--bucket=s3://{BUCKET}/runs", *STORY), Path("runs/two")
    first = stopped(aws.apply(plan_of(bench, *flags), Person()), run_dir, "step 2/")
    assert first["state"] == "stopped"
    kept = objects(s3, "runs/two/")
    other = f"checkpoints/step-{first['step']:08d}/rank-1.pt"      # which only the other machine has
    others = bench.hosts[bench.alive()[1].id].home / "txl/runs/two" / other
    assert kept == files(run_dir) | {other: others.read_bytes()}
    assert {f"checkpoints/step-{first['step']:08d}/{name}" for name in ("model.pt", "rank-0.pt", "meta.json")} <= (
        kept.keys())

    for key in ("runs/other/x", "runs/two", "x"):
        assert "AccessDenied" in as_machine(bench, f"s3.put_object(Bucket='{BUCKET}', Key='{key}', Body=b'')")
    assert "AccessDenied" in as_machine(bench, f"s3.list_objects_v2(Bucket='{BUCKET}', Prefix='runs/')")
    assert as_machine(bench, f"s3.put_object(Bucket='{BUCKET}', Key='runs/two/x', Body=b'')") == ""
    s3.delete_object(Bucket=BUCKET, Key="runs/two/x")

    for machine in bench.alive():
        with bench.ec2.lock:
            bench.world.end(machine)
    assert until(lambda: not bench.alive())
    shutil.rmtree(run_dir)
    plan, person = plan_of(bench, *flags), Person()
    assert f"goes on from step {first['step']}, as s3://{BUCKET}/runs/two has it" in str(plan)
    second = stopped(aws.apply(plan, person), run_dir, "resuming from")
    assert (f"The run is further in s3://{BUCKET}/runs/two than here: the machines fetch step {first['step']}."
            in person.lines)
    log = (run_dir / "logs/rank-0.log").read_text()
    assert f"step-{first['step']:08d}, step {first['step']}" in log
    assert log.startswith(kept["logs/rank-0.log"].decode())
    assert "memories start empty" not in log
    assert second["step"] >= first["step"]
    assert f"checkpoints/step-{second['step']:08d}/meta.json" in objects(s3, "runs/two/")

    assert [x for x in bench.leftovers() if x.startswith("role")] == ["role " + bucket.role_name(
        owner_name(), "two", "us-east-1")]
    assert verbs.kill(["two"], verbs.Ending(yes=True)) == 0
    assert bench.leftovers() == []


@needs_sshd
@pytest.mark.slow
def test_data_comes_to_every_machine_from_s3_alone_and_a_forbidden_bucket_ends_no_training(bench, s3, data):
    for path in (path for path in data.rglob("*") if path.is_file()):
        s3.upload_file(str(path), BUCKET, f"texts/{path.relative_to(data).as_posix()}")
    bench.ec2.calls.clear()
    person = Person()
    plan = plan_of(bench, f"--data=s3://{BUCKET}/texts", f"--bucket={BUCKET}", *TEXT, "--set=recipe.stop.max_steps=2")
    bench.ec2.fail("PutObject", "AccessDenied", status=403, times=math.inf)
    assert followed(aws.apply(plan, person)) == (0, 0)
    assert read_status(Path("runs/two"))["state"] == "finished"
    for node in (0, 1):
        said = [line for line in person.lines if line.startswith(f"node-{node}: bucket: ")]
        assert "PutObject: 403 AccessDenied" in said[0]
        assert said[-1].endswith("given up. What is not there is on this machine alone")
    assert objects(s3, "two/") == {}

    alive = [machine.id for machine in bench.alive()]
    for id in alive:
        assert files(bench.hosts[id].home / "txl/data/little").items() >= files(data).items()
    got = {(call.machine, call.params["Key"]) for call in bench.ec2.calls if call.action == "GetObject"
           and call.params["Key"].startswith("texts/")}
    assert got == {(id, f"texts/{name}") for id in alive for name in files(data)}
    assert not Path("data").exists()              # so nothing of it was here to be sent

    with bench.ec2.lock:
        for machine in bench.alive():
            bench.world.end(machine)
    assert until(lambda: not bench.billable())
    assert verbs.gc([], verbs.Sweeping(yes=True)) == 0
    assert bench.leftovers() == []


@needs_sshd
def test_without_the_flags_no_machine_has_a_role_and_s3_is_not_asked(bench):
    launched(bench)
    assert not [name for params in requests(bench) for name in params if name.startswith("IamInstanceProfile")]
    assert {call.action for call in bench.ec2.calls if call.service in ("iam", "s3")} <= {"ListRoles"}


@needs_sshd
def test_a_launch_with_a_bucket_asks_for_nothing_that_the_published_policy_does_not_grant(bench, s3):
    bench.ec2.calls.clear()
    bench.world.profile_misses = 2                # EC2 does not know a new instance profile at once
    launched(bench, f"--bucket={BUCKET}")
    granted = {action for statement in json.loads((CHECKOUT / "docs/iam_policy.json").read_text())["Statement"]
               for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])}
    assert {f"{call.service}:{call.action}" for call in bench.ec2.calls if call.machine is None} <= granted
    first, *again = requests(bench)
    assert len(again) == 2
    assert {params["ClientToken"] for params in again} == {first["ClientToken"]}
    assert first["IamInstanceProfile.Name"] == bucket.role_name(owner_name(), "two", "us-east-1")
    assert bench.leftovers() == []                # the role goes with the launch that is given up


@needs_sshd
def test_who_may_make_no_role_is_told_what_is_needed_and_of_role(bench, s3):
    bench.ec2.fail("CreateRole", "AccessDenied", status=403)
    with pytest.raises(Refused, match=r"(?s)CreateRole: AccessDenied.*docs/iam_policy\.json.*--role=NAME"):
        aws.apply(plan_of(bench, f"--bucket={BUCKET}"), Person())
    assert requests(bench) == []
    assert bench.leftovers() == []


@needs_sshd
@pytest.mark.parametrize(("flag", "fault", "said"), [
    ("--bucket=txl-nobodys", None, r"--bucket: There is no bucket txl-nobodys\. Make it:  aws s3 mb"),
    (f"--bucket={BUCKET}", "403", rf"--bucket: The bucket {BUCKET} is not open to arn:aws:"),
    (f"--data=s3://{BUCKET}/nothing", None, rf"--data: s3://{BUCKET}/nothing is empty"),
    ("--data=s3://txl-nobodys/x", None, r"--data: There is no bucket txl-nobodys"),
    ("--role=nobodys", None, "--role: there is no instance profile nobodys in the account")])
def test_what_is_wrong_with_a_bucket_data_or_role_is_said_before_anything_is_made(bench, s3, flag, fault, said):
    if fault:
        bench.ec2.fail("ListBucket", fault, status=403)
    with pytest.raises(Refused, match=said):
        plan_of(bench, flag)
    assert requests(bench) == []
    assert bench.leftovers() == []


def test_a_bucket_in_another_region_is_told_in_the_plan(bench, s3):
    if "txl-far" not in {x["Name"] for x in s3.list_buckets()["Buckets"]}:
        boto3.client("s3", region_name="eu-west-1").create_bucket(
            Bucket="txl-far", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    assert "s3://txl-far is in eu-west-1, the machines are in us-east-1" in " ".join(
        str(plan_of(bench, "--bucket=txl-far")).split())


def test_a_bucket_is_for_machines_on_aws():
    flags = parse(launch.Flags, ["--config=tiny", "--bucket=txl-test"], prog="launch.py", about="")
    with pytest.raises(BadValue, match="for machines on AWS"):
        launch.make_plan(flags, launch.find_config(flags))


def test_a_gc_of_one_region_leaves_the_roles_of_another_alone(bench, s3):
    tags = {"txl:cluster": "two", "txl:owner": owner_name(), "txl:expires": "2020-01-01T00:00:00Z"}
    there, path = Cloud("eu-west-1"), bucket.role_path(owner_name(), "two")
    name = there.role("txl-there", path, bucket.trust(), bucket.policy(Place("far"), None), tags)
    assert verbs.gc([], verbs.Sweeping(yes=True)) == 0
    assert [x.id for x in there.leftovers()] == [name]
    assert verbs.gc([], verbs.Sweeping(region="eu-west-1", yes=True)) == 0
    assert bench.leftovers() == []
