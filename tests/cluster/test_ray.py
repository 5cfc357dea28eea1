"""The backend `ray` on a real Ray of two nodes, both on loopback, and on the one it starts itself."""
from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import local, ray, ray_keeper, verbs_ray
from cluster.backends import Wish
from cluster.driven import Launcher
from cluster.host.ray_driver import FRAME
from cluster.local import Here
from cluster.ray import Facts
from cluster.ray_api import RayNode
from cluster.ray_job import Feed
from cluster.rehearsal import keeper
from cluster.run import NEW, Refused, read_status
from cluster.spec import Terms
from configs import test_2 as two_p3dn
from configs import tiny
from engine.complete import intact
from engine.config import Batch
from tests.cluster import ray_bench
from tests.cluster.test_contract import CHECKOUT, LAUNCH_S, OVERRIDES, STEPS, curve, make_text
from tests.waiting import until

NODES = 2                                         # of the cluster, with a CPU each
HERE = Here("/usr/bin/python", (), 2, 29500)
needs_ray = pytest.mark.skipif(ray_bench.LACKS is not None, reason=str(ray_bench.LACKS))


class Laptop:
    """A folder in which launches are typed; what they print is in `screen`."""

    def __init__(self, folder: Path, env: dict[str, str]):
        self.folder, self.env, self.launchers = folder, env, list[Launcher]()
        folder.mkdir()

    def launch(self, *flags: str, name: str = "x", steps: int = STEPS) -> Launcher:
        overrides = [override.replace(f"max_steps={STEPS}", f"max_steps={steps}") for override in OVERRIDES]
        self.launchers.append(Launcher(
            [sys.executable, str(CHECKOUT / "launch.py"), "--config=tiny", "--backend=ray", f"--name={name}",
             *(f"--set={override}" for override in overrides), *flags],
            self.folder / f"{name}.screen", cwd=self.folder, env=self.env))
        return self.launchers[-1]

    def screen(self, name: str = "x") -> str:
        return (self.folder / f"{name}.screen").read_text()

    def refused(self, *flags: str) -> str:
        """What a launch says that ends with status 2 and leaves nothing."""
        before = sorted(self.folder.rglob("*"))
        done = subprocess.run([sys.executable, str(CHECKOUT / "launch.py"), "--config=tiny", "--backend=ray", *flags],
                              cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=LAUNCH_S)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert sorted(self.folder.rglob("*")) == before
        return done.stderr


@pytest.fixture(scope="module")
def cluster() -> Iterator[ray_bench.Bench]:
    with ray_bench.ray(*[1] * NODES) as bench:
        yield bench


@pytest.fixture
def laptop(cluster, tmp_path) -> Iterator[Laptop]:
    laptop = Laptop(tmp_path / "laptop", cluster.env)
    yield laptop
    for launcher in laptop.launchers:
        launcher.kill()
    while len(cluster.nodes) < NODES:
        cluster.add(1)
    for job in cluster.dashboard.jobs():          # of a test that failed
        if not job.ended:
            cluster.dashboard.stop(job.id)
    until(lambda: all(job.ended for job in cluster.dashboard.jobs()), LAUNCH_S)


@needs_ray
@pytest.mark.slow
def test_a_run_whose_disks_are_gone_goes_on_from_the_checkpoints_in_its_storage(laptop, cluster, tmp_path, by_hand):
    make_text(cluster.home / "txl/data/little")
    flags = ("--machines=2", f"--storage_path=file://{tmp_path}/bucket")
    first = laptop.launch(*flags, name="far")
    first.until("^step 1[0-9]0/", LAUNCH_S)
    first.ctrl_c()
    assert first.wait(LAUNCH_S) == 130
    shutil.rmtree(cluster.home / "txl/runs")
    step = read_status(laptop.folder / "runs/far")["step"]
    second = laptop.launch(*flags, name="far")
    second.until(f"resuming from .*step {step}$", LAUNCH_S)
    assert second.wait(LAUNCH_S) == 0
    assert curve(laptop.folder / "runs/far") == by_hand
    kept = sorted(path.name for path in (tmp_path / "bucket/far").glob("step-*"))
    assert kept == sorted(path.name for path in (cluster.home / "txl/runs/far/checkpoints").glob("step-*"))


@needs_ray
@pytest.mark.slow
def test_the_loss_of_a_node_changes_nothing_of_the_curve_and_what_is_small_comes_here(
        laptop, cluster, tmp_path, by_hand):
    there = tmp_path / "there"
    make_text(there / "data/little")
    training = laptop.launch("--machines=2", f"--storage_path={there}", name="lost")
    training.until("^step 1[0-9]0/", LAUNCH_S)
    cluster.kill()
    cluster.add(1)
    training.until("Ray has started the ranks again", LAUNCH_S)
    training.until("resuming from", LAUNCH_S)
    assert training.wait(LAUNCH_S) == 0, laptop.screen("lost")
    run_dir, kept = laptop.folder / "runs/lost", there / "runs/lost"
    assert curve(run_dir) == by_hand
    theirs = {path.relative_to(kept): path.read_bytes() for path in kept.rglob("*")
              if path.is_file() and path.suffix != ".pt" and not path.name.startswith(".")}
    assert {path: (run_dir / path).read_bytes() for path in theirs} == theirs
    assert {"metrics.jsonl", "status.json", "recipe.json", "logs/rank-1.log"} <= {str(path) for path in theirs}
    assert not list(run_dir.rglob("*.pt"))
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [
        path.name for path in sorted((kept / "checkpoints").iterdir())]


@needs_ray
@pytest.mark.slow
def test_an_elastic_run_goes_on_with_the_machines_that_are_left_and_a_second_ctrl_c_ends_it_at_once(
        laptop, cluster, tmp_path):
    make_text(tmp_path / "there/data/little")
    training = laptop.launch("--machines=2", "--min_machines=1", f"--storage_path={tmp_path}/there",
                             name="elastic", steps=100000)
    # Ray Train looks at which nodes there are every 20 s: after a test that has added one, it begins with 1 rank.
    training.until(r" 2 rank\(s\) on cpu", LAUNCH_S)
    checkpoints = tmp_path / "there/runs/elastic/checkpoints"
    until(lambda: 2 in [meta["ranks"] for meta in filter(None, map(intact, checkpoints.glob("step-*")))], LAUNCH_S)
    cluster.kill()
    training.until("the checkpoint is of 2 ranks and this is 1", LAUNCH_S)
    training.until("^step ", LAUNCH_S)
    for pid in ray_keeper.descendants(cluster.nodes[0].pid):
        with contextlib.suppress(OSError):        # it has ended meanwhile
            if b"RayTrainWorker" in keeper.command(pid):
                os.kill(pid, signal.SIGSTOP)      # the ranks hear nothing
    training.ctrl_c()
    training.until("Ctrl-C again kills", LAUNCH_S)
    training.ctrl_c()
    training.until(r"^Killed\. The last checkpoint is of step \d+\.", LAUNCH_S)
    assert training.wait(LAUNCH_S) == 130
    assert until(lambda: all(job.ended for job in cluster.dashboard.jobs()), LAUNCH_S)


@needs_ray
@pytest.mark.slow
def test_a_ray_of_its_own_is_on_loopback_alone_and_ends_with_the_run_though_the_launcher_was_killed(tmp_path):
    laptop = Laptop(tmp_path / "laptop", {name: x for name, x in os.environ.items() if not name.startswith("RAY_")})
    make_text(laptop.folder / "data/little")
    first = laptop.launch("--machines=2")
    first.until("^Ray .* is up", LAUNCH_S)
    about = json.loads((laptop.folder / "runs/x/ray.json").read_text())
    its = ray_keeper.descendants(about["keeper"])
    assert len(its) > 5
    assert listening(its) == {"127.0.0.1", "::ffff:127.0.0.1"}           # the ranks' own store is not there yet
    first.until("^step ", LAUNCH_S)
    first.kill()
    assert (Path(about["temp"]) / "token").stat().st_mode & 0o777 == 0o600

    second = laptop.launch("--machines=2")
    second.until("It runs on the Ray that was started for it", LAUNCH_S)
    assert second.wait(LAUNCH_S) == 0
    assert not Path(about["temp"]).exists()
    until(lambda: not [pid for pid in its if Path(f"/proc/{pid}/exe").exists()])        # a zombie has none
    with local.lock(laptop.folder / "runs/x"):    # it is nobody's
        pass


@needs_ray
@pytest.mark.parametrize(("flags", "env", "said"), [
    (["--ray_address=http://127.0.0.1:9"], {}, "No Ray dashboard answers at http://127.0.0.1:9: Connection refused."),
    (["--ray_address=ray://127.0.0.1:10001"], {}, "--ray_address is 'ray://127.0.0.1:10001'. Give the dashboard's"),
    ([], {"RAY_ADDRESS": "auto"}, "RAY_ADDRESS is 'auto'. Give the dashboard's address"),
    ([], {"RAY_AUTH_TOKEN": ""}, "wants a token. Set RAY_AUTH_TOKEN, or put it into ~/.ray/auth_token."),
    ([], {"RAY_AUTH_TOKEN": "another"}, "does not take this token"),
    (["--instance_type=p3.2xlarge"], {}, "x wants 1 GPU(s), and the cluster at"),
    (["--machines=8"], {}, "x wants 8 CPU(s), and the cluster at"),
    (["--machines=2", "--min_machines=1", "--set=recipe.batch.size=none", "--set=recipe.batch.local_size=4"], {},
     "--min_machines is for recipes whose batch does not depend on"),
    (["--min_machines=2"], {}, "--min_machines is 2, and there is 1 machine"),
])
def test_a_cluster_that_cannot_do_it_is_one_line_and_nothing_is_started(laptop, tmp_path, flags, env, said):
    laptop.env |= {"HOME": str(tmp_path)} | env
    assert said in (answer := laptop.refused("--name=x", *flags))
    assert len(answer.splitlines()) <= 2


@pytest.mark.parametrize(("body", "status", "said"), [
    (b'{"ray_version": "2.9.3"}', 200, "runs Ray 2.9.3; this needs 2.50 or newer."),
    (b"<html>", 200, "is not the dashboard of a Ray cluster."),
    (b"gone", 404, "does not have what a Ray cluster has (gone)."),
    (b"busy", 503, "answered 503: busy"),
    (b"", 302, "answered 302"),
])
def test_what_answers_and_is_no_such_cluster_is_told_apart(tmp_path, body, status, said):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        terms = Terms(ray_address=f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(Refused, match=re.escape(said)):
            ray.survey(Wish("x", tiny, NEW, terms))
        server.shutdown()


def test_without_a_ray_in_this_python_it_says_how_to_have_one(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=re.escape("pip install 'ray[default,train]'")):
        ray.survey(Wish("x", tiny, NEW, Terms()))


GPUS = Facts("http://head:8265", HERE, "2.60.0", (RayNode(96, 8), RayNode(96, 8)))


def test_the_ranks_are_the_configs_gpus_and_a_fixed_batch_may_be_elastic():
    wide = replace(two_p3dn, recipe=replace(two_p3dn.recipe, batch=Batch(size=64)))
    layout = ray.lay_out(Wish("x", wide, NEW, Terms(ray_address="http://head:8265", min_machines=1)), GPUS)
    job = layout.facts[1]
    assert (job["ranks"], job["min_ranks"], job["per_machine"], job["resources"]) == (16, 8, 8, {"CPU": 1, "GPU": 1})
    assert layout.machines == "16 GPUs of the Ray 2.60.0 at http://head:8265: 2 node(s), 192 CPUs, 16 GPUs"


@pytest.mark.parametrize(("storage", "root", "uri"), [
    (None, "~/txl", None), ("/shared", "/shared", None), ("s3://bucket/prefix", "~/txl", "s3://bucket/prefix")])
def test_a_folder_is_where_the_run_is_and_a_uri_is_where_its_checkpoints_are_copied(storage, root, uri):
    job = ray.lay_out(Wish("x", tiny, NEW, Terms(storage_path=storage)), GPUS).facts[1]
    assert (job["root"], job["storage"]) == (root, uri)


def test_the_same_code_is_the_same_package_and_tests_stay_here():
    (name, data), (again, _) = ray.package(), ray.package()
    names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    assert name == again
    assert {"cluster/host/ray_driver.py", "engine/loop.py", "txl/train.py"} <= set(names)
    assert not [name for name in names if name.startswith("tests/") or not name.endswith(".py")]


@needs_ray
@pytest.mark.parametrize("count", [1, 2])
def test_the_file_for_rays_own_launcher_passes_rays_own_validation(bench, capsys, count):
    import yaml
    from ray.autoscaler._private import util
    assert verbs_ray.ray_yaml([], verbs_ray.Yaml("tiny", "mine", count, "c5.xlarge", ssh_cidr="192.0.2.7/32")) == 0
    file = yaml.safe_load(capsys.readouterr().out)
    whole = util.prepare_config(file)
    util.validate_config(whole)
    node, permissions = whole["available_node_types"]["head"]["node_config"], whole["provider"]["security_group"]
    assert whole["available_node_types"].get("worker", {}).get("min_workers", 0) == count - 1
    assert node["InstanceMarketOptions"]["MarketType"] == "spot"
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert node["ImageId"].startswith("ami-")
    assert [rule["IpRanges"] for rule in permissions["IpPermissions"]] == [[{"CidrIp": "192.0.2.7/32"}]]
    assert "--dashboard-host=127.0.0.1" in whole["head_start_ray_commands"][-1]
    assert not bench.instances()


class Job:
    """What a job's log may hold, and what becomes of it."""

    def __init__(self, folder: Path):
        self.folder, self.said, self.bytes = folder, list[str](), b""
        self.feed = Feed(folder, "the job", self.said.append)

    def frame(self, **frame: object) -> None:
        self.print(f"\n{FRAME}{json.dumps(frame)}\n")

    def file(self, name: str, at: int, data: bytes, disk: str = "a") -> None:
        self.frame(file=name, disk=disk, at=at, data=base64.b64encode(data).decode())

    def print(self, text: str) -> None:
        self.bytes += text.encode()
        for byte in text.encode():                # however the network cuts it
            self.feed.add(bytes([byte]))

    def again(self) -> None:
        """Another launcher reads the log from its beginning."""
        self.feed = Feed(self.folder, "the job", self.said.append)
        self.feed.add(self.bytes)


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_what_programs_print_is_the_log_of_their_node_and_frames_are_not_in_it(job):
    job.frame(begun="10.0.0.1")
    job.frame(node=1, pid=7, ip="10.0.0.2")
    job.frame(node=0, pid=7, ip="10.0.0.1")
    job.print("a driver's\n\nwords\n\x1b[36m(RayTrainWorker pid=7, ip=10.0.0.2)\x1b[0m far\n")
    job.print("(RayTrainWorker pid=7) near\n")
    job.frame(word="hear")
    logs = [(job.folder / f"logs/node-{i}.log").read_text().split("\n", 1) for i in range(2)]
    assert [head.startswith("=== launched ") for head, _ in logs] == [True, True]
    assert [text for _, text in logs] == ["a driver's\n\nwords\n(RayTrainWorker pid=7) near\n",
                                          "(RayTrainWorker pid=7, ip=10.0.0.2) far\n"]
    assert (job.said, job.feed.begun) == (["hear"], True)


def test_a_launcher_that_comes_later_makes_the_same_files(job):
    for disk in "ab":                             # the second cluster had nothing of the first one's disk
        job.file("logs/rank-0.log", 0, b"one\n", disk)
        job.file("logs/rank-0.log", 4, f"{disk}\n".encode(), disk)
        job.file("logs/rank-0.log", 0, b"one\n", disk)        # a rank that was started again sends all of it
        job.file("logs/rank-0.log", 4, f"{disk}\n".encode(), disk)
    job.file("metrics.jsonl", 0, b'{"step": 1}\n{"step": 2}\n{"step": 3}\n')
    job.file("metrics.jsonl", 0, b'{"step": 3, "new": 1}\n', "b")
    expected = {"logs/rank-0.log": "one\na\none\nb\n",
                "metrics.jsonl": '{"step": 1}\n{"step": 2}\n{"step": 3, "new": 1}\n'}
    for _ in range(2):
        assert {name: (job.folder / name).read_text() for name in expected} == expected
        job.again()


def test_numbers_that_were_taken_back_there_are_taken_back_here(job):
    job.file("metrics.jsonl", 0, b'{"step": 1}\n{"step": 2}\n')
    job.file("metrics.jsonl", 0, b'{"step": 1}\n')
    assert (job.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("name", ["status.json", "machine.json", "lr_finder.json"])
def test_what_a_run_says_of_itself_comes_whole(job, name):
    job.frame(file=name, whole=base64.b64encode(b'{"a": 1}').decode())
    assert (job.folder / name).read_text() == '{"a": 1}'


def test_a_checkpoint_that_the_cluster_has_no_more_is_not_listed_here_and_one_that_is_here_stays(job):
    whole = base64.b64encode(b"{}").decode()
    for step in (50, 100, 150):
        job.frame(file=f"checkpoints/step-{step}/meta.json", whole=whole)
    (job.folder / "checkpoints/step-50/model.pt").touch()
    job.frame(kept=["step-150", "step-200"])      # by a start after that which told of the others
    assert {path.name for path in (job.folder / "checkpoints").iterdir()} == {"step-50", "step-150"}


@pytest.mark.parametrize("name", ["../x", "/etc/x", "recipe.json", "ray.json", "logs/../x", "logs/node-0.log", "stop",
                                  "checkpoints/step-1/../../x", "tensorboard/../x"])
def test_a_cluster_writes_nothing_but_what_a_run_makes(job, name):
    before = sorted(job.folder.rglob("*"))
    job.frame(file=name, whole=base64.b64encode(b"x").decode())
    job.file(name, 0, b"x")
    job.frame(kept=name)
    job.frame(kept=[name, 7])
    job.frame(file=7)
    job.print(f"{FRAME}no json\n{FRAME}[1]\n")
    assert sorted(job.folder.rglob("*")) == before


def listening(pids: list[int]) -> set[str]:
    """The addresses at which any of them takes connections."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor).removeprefix("socket:[").removesuffix("]"))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, address, _, state, *rest = line.split()
            if state == "0A" and rest[5] in sockets:          # LISTEN
                packed = b"".join(bytes.fromhex(address.partition(":")[0])[i:i + 4][::-1] for i in range(
                    0, len(address.partition(":")[0]) // 2, 4))
                found.add(socket.inet_ntop(socket.AF_INET if name == "tcp" else socket.AF_INET6, packed))
    return found
