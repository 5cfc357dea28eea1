"""What a machine does in S3, against the rehearsal's: two nodes' folders, a bucket, and faults of it."""
from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("moto", reason="S3 is the rehearsal's, which needs moto[server]")

from cluster import bucket
from cluster.bucket import Place
from cluster.ec2 import Cloud
from cluster.host import bucket as host
from cluster.rehearsal.ec2 import StrictEc2
from cluster.run import Refused
from configs import CONFIGS
from engine.values import to_json

RUN = Place("txl-test", "runs/two")
RECIPE = CONFIGS["tiny"].recipe


@pytest.fixture(scope="module")
def aws() -> Iterator[StrictEc2]:
    with StrictEc2() as strict:
        yield strict


@pytest.fixture
def s3(aws, monkeypatch, tmp_path) -> Any:
    """A client as machines have it, and an empty bucket."""
    for name, value in {"AWS_ENDPOINT_URL": aws.url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(host, "TRIES", 1)
    monkeypatch.setattr(host, "time", Clock())
    aws.heal()
    client = host.client()
    if not client.list_buckets()["Buckets"]:
        client.create_bucket(Bucket=RUN.bucket)
    for key in there(client, ""):
        client.delete_object(Bucket=RUN.bucket, Key=key)
    aws.calls.clear()
    return client


@pytest.fixture
def nodes(tmp_path) -> tuple[Node, Node]:
    return Node(tmp_path / "node-0", 0), Node(tmp_path / "node-1", 1)


class Node:
    """A machine's part of a run's folder; it has one rank."""

    def __init__(self, folder: Path, node: int):
        self.folder, self.node = folder, node
        (folder / "nodes").mkdir(parents=True)
        self.write(f"logs/node-{node}.log", "torchrun\n")
        self.write(f"logs/rank-{node}.log", "step 1\n")
        if node == 0:
            self.write("recipe.json", json.dumps(to_json(RECIPE)))
            self.write("metrics.jsonl", '{"step": 1}\n{"step": 2}\n')

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def saves(self, step: int, nonce: str = "n", size: int = 20) -> None:
        """As engine/checkpoint.py leaves it on this machine's disk."""
        folder = f"checkpoints/step-{step:08d}"
        own = {f"rank-{self.node}.pt": f"{self.node} {step} {nonce}"} | (
            {"model.pt": "m" * size} if self.node == 0 else {})
        for name, text in own.items():
            self.write(f"{folder}/{name}", text)
        self.write(f"{folder}/meta.json", json.dumps(
            {"step": step, "ranks": 2, "nonce": nonce, "files": {name: len(text) for name, text in own.items()},
             "valid_loss": None, "vocabulary": "v"}))

    def removes(self, step: int) -> None:
        shutil.rmtree(self.folder / f"checkpoints/step-{step:08d}")

    def mirror(self, s3: Any) -> host.Mirror:
        return host.Mirror(s3, self.folder, RUN, self.node, 1)

    def resumes(self, s3: Any) -> dict[str, str]:
        host.resume(host.Store(s3, RUN), self.folder, self.node, 1)
        return self.files

    @property
    def files(self) -> dict[str, str]:
        return {path.relative_to(self.folder).as_posix(): path.read_text() for path in self.folder.rglob("*")
                if path.is_file() and path.parent.name != "nodes"}


class Clock:
    """In the place of the module time."""
    strftime = staticmethod(time.strftime)

    def __init__(self, sleeps_s: float = 0):
        self.now, self._sleeps_s = 0.0, sleeps_s

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += self._sleeps_s


def there(s3: Any, prefix: str = "runs/two/") -> dict[str, str]:
    found = s3.list_objects_v2(Bucket=RUN.bucket, Prefix=prefix).get("Contents", [])
    return {x["Key"].removeprefix(prefix): s3.get_object(Bucket=RUN.bucket, Key=x["Key"])["Body"].read().decode()
            for x in found}


def steps(s3: Any) -> list[int]:
    """Of the checkpoints of which anything is there."""
    return sorted({int(path.split("/")[0].removeprefix("step-")) for path in there(s3, "runs/two/checkpoints/")})


def sent(aws: StrictEc2) -> list[str]:
    return [call.params["Key"].removeprefix("runs/two/") for call in aws.calls if call.action == "PutObject"]


def once(*answers: bool) -> Callable[[], bool]:
    """Whether the training has ended, asked after each pass."""
    said = iter(answers)
    return lambda: next(said)


def of(key: str) -> Callable[[dict[str, Any]], bool]:
    return lambda params: params["Key"].endswith(key)


def test_what_two_nodes_have_is_there_byte_for_byte_without_what_only_says_how_a_machine_is(s3, nodes):
    for node in nodes:
        node.saves(10)
        node.write(f"nodes/{node.node}.json", "{}")
        node.write(".status.json.partial", "half")
    nodes[0].write("status.json", '{"state": "training"}')
    assert nodes[1].mirror(s3).run(once(True)) == 0
    assert nodes[0].mirror(s3).run(once(True)) == 0
    wanted = nodes[1].files | nodes[0].files
    del wanted[".status.json.partial"]
    assert there(s3) == wanted


def test_only_what_has_changed_is_sent_again(s3, aws, nodes):
    mirror = nodes[1].mirror(s3)
    assert mirror.all_sent()
    nodes[1].write("logs/rank-1.log", "step 1\nstep 2\n")
    aws.calls.clear()
    assert mirror.all_sent()
    assert sent(aws) == ["logs/rank-1.log"]


def test_a_checkpoint_is_whole_only_when_every_nodes_part_is_there_and_then_comes_the_word_that_it_is_finished(
        s3, aws, nodes):
    for node in nodes:
        node.saves(10)
    nodes[0].write("status.json", '{"state": "finished", "step": 10}')
    mirror = nodes[0].mirror(s3)
    assert not mirror.all_sent()
    assert {"status.json", "checkpoints/step-00000010/meta.json"}.isdisjoint(there(s3))
    assert bucket.standing(Cloud(), RUN, RECIPE).step is None
    assert nodes[1].mirror(s3).all_sent()
    assert mirror.all_sent()
    assert sent(aws)[-2:] == ["checkpoints/step-00000010/meta.json", "status.json"]
    assert bucket.standing(Cloud(), RUN, RECIPE).state == "finished"


def test_another_node_that_never_comes_is_not_waited_for_for_ever(s3, nodes, monkeypatch):
    nodes[0].saves(10)
    monkeypatch.setattr(host, "OTHERS_S", 0)
    assert nodes[0].mirror(s3).run(once(True)) == 0
    assert bucket.standing(Cloud(), RUN, RECIPE).step == 10


def test_another_nodes_part_of_another_save_of_the_step_does_not_count_and_is_not_fetched(s3, nodes, monkeypatch,
                                                                                           tmp_path):
    nodes[1].saves(10, "old")
    assert nodes[1].mirror(s3).all_sent()
    nodes[0].saves(10, "new")
    assert not nodes[0].mirror(s3).all_sent()
    monkeypatch.setattr(host, "OTHERS_S", 0)
    assert nodes[0].mirror(s3).all_sent()
    assert "checkpoints/step-00000010/rank-1.pt" not in Node(tmp_path / "fresh", 1).resumes(s3)


def test_a_save_that_takes_anothers_place_is_never_there_by_halves(s3, aws, nodes, monkeypatch):
    monkeypatch.setattr(host, "OTHERS_S", 0)
    nodes[0].saves(10, "old")
    assert nodes[0].mirror(s3).all_sent()
    nodes[0].saves(10, "new")
    aws.fail("PutObject", "InternalError", status=500, when=of("rank-0.pt"))
    with pytest.raises(host.Unreached):
        nodes[0].mirror(s3).all_sent()
    assert "checkpoints/step-00000010/meta.json" not in there(s3)
    assert bucket.standing(Cloud(), RUN, RECIPE).step is None


@pytest.mark.parametrize("lost", ["meta.json", "model.pt"])
def test_a_checkpoint_that_is_cut_off_is_not_gone_on_from(s3, nodes, lost, tmp_path):
    for step in (10, 20):
        for node in reversed(nodes):
            node.saves(step)
            assert node.mirror(s3).all_sent()
    key = RUN.key(f"checkpoints/step-00000020/{lost}")
    if lost == "model.pt":
        s3.put_object(Bucket=RUN.bucket, Key=key, Body=b"m" * 19)
    else:
        s3.delete_object(Bucket=RUN.bucket, Key=key)
    assert bucket.standing(Cloud(), RUN, RECIPE).step == 10
    fetched = Node(tmp_path / "fresh", 0).resumes(s3)
    assert [name for name in fetched if "checkpoints" in name and "step-00000010" not in name] == []
    assert fetched["checkpoints/step-00000010/model.pt"] == "m" * 20


def test_what_training_removed_goes_when_a_newer_one_is_whole_there_and_logs_stay(s3, aws, nodes):
    mirrors = [node.mirror(s3) for node in reversed(nodes)]
    for node in nodes:
        node.saves(10)
    for mirror in mirrors:
        assert mirror.all_sent()
    for node in nodes:
        node.saves(20)
        node.removes(10)
    (nodes[0].folder / "metrics.jsonl").unlink()
    aws.fail("PutObject", "InternalError", status=500, when=of("step-00000020/model.pt"))
    assert mirrors[0].all_sent()
    with pytest.raises(host.Unreached):
        mirrors[1].all_sent()
    assert steps(s3) == [10, 20]
    assert bucket.standing(Cloud(), RUN, RECIPE).step == 10
    assert mirrors[1].all_sent()
    assert steps(s3) == [20]
    assert "metrics.jsonl" in there(s3)


def test_parts_of_a_newer_checkpoint_that_another_node_has_sent_already_stay(s3, nodes):
    for node, steps_ in ((nodes[1], (10, 20)), (nodes[0], (10,))):
        for step in steps_:
            node.saves(step)
        assert node.mirror(s3).all_sent()
    assert steps(s3) == [10, 20]


def test_a_mirror_that_starts_anew_sends_no_checkpoint_twice(s3, aws, nodes):
    for node in reversed(nodes):
        node.saves(10)
        assert node.mirror(s3).all_sent()
    aws.calls.clear()
    for node in reversed(nodes):
        assert node.mirror(s3).all_sent()
    assert [path for path in sent(aws) if "checkpoints" in path] == []


def test_new_machines_have_each_its_own_and_what_they_have_already_stays(s3, nodes, tmp_path):
    for node in reversed(nodes):
        node.saves(10)
        assert node.mirror(s3).all_sent()
    fresh = [Node(tmp_path / f"fresh-{i}", i) for i in range(2)]
    fresh[1].write("logs/rank-1.log", "mine\n")
    shutil.rmtree(fresh[0].folder / "logs")
    before = fresh[1].files
    assert fresh[0].resumes(s3) == nodes[0].files
    own = {f"checkpoints/step-00000010/{name}" for name in ("rank-1.pt",)}
    assert fresh[1].resumes(s3) == before | {name: nodes[1].files[name] for name in own} | {
        "checkpoints/step-00000010/meta.json": nodes[0].files["checkpoints/step-00000010/meta.json"]}


def test_a_checkpoint_that_was_cut_off_on_the_way_to_the_machine_is_fetched_again(s3, nodes, tmp_path):
    for node in reversed(nodes):
        node.saves(10)
        assert node.mirror(s3).all_sent()
    fresh = Node(tmp_path / "fresh", 0)
    fresh.saves(10, size=10)
    fresh.write("checkpoints/step-00000010/model.pt", "cut")
    assert fresh.resumes(s3)["checkpoints/step-00000010/model.pt"] == "m" * 20


@pytest.mark.parametrize(("fault", "said"), [
    ({"code": "AccessDenied", "status": 403}, "PutObject: 403 AccessDenied: of the rehearsal"),
    ({"code": "InternalError", "status": 500}, "PutObject: 500 InternalError: of the rehearsal"),
    ({"code": "SlowDown", "hang_s": 5}, "ReadTimeoutError: Read timeout"),
    ({"after": True}, "ConnectionClosedError: Connection was closed")])
def test_a_failing_s3_is_told_once_until_it_is_well_and_then_that_it_is(
        s3, aws, nodes, monkeypatch, capsys, fault, said):
    if "hang_s" in fault:
        monkeypatch.setattr(host, "READ_S", fault["hang_s"] - 2)
        s3 = host.client()
    aws.fail("PutObject", times=2, **fault)
    assert nodes[1].mirror(s3).run(once(False, False, True)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("bucket: ")
    assert said in first
    assert "The training goes on" in first
    assert second.endswith(" s3://txl-test/runs/two: up to date again")
    assert there(s3) == nodes[1].files


def test_what_is_forbidden_at_the_end_is_given_up_at_once_and_said(s3, aws, nodes, capsys):
    aws.fail("PutObject", "AccessDenied", status=403, times=inf)
    assert nodes[1].mirror(s3).run(once(True)) == host.GAVE_UP
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        "given up. What is not there is on this machine alone")


def test_what_may_mend_is_tried_to_the_end_for_as_long_as_something_moves_and_ten_minutes_more(s3, aws, nodes,
                                                                                             monkeypatch):
    aws.fail("PutObject", "InternalError", status=500, times=inf)
    clock = Clock(sleeps_s=60)
    monkeypatch.setattr(host, "time", clock)
    assert nodes[1].mirror(s3).run(once(True)) == host.GAVE_UP
    assert clock.now == host.GIVE_UP_S + 60


# --- data ---

def test_data_is_fetched_as_it_is_and_only_what_is_missing_or_of_another_size(s3, aws, tmp_path):
    data = {"train.txt": "a" * 50, "tokens/x/manifest.json": "{}", "valid.txt": ""}
    for name, text in data.items():
        s3.put_object(Bucket=RUN.bucket, Key=f"wikitext-103/{name}", Body=text.encode())
    s3.put_object(Bucket=RUN.bucket, Key="wikitext-103/", Body=b"")           # the console's folder
    s3.put_object(Bucket=RUN.bucket, Key="wikitext-103-raw/other", Body=b"x")
    place = Place(RUN.bucket, "wikitext-103")
    host.fetch(host.Store(s3, place), tmp_path / "data")
    assert {path.relative_to(tmp_path / "data").as_posix(): path.read_text()
            for path in (tmp_path / "data").rglob("*") if path.is_file()} == data
    (tmp_path / "data/train.txt").write_text("cut off")
    (tmp_path / "data/.train.txt.partial.0F").write_text("what a killed fetch leaves")
    aws.calls.clear()
    host.fetch(host.Store(s3, place), tmp_path / "data")
    assert {call.params["Key"] for call in aws.calls if call.action == "GetObject"} == {"wikitext-103/train.txt"}
    assert not list((tmp_path / "data").glob(".*"))


def test_what_would_lead_out_of_the_folder_is_not_fetched(s3, tmp_path):
    s3.put_object(Bucket=RUN.bucket, Key="data/../../x", Body=b"evil")
    with pytest.raises(host.Unreached, match="would lead out of the folder"):
        host.fetch(host.Store(s3, Place(RUN.bucket, "data")), tmp_path / "a/b")
    assert list(tmp_path.rglob("x")) == []


@pytest.mark.parametrize(("place", "said"), [
    ("s3://txl-test/nothing", "s3://txl-test/nothing: nothing is there\n"),
    ("s3://txl-nobodys/x",
     "s3://txl-nobodys/x: ListObjectsV2: 404 NoSuchBucket: The specified bucket does not exist\n")])
def test_data_that_is_not_there_is_one_line(s3, place, said, tmp_path):
    with pytest.raises(SystemExit) as ended:
        host.main(["fetch", place, str(tmp_path / "data")])
    assert f"{ended.value}\n" == said


def test_a_run_of_another_recipe_in_the_bucket_is_refused_by_name(s3, nodes):
    assert nodes[0].mirror(s3).all_sent()
    other = CONFIGS["demo"].recipe
    with pytest.raises(Refused, match=r"(?s)s3://txl-test/runs/two is another run, with another recipe.*--name"):
        bucket.standing(Cloud(), RUN, other)


def test_without_boto3_it_is_said_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "boto3", None)
    with pytest.raises(SystemExit, match=r"S3 needs boto3, which .*python"):
        host.client()
