"""Runs one training on a Ray cluster: the entrypoint of the job that cluster/ray.py submits, in a copy of the checkout.

    python -m cluster.host.ray_driver                  the job is the JSON in TXL_RAY_JOB (cluster.ray.job_of)
    python -m cluster.host.ray_driver kill JOB         end that job now: Ray's own `stop` lets it save first

Placement, restarts and the dashboard are Ray's, by a TorchTrainer; in each of its workers runs the recipe's own entry,
as torchrun would start it. SIGTERM, which `ray job stop` sends, asks the training to save and stop.

What the launcher must know stands in this program's output, one line each that begins with FRAME: the job's log is the
only thing that every way to a dashboard lets through. Everything else there is what programs print.
"""
from __future__ import annotations

import base64
import contextlib
import importlib
import importlib.util
import json
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

FRAME = "@txl "
NAMESPACE = "txl"
NODE_LABEL = "txl-node"                           # of a machine that this project started Ray on: its number
NEEDED = ("torch", "numpy", "tensorboard", "tokenizers", "pyarrow")
PIECE_BYTES = 48 << 10                            # of a file, in one frame
GRACE_S = 15                                      # for the other ranks, when one has said what is wrong
WAITING_S = 30                                    # without workers, until it is said
# What Ray Train leaves beside the checkpoints: a proof that it can write, and a list of what is pruned by now.
LEAVINGS = (".validate_storage_marker", "checkpoint_manager_snapshot.json")


class CannotStart(Exception):
    """No training was started; the message says why."""


def main(argv: list[str]) -> int:
    if argv[:1] == ["kill"]:
        return kill(argv[1])
    job = json.loads(os.environ["TXL_RAY_JOB"])
    if trouble := unfit():
        say(refused=trouble)
        return 2
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})     # before there are threads: one of ours waits for it
    import ray
    import ray.train.torch  # with all of torch, before another thread may load a part of it
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    ray.init(namespace=NAMESPACE)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0, name=job["id"], scheduling_strategy=here)(Mailbox).remote()
    threading.Thread(target=_stop_on_sigterm, args=(mailbox,), daemon=True).start()
    post = Post(job, mailbox)
    post.start()
    status = train(job)
    status = post.finish() or status
    say(ended=status)
    return status


def unfit() -> str:
    """What keeps a training from running on this machine; "" where nothing does."""
    python = "{}.{}".format(*sys.version_info[:2])
    if sys.version_info < (3, 10):                # noqa: UP036 - the cluster's, whatever this project asks for
        return f"The cluster's Python is {python}, and the training needs 3.10 or newer."
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return (f"The cluster's Python {python} ({sys.executable}) has no {', '.join(missing)}. Install what training "
                f"needs on all its nodes:  pip install -r requirements.txt")
    return ""


def train(job: dict[str, Any]) -> int:
    """The exit status of the training as a whole: 0 where Ray Train has brought it to an end."""
    import pyarrow.fs
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    # Where the run's folder is one for all nodes, Ray Train's checkpoints are the engine's own folders there.
    storage = job["storage"] or str(folder_of(job).parent)
    scaling = {"resources_per_worker": job["resources"], "use_gpu": "GPU" in job["resources"],
               "placement_strategy": "PACK" if "GPU" in job["resources"] else "SPREAD"}
    if job.get("pinned"):                         # a rank's part of a checkpoint is on its own machine's disk
        scaling["label_selector"] = [{NODE_LABEL: str(rank // job["per_machine"])} for rank in range(job["ranks"])]
    try:
        workers = (job["min_ranks"], job["ranks"]) if job["min_ranks"] else job["ranks"]
        scaling_config = ScalingConfig(num_workers=workers, **scaling)
    except (ValueError, TypeError) as error:
        say(refused=f"The cluster's Ray does not take {workers} workers: {error}")
        return 2
    from engine.world import process_group
    if not job["storage"]:
        Path(storage).mkdir(parents=True, exist_ok=True)
    filesystem, path = pyarrow.fs.FileSystem.from_uri(storage)

    def tidy() -> None:
        for name in LEAVINGS:
            with contextlib.suppress(OSError):
                filesystem.delete_file(f"{path}/{job['name']}/{name}")
    trainer = TorchTrainer(
        work, train_loop_config={"job": json.dumps(job)}, scaling_config=scaling_config,
        torch_config=TorchConfig(backend=process_group("GPU" in job["resources"])),
        run_config=RunConfig(name=job["name"], storage_path=storage,
                             failure_config=FailureConfig(max_failures=job["max_failures"])))
    import ray
    tidy()
    say(begun=ray.util.get_node_ip_address())
    try:
        trainer.fit()
        return 0
    except TrainingFailedError as error:
        if "Unable to set up cluster storage" in str(error):
            say(refused=f"{storage} is not one folder for all nodes of the cluster. Say --storage_path=FOLDER, one "
                        f"that all of them share, or --storage_path=s3://BUCKET/PREFIX")
            return 2
        print(str(error)[-4000:], flush=True)
        return 1
    finally:
        tidy()


def work(config: dict[str, Any]) -> None:
    """One rank, in a worker of Ray Train's, which has set RANK and the like and made the process group."""
    import ray
    import ray.train
    job = json.loads(config["job"])
    context = ray.train.get_context()
    rank, leads = context.get_world_rank(), context.get_world_rank() == 0
    mailbox = ray.get_actor(job["id"], namespace=NAMESPACE)
    ray.get(mailbox.begin.remote(rank, {"node": rank // job["per_machine"], "pid": os.getpid(),
                                        "ip": ray.util.get_node_ip_address()}))
    mirror, status = None, 1
    try:
        folder = prepared(job)
        if job["storage"] and context.get_local_rank() == 0:
            fetch(job, folder / "checkpoints")
        if context.get_world_size() > 1:
            import torch.distributed
            torch.distributed.barrier()           # nobody looks for a checkpoint before all disks have it
        mirror = Mirror(folder, rank, mailbox, silent=shared(job, folder))
        mirror.start()
        entry = importlib.import_module(job["entry"])
        status = entry.main([os.path.relpath(folder / "recipe.json")], saved=lambda path: report(job, path, leads))
    except CannotStart as error:
        ray.get(mailbox.put.remote([{"refused": str(error)}]))
    finally:
        if mirror:
            mirror.close()
        known = sys.exc_info()[0] is None         # what raises is Ray Train's to try again
        ray.get(mailbox.end.remote(rank, status, known))


def folder_of(job: dict[str, Any]) -> Path:
    """The run's folder on this machine."""
    return Path(job["root"]).expanduser() / "runs" / job["name"]


def shared(job: dict[str, Any], folder: Path) -> bool:
    """Whether the launcher sees the same folder: it has left the job's name there."""
    try:
        return json.loads((folder / "ray.json").read_text())["id"] == job["id"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepared(job: dict[str, Any]) -> Path:
    """The run's folder, with its recipe, on a machine that may never have seen it; the current directory is its root.

    Raises CannotStart where the folder is another run's.
    """
    from cluster.run import Refused, standing
    from engine.files import write_whole
    from engine.values import from_json
    from txl.config import Recipe
    folder = folder_of(job)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder.parent.parent)
    if not shared(job, folder):
        try:
            standing(folder, from_json(Recipe, job["recipe"]))
        except Refused as error:
            raise CannotStart(f"On the cluster: {error}") from error
        write_whole(folder / "recipe.json", json.dumps(job["recipe"], indent=1) + "\n")
        with contextlib.suppress(OSError):        # a request that the job before did not hear
            (folder / "stop").unlink()
    return folder


def fetch(job: dict[str, Any], here: Path) -> None:
    """The newest and the best checkpoint of the storage, where this disk does not have them."""
    import pyarrow.fs
    filesystem, path = pyarrow.fs.FileSystem.from_uri(job["storage"])
    there = {}
    for about in filesystem.get_file_info(pyarrow.fs.FileSelector(f"{path}/{job['name']}", allow_not_found=True)):
        with contextlib.suppress(OSError, ValueError, KeyError):          # one that was still being written
            with filesystem.open_input_stream(f"{about.path}/meta.json") as file:
                meta = json.loads(file.read())
            if filesystem.get_file_info(f"{about.path}/model.pt").size == meta["files"]["model.pt"]:
                there[about.path] = meta
    newest = sorted(there)[-1:]
    best = sorted(there, key=lambda path: (there[path]["valid_loss"], path) if there[path]["valid_loss"] is not None
                  else (float("inf"), path))[:1]
    for path in {*newest, *best}:
        final = here / path.rpartition("/")[2]
        with contextlib.suppress(OSError, ValueError):
            if json.loads((final / "meta.json").read_text())["nonce"] == there[path]["nonce"]:
                continue
        partial = here / f".{final.name}.{secrets.token_hex(8)}.partial"
        partial.mkdir(parents=True)
        pyarrow.fs.copy_files(path, str(partial), source_filesystem=filesystem,
                              destination_filesystem=pyarrow.fs.LocalFileSystem())
        shutil.rmtree(final, ignore_errors=True)
        with contextlib.suppress(OSError):        # another machine that shares the disk was first
            partial.rename(final)


def report(job: dict[str, Any], saved: Path, leads: bool) -> None:
    """Tell Ray Train of a checkpoint. Collective. Into a storage of its own each rank sends what only its disk has."""
    import pyarrow.fs
    import ray.train
    from ray.train.v2.api.report_config import CheckpointUploadMode
    meta = json.loads((saved / "meta.json").read_text())
    numbers = {"step": meta["step"], "tokens": meta["tokens"], "valid_loss": meta["valid_loss"]}
    if not job["storage"]:
        whole = ray.train.Checkpoint.from_directory(str(saved.resolve())) if leads else None
        ray.train.report(numbers, whole, saved.name, CheckpointUploadMode.NO_UPLOAD)
        return
    own = saved.with_name(f".{saved.name}.{secrets.token_hex(8)}.partial")
    if leads:
        source: Path | None = saved
    elif "model.pt" in meta["files"]:             # the leading rank's disk is this one
        source = None
    else:
        own.mkdir()
        file = f"rank-{ray.train.get_context().get_world_rank()}.pt"
        os.link(saved / file, own / file)
        source = own
    ray.train.report(numbers, ray.train.Checkpoint.from_directory(str(source.resolve())) if source else None,
                     saved.name, CheckpointUploadMode.SYNC)
    shutil.rmtree(own, ignore_errors=True)
    if leads:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(job["storage"])
        for about in filesystem.get_file_info(pyarrow.fs.FileSelector(f"{path}/{job['name']}")):
            if about.base_name.startswith("step-") and not (saved.parent / about.base_name).exists():
                filesystem.delete_dir(about.path)


class Mailbox:
    """An actor between the ranks and the driver, on the driver's machine. It ends with the driver."""

    def __init__(self) -> None:
        self._frames: list[dict[str, Any]] = []
        self._ended: list[tuple[float, int, int, bool]] = []
        self._starts = 0
        self._began: set[int] = set()
        self._stop = self._kill = False

    def begin(self, rank: int, where: dict[str, Any]) -> None:
        if rank in self._began or not self._began:
            self._began, self._ended = set(), []
            self._starts += 1
        self._began.add(rank)
        self._frames.append(where)

    def put(self, frames: list[dict[str, Any]]) -> bool:
        """Whether the training shall stop."""
        self._frames += frames
        return self._stop

    def end(self, rank: int, status: int, known: bool) -> None:
        self._ended.append((time.time(), rank, status, known))

    def ask(self, stop: bool = False, kill: bool = False) -> bool:
        """Whether there is a rank to hear it."""
        self._stop, self._kill = self._stop or stop, self._kill or kill
        return len(self._began) > len(self._ended)

    def take(self) -> tuple[list[dict[str, Any]], list[tuple[float, int, int, bool]], int, bool]:
        """Frames that nobody has taken, how ranks ended (when, rank, status, known), starts, and whether to end now."""
        frames, self._frames = self._frames, []
        return frames, self._ended, self._starts, self._kill


class Mirror(threading.Thread):
    """Sends what a rank's machine knows of the run to the mailbox: each rank its log, the leading one all else."""

    def __init__(self, folder: Path, rank: int, mailbox: Any, silent: bool):
        super().__init__(daemon=True)
        self._folder, self._rank, self._mailbox, self._silent = folder.resolve(), rank, mailbox, silent
        self._disk = _name_of_disk(self._folder)
        self._sent: dict[str, int] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._kept: list[str] | None = None       # of checkpoints, as last told
        self._asked = False
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(1):
            self._pass()

    def close(self) -> None:
        """After a last pass, for what was written up to now."""
        self._done.set()
        self.join()
        self._pass()

    def _pass(self) -> None:
        import ray
        frames = [] if self._silent else self._frames()
        stop = ray.get(self._mailbox.put.remote(frames), timeout=60)
        if stop and self._rank == 0 and not self._asked:
            (self._folder / "stop").touch()
            self._asked = True

    def _frames(self) -> list[dict[str, Any]]:
        frames = self._grown([self._folder / "logs" / f"rank-{self._rank}.log"])
        if self._rank == 0:
            frames += self._grown([self._folder / "metrics.jsonl", *sorted(self._folder.glob("tensorboard/*"))])
            metas = sorted(self._folder.glob("checkpoints/step-*/meta.json"))
            kept = [path.parent.name for path in metas]
            if kept != self._kept:                # always at first: a start before this one may not have told of all
                frames.append({"kept": kept})
                self._kept = kept
            frames += self._changed([self._folder / "machine.json", *metas, self._folder / "lr_finder.json",
                                     self._folder / "status.json"])
        return frames

    def _grown(self, paths: list[Path]) -> list[dict[str, Any]]:
        frames = []
        for path in paths:
            name = str(path.relative_to(self._folder))
            try:
                size, at = path.stat().st_size, self._sent.get(name, 0)
                if size < at:                     # what a start wrote behind its last checkpoint was taken back
                    at = 0
                with open(path, "rb") as file:
                    file.seek(at)
                    while data := file.read(PIECE_BYTES):
                        frames.append({"file": name, "disk": self._disk, "at": at,
                                       "data": base64.b64encode(data).decode()})
                        at += len(data)
                self._sent[name] = at
            except FileNotFoundError:
                pass
        return frames

    def _changed(self, paths: list[Path]) -> list[dict[str, Any]]:
        frames = []
        for path in paths:
            name = str(path.relative_to(self._folder))
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                mark = (about.st_mtime_ns, about.st_size)
                if self._seen.get(name) != mark:
                    frames.append({"file": name, "whole": base64.b64encode(path.read_bytes()).decode()})
                    self._seen[name] = mark
        return frames


class Post(threading.Thread):
    """Takes from the mailbox and prints for the launcher; ends the driver where the training cannot end by itself."""

    def __init__(self, job: dict[str, Any], mailbox: Any):
        super().__init__(daemon=True)
        self._job, self._mailbox = job, mailbox
        self._done = threading.Event()
        self._starts, self._since = 0, time.monotonic()
        self._waiting_told = False

    def run(self) -> None:
        while not self._done.wait(.5):
            ended, kill = self._take()
            failed = [when for when, _, status, known in ended if status and known]
            if kill:
                say(ended=-signal.SIGKILL)
                os._exit(137)
            if failed and time.time() - min(failed) > GRACE_S:   # the other ranks wait for the one that has left
                self._root_cause(ended)
                say(ended=1)
                os._exit(1)

    def finish(self) -> int:
        """The worst exit status that a rank has told of."""
        self._done.set()
        self.join()
        ended, _ = self._take()
        self._root_cause(ended)
        return max((status for _, _, status, _ in ended), default=0)

    def _take(self) -> tuple[list[tuple[float, int, int, bool]], bool]:
        import ray
        frames, ended, starts, kill = ray.get(self._mailbox.take.remote(), timeout=60)
        for frame in frames:
            say(**frame)
        if starts != self._starts:
            if starts > 1:
                say(word=f"Ray has started the ranks again (start {starts}), from the last checkpoint.")
            self._starts = starts
        elif not starts and not self._waiting_told and time.monotonic() - self._since > WAITING_S:
            free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
            say(word=f"Waiting for {self._job['ranks']} times {self._job['resources']}: the cluster has {free} free.")
            self._waiting_told = True
        return ended, kill

    def _root_cause(self, ended: list[tuple[float, int, int, bool]]) -> None:
        """In torchrun's words, which the launcher understands (cluster.follow.ROOT_CAUSE)."""
        if failed := sorted(one for one in ended if one[2]):
            when, rank, status, _ = failed[0]
            print(f"Root Cause (first observed failure):\n  time      : "
                  f"{time.strftime('%Y-%m-%d_%H:%M:%S', time.localtime(when))}\n  rank      : {rank}\n"
                  f"  exitcode  : {status}", flush=True)


def kill(job: str) -> int:
    """Ends the job now. By a job of its own: Ray's way to stop one is taken by the request to save and stop."""
    import ray
    ray.init(namespace=NAMESPACE)
    ray.get(ray.get_actor(job).ask.remote(kill=True), timeout=60)
    return 0


def say(**frame: Any) -> None:
    """One line for the launcher. The newline before it ends a line that another thread may be writing."""
    os.write(1, f"\n{FRAME}{json.dumps(frame)}\n".encode())


def _name_of_disk(folder: Path) -> str:
    """The same for all who see this folder, and another once it is gone: there logs begin anew."""
    path = folder / ".disk"
    with contextlib.suppress(FileExistsError):
        fresh = path.with_name(f".disk.{secrets.token_hex(8)}")
        fresh.write_text(secrets.token_hex(8))
        try:
            os.link(fresh, path)                  # as a whole, and by one of them
        finally:
            fresh.unlink()
    return path.read_text()


def _stop_on_sigterm(mailbox: Any) -> None:
    import ray
    signal.sigwait({signal.SIGTERM})
    if not ray.get(mailbox.ask.remote(stop=True), timeout=60):
        say(ended=-signal.SIGTERM)                # no rank runs: there is nothing to save
        os._exit(143)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
