"""What a machine does in S3, with its role's credentials: docs/aws.md, "In a bucket". Needs boto3.

    python -m cluster.host.bucket fetch s3://BUCKET/PREFIX FOLDER                       what is there and not here
    python -m cluster.host.bucket resume RUN_DIR s3://BUCKET/RUN --node=I --ranks=K     what node I has of a run
    python -m cluster.host.bucket mirror RUN_DIR s3://BUCKET/RUN --node=I --ranks=K     until SIGTERM and a last pass

--ranks: of each node. Of a run's folder a node has the files of its ranks and those named after it; node 0 has the
rest. Exit status: 0; 3 where a mirror gave up; 1 and one line where something is missing or forbidden.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from cluster.bucket import Place, parse
from engine.complete import intact

EVERY_S = 15                                      # between two passes
OTHERS_S = 60                                     # that a checkpoint waits for the other nodes' parts
GIVE_UP_S = 600                                   # without progress, once the training has ended
GAVE_UP = 3                                       # an exit status; host/supervisor.py
CONNECT_S, READ_S, TRIES = 5, 20, 3
SAYS = "bucket: "                                 # cluster/remote.py: how the lines begin that a launcher shows
NOT_KEPT = ("nodes", "lock", "stop")              # of a run's folder: how it is now, no part of what it was
LATER = ("RequestTimeout", "RequestTimeTooSkewed", "ExpiredToken")         # refusals that time may mend


class Unreached(Exception):
    """S3 did not do what it was asked. `hopeless`: nor will it later."""

    def __init__(self, said: str, hopeless: bool = False):
        super().__init__(said)
        self.hopeless = hopeless


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    plain = verbs.add_parser("fetch")
    plain.add_argument("place", type=parse)
    plain.add_argument("folder", type=Path)
    for verb in ("resume", "mirror"):
        sub = verbs.add_parser(verb)
        sub.add_argument("folder", type=Path)
        sub.add_argument("place", type=parse)
        sub.add_argument("--node", type=int, required=True)
        sub.add_argument("--ranks", type=int, required=True)
    sub.add_argument("--every", type=float, default=EVERY_S, help="seconds between two passes")
    sub.add_argument("--last", action="store_true", help="the last pass at once")
    args = parser.parse_args(argv)
    if args.verb == "mirror":
        return Mirror(client(), args.folder, args.place, args.node, args.ranks).run(_ended(args.last, args.every))
    try:
        s3 = Store(client(), args.place)
        if args.verb == "fetch":
            fetch(s3, args.folder)
        else:
            resume(s3, args.folder, args.node, args.ranks)
    except (Unreached, OSError) as error:
        sys.exit(f"{args.place}: {error}")
    return 0


def client() -> Any:
    """Of S3, as the machine's role. Each attempt of a call ends."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        sys.exit(f"S3 needs boto3, which {sys.executable} has not ({error}). Without --skip_setup it is installed")
    return boto3.client("s3", config=Config(connect_timeout=CONNECT_S, read_timeout=READ_S,
                                            retries={"total_max_attempts": TRIES, "mode": "standard"}))


def fetch(s3: Store, folder: Path) -> None:
    """What is in the place and not here with the same size. Raises Unreached, where nothing is there too."""
    there = s3.sizes()
    if not there:
        raise Unreached("nothing is there")
    for path, size in there.items():
        local = folder / path
        if not local.is_file() or local.stat().st_size != size:
            s3.get(path, local)


def resume(s3: Store, run_dir: Path, node: int, ranks: int) -> None:
    """What is a node's own of a run's folder and not here: the logs, which go on, and each whole checkpoint."""
    there = s3.sizes()
    for path in there:                            # status.json is the training's word of now
        if (not path.startswith(("checkpoints/", "status.json")) and node_of(path, ranks) == node
                and not (run_dir / path).exists()):
            s3.get(path, run_dir / path)
    for path in there:
        if re.fullmatch(r"checkpoints/step-\d+/meta\.json", path):
            _get_checkpoint(s3, there, PurePosixPath(path).parent.as_posix(), run_dir, node, ranks)


def node_of(path: str, ranks: int) -> int:
    """Which node has a file of a run's folder. `ranks`: of each node."""
    if rank := re.search(r"/rank-(\d+)\.(?:log|pt)$", path):
        return int(rank[1]) // ranks
    node = re.fullmatch(r"logs/(?:node|bucket)-(\d+)\.log", path)
    return int(node[1]) if node else 0


class Mirror:
    """Keeps in S3 what a node has of a run's folder.

    A checkpoint is there once its meta.json is: that goes last, and each file carries the nonce of its save, so that
    none is taken for one of another save of that step. After the checkpoints goes status.json, as it was before them:
    what is finished there has its weights there. What the training has removed goes once a newer one is there.
    """

    def __init__(self, s3: Any, run_dir: Path, place: Place, node: int, ranks: int):
        self.run_dir, self.place, self.node, self.ranks = run_dir, place, node, ranks
        self.s3 = Store(s3, place, self._progress)
        self._sent: dict[str, tuple[int, int]] = {}              # time and size of what is there, by path
        self._status: bytes | None = None                        # what is there
        self._whole: set[tuple[str, str]] = set()                # checkpoints that are there: folder and nonce
        self._own_since: dict[tuple[str, str], float] = {}       # since when this node's part is
        self._said, self._bytes = "", 0
        self._moved = time.monotonic()            # when a file was last sent as a whole: a failing one moves bytes too

    def run(self, ended: Callable[[], bool]) -> int:
        """Pass after pass, until `ended`, which waits between two of them, and all is there. The exit status."""
        last = False
        while True:
            hopeless = False
            try:
                if self.all_sent():
                    if last and not self._said:
                        return 0
                    self._say("")
            except Unreached as error:
                hopeless = error.hopeless
                self._say(f"{error}. The training goes on, and this is tried again")
            if last and (hopeless or time.monotonic() > self._moved + GIVE_UP_S):
                self._say("given up. What is not there is on this machine alone")
                return GAVE_UP
            if last:
                time.sleep(1)
            elif ended():
                last, self._moved = True, time.monotonic()

    def all_sent(self) -> bool:
        """Send what is new. Whether all is there then. Raises Unreached."""
        status = self.run_dir / "status.json"
        as_it_is = status.read_bytes() if self.node == 0 and status.exists() else None
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                stat = (self.run_dir / path).stat()
                if self._sent.get(path) != (stat.st_mtime_ns, stat.st_size):
                    self.s3.put(self.run_dir / path, path)
                    self._sent[path] = stat.st_mtime_ns, stat.st_size
                    self._moved = time.monotonic()
        whole = True
        for folder in sorted((self.run_dir / "checkpoints").glob("step-*"), reverse=True):
            with contextlib.suppress(FileNotFoundError):         # the training has removed it meanwhile
                whole &= self._checkpoint_sent(folder)
        if whole and as_it_is is not None and as_it_is != self._status:
            self.s3.put_text(as_it_is, "status.json")
            self._status = as_it_is
        return whole

    def _files(self) -> Iterator[str]:
        for path in sorted(self.run_dir.rglob("*")):
            name = path.relative_to(self.run_dir).as_posix()
            if (name.split("/")[0] not in ("checkpoints", "status.json", *NOT_KEPT) and path.is_file()
                    and node_of(name, self.ranks) == self.node and not name.endswith(".partial")):
                yield name

    def _checkpoint_sent(self, folder: Path) -> bool:
        """Whether it is there, as far as this node can say. Raises FileNotFoundError."""
        meta = json.loads((folder / "meta.json").read_text())
        nonce, base = str(meta.get("nonce")), f"checkpoints/{folder.name}"
        if (base, nonce) in self._whole:
            return True
        there = self.s3.sizes(f"{base}/")

        def lacks(name: str) -> bool:
            path = f"{base}/{name}"
            return path not in there or self.s3.nonce(path) != nonce

        if self.node == 0:
            if not lacks("meta.json"):
                self._whole.add((base, nonce))
                return True
            self.s3.remove(f"{base}/meta.json")                  # of another save, whose files are now replaced
        for name in sorted(meta["files"]):
            if node_of(f"{base}/{name}", self.ranks) == self.node and lacks(name):
                self.s3.put(folder / name, f"{base}/{name}", nonce=nonce)
                self._moved = time.monotonic()
        if self.node == 0:
            since = self._own_since.setdefault((base, nonce), time.monotonic())
            others = [f"rank-{rank}.pt" for rank in range(self.ranks, meta["ranks"])]
            if any(map(lacks, others)) and time.monotonic() < since + OTHERS_S:
                return False
            self.s3.put(folder / "meta.json", f"{base}/meta.json", nonce=nonce)
            self._remove_before(folder.name)
        self._whole.add((base, nonce))
        return True

    def _remove_before(self, whole: str) -> None:
        """What the training has removed of the checkpoints before one that is there."""
        here = {path.name for path in (self.run_dir / "checkpoints").glob("step-*")}
        gone = [path for path in self.s3.sizes("checkpoints/") if path.split("/")[1] not in here
                and path.split("/")[1] < whole]
        for path in sorted(gone, key=lambda path: not path.endswith("/meta.json")):
            self.s3.remove(path)

    def _progress(self, n: int) -> None:
        self._bytes += n
        with contextlib.suppress(OSError):        # a disk that is full
            (self.run_dir / "nodes" / f"{self.node}.mirror").write_text(str(self._bytes))

    def _say(self, what: str) -> None:
        """Once, and in the end that it is no longer so."""
        if what != self._said:
            print(f"{SAYS}{time.strftime('%H:%M:%S')} {self.place}: {what or 'up to date again'}", flush=True)
            self._said = what


def _ended(at_once: bool, every_s: float) -> Callable[[], bool]:
    """Waits for `every_s`, or until SIGTERM; whether that came."""
    asked = [at_once]
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: asked.append(True))

    def wait() -> bool:
        until = time.monotonic() + every_s
        while not any(asked) and time.monotonic() < until:
            time.sleep(min(.2, every_s))
        return any(asked)

    return wait


class Store:
    """A folder in S3, its files by their paths in it. What fails raises Unreached."""

    def __init__(self, s3: Any, place: Place, progress: Callable[[int], None] = lambda n: None):
        self._s3, self._place, self._progress = s3, place, progress

    def sizes(self, below: str = "") -> dict[str, int]:
        with _unreached():
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self._place.bucket,
                                                                       Prefix=self._place.key(below))
            return {x["Key"][len(self._place.key()):]: x["Size"] for page in pages for x in page.get("Contents", [])
                    if not x["Key"].endswith("/")}               # as the console makes a folder

    def nonce(self, path: str) -> str | None:
        """Of a file that is there: a role that may list only its own folder is told 403 of what is not."""
        with _unreached():
            return self._s3.head_object(**self._named(path))["Metadata"].get("nonce")

    def json(self, path: str) -> dict[str, Any]:
        with _unreached():
            return json.loads(self._s3.get_object(**self._named(path))["Body"].read())

    def get(self, path: str, local: Path) -> None:
        """As a whole or not at all."""
        if ".." in path.split("/"):
            raise Unreached(f"{path} would lead out of the folder", hopeless=True)
        local.parent.mkdir(parents=True, exist_ok=True)
        beside = local.with_name(f".{local.name}.partial")
        for cut_off in local.parent.glob(f"{beside.name}*"):     # boto3 adds letters of its own
            cut_off.unlink()
        with _unreached():
            self._s3.download_file(**self._named(path), Filename=str(beside), Callback=self._progress)
        os.replace(beside, local)

    def put_text(self, text: bytes, path: str) -> None:
        with _unreached():
            self._s3.put_object(**self._named(path), Body=text)

    def put(self, local: Path, path: str, *, nonce: str = "") -> None:
        with _unreached():
            self._s3.upload_file(str(local), **self._named(path), Callback=self._progress,
                                 ExtraArgs={"Metadata": {"nonce": nonce}} if nonce else None)

    def remove(self, path: str) -> None:
        with _unreached():
            self._s3.delete_object(**self._named(path))

    def _named(self, path: str) -> dict[str, str]:
        return {"Bucket": self._place.bucket, "Key": self._place.key(path)}


@contextlib.contextmanager
def _unreached() -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error) as error:
        cause = error.__context__ if isinstance(error, Boto3Error) else error      # which names the file as well
        if isinstance(cause, ClientError):
            said, status = cause.response["Error"], cause.response["ResponseMetadata"]["HTTPStatusCode"]
            code = said.get("Code", "")
            raise Unreached(f"{cause.operation_name}: {status} {code}: {said.get('Message', '')}",
                            400 <= status < 500 and code not in LATER) from error
        raise Unreached(f"{type(error).__name__}: {error}", isinstance(error, NoCredentialsError)) from error


def _get_checkpoint(s3: Store, there: dict[str, int], base: str, run_dir: Path, node: int, ranks: int) -> None:
    """Unless it is here, or not whole there."""
    meta, final = s3.json(f"{base}/meta.json"), run_dir / base
    here = intact(final) is not None if node == 0 else (final / "meta.json").exists()
    if here or there.get(f"{base}/model.pt", -1) != meta.get("files", {}).get("model.pt"):
        return
    partial = final.with_name(f".{final.name}.bucket.partial")   # a name that the training tidies up
    for path in there:
        if path.startswith(f"{base}/") and path.endswith(".pt") and node_of(path, ranks) == node and (
                s3.nonce(path) == str(meta.get("nonce"))):
            s3.get(path, partial / PurePosixPath(path).name)
    s3.get(f"{base}/meta.json", partial / "meta.json")
    shutil.rmtree(final, ignore_errors=True)      # damaged, where there is one
    partial.rename(final)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
