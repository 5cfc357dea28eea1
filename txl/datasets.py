"""Where texts come from: public data sets, downloaded and checked. Of files of one's own: txl/folders.py.

Numbers and digests were each found in at least two public places, named beside them. Standard library only.
"""
from __future__ import annotations

import errno
import hashlib
import http.client
import re
import shutil
import sys
import tarfile
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

SPLITS = ("train", "valid", "test")
TEXTS = tuple(f"{split}.txt" for split in SPLITS)
# The One Billion Word Benchmark as its archive has it. Of the hundred shards the first is held out, in fifty pieces.
LM1B_SHARDS = tuple(f"training-monolingual.tokenized.shuffled/news.en-{i:05}-of-00100" for i in range(1, 100))
LM1B_HELD_OUT = "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"


class DataError(ValueError):
    """A text or its tokens cannot be had. The message is meant for the user as it stands."""


@dataclass(frozen=True)
class File:
    """A download, tried from each url in turn; its digest is ALGORITHM:HEX, where git is git's name of a blob.

    `unpack(archive, folder)` makes the files named `gives`; without it the file itself is what is wanted.
    """
    urls: tuple[str, ...]
    digest: str
    size: int | None = None
    unpack: Callable[[Path, Path], None] | None = None
    gives: tuple[str, ...] = TEXTS

    @property
    def name(self) -> str:
        return re.split("/|%2F", self.urls[0])[-1]


def download(file: File, folder: Path) -> Path:
    """The file in `folder`, checked. An interrupted download goes on from NAME.part; a failed one changes nothing.

    Raises DataError. A file that someone put there by other means is taken as it is, once checked.
    """
    target, part = folder / file.name, folder / f"{file.name}.part"
    if target.exists():
        return _checked(target, file)
    problems = []
    for url in file.urls:
        try:
            _get(url, part, file.size)
            return _checked(part, file).rename(target)
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise DataError(f"The disk of {folder} is full. Free some space: the same command goes on "
                                f"from {part}") from error
            problems.append(f"{url}: {str(error).strip('<>')}")
    raise DataError(f"Could not download {file.name} ({'; '.join(problems)}). Check the connection and run the same "
                    f"command again, or get the file by other means and put it at {target}")


def fetch(name: str, folder: Path) -> None:
    """Brings a data set's files into `folder`, where they are missing. Raises DataError."""
    for file in SOURCES[name]:
        there = [given for given in file.gives if (folder / given).exists()]
        if len(there) == len(file.gives):
            continue
        if there:
            raise DataError(f"{folder} has {brief(there)} already, but not all of {brief(file.gives)}. To get the "
                            f"public text, move what is there away; nothing was changed")
        path = download(file, folder)
        if file.unpack is not None:
            install(partial(file.unpack, path), file.gives, folder)
            path.unlink()


def install(write: Callable[[Path], None], names: tuple[str, ...], folder: Path) -> None:
    """Has `names` written in a temporary folder beside, then moves them into place."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as temporary:
        write(Path(temporary))
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(temporary) / name).replace(folder / name)


def brief(names: Sequence[str]) -> str:
    """A few of them, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _get(url: str, part: Path, size: int | None) -> None:
    """Completes `part` from `url`; goes on by itself after a cut connection as long as each try brings more."""
    while (had := _size(part)) != size:
        try:
            _get_rest(url, part, size)
            return
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "code", None) == 416 and had:   # as long as the file or longer, and not the file
                part.unlink()
            elif _size(part) <= had:
                raise


def _get_rest(url: str, part: Path, size: int | None) -> None:
    have = _size(part)
    headers = {"User-Agent": "txl-data/1"}          # wikitext.smerity.com answers 403 to urllib's own name
    request = urllib.request.Request(url, headers=headers | ({"Range": f"bytes={have}-"} if have else {}))
    with urllib.request.urlopen(request, timeout=30) as response:
        if response.status != 206:                  # the whole file, whatever was asked
            have = 0
        length = response.headers["Content-Length"]
        total = have + int(length) if length else size
        if size is not None and total != size:
            raise OSError(f"it has {total:,} bytes there and not {size:,}")
        part.parent.mkdir(parents=True, exist_ok=True)
        progress = _Progress(part.stem, have, total)
        with open(part, "ab" if have else "wb") as out:
            while block := response.read(1 << 16):
                out.write(block)
                have += len(block)
                progress.show(have)
        progress.end(have)
    if total is not None and have < total:
        raise ConnectionError(f"the connection ended after {have:,} of {total:,} bytes")


class _Progress:
    """A bar on a terminal's stderr; elsewhere a line at each quarter."""

    def __init__(self, name: str, have: int, total: int | None):
        self.name, self.first, self.total = name, have, total
        self.began = self.shown = time.monotonic()
        self.quarter = 4 * have // total if total else 0

    def show(self, have: int) -> None:
        now, quarter = time.monotonic(), 4 * have // self.total if self.total else 0
        if sys.stderr.isatty():
            if now - self.shown > 0.1:
                self.shown = now
                print(f"\r{self._line(have, now)}\033[K", end="", file=sys.stderr, flush=True)
        elif quarter > self.quarter:
            self.quarter = quarter
            print(self._line(have, now), file=sys.stderr, flush=True)

    def end(self, have: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{self._line(have, time.monotonic())}\033[K", file=sys.stderr)

    def _line(self, have: int, now: float) -> str:
        speed = (have - self.first) / max(now - self.began, 1e-3)
        if not self.total:
            return f"{self.name}  {have / 1e6:.1f} MB  {speed / 1e6:.1f} MB/s"
        minutes, seconds = divmod(round((self.total - have) / max(speed, 1)), 60)
        return (f"{self.name}  {have / self.total:4.0%}  {have / 1e6:.1f}/{self.total / 1e6:.1f} MB  "
                f"{speed / 1e6:.1f} MB/s  ETA {minutes}:{seconds:02}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _checked(path: Path, file: File) -> Path:
    """The path, if its size and digest are the file's; else it is deleted and DataError says so."""
    algorithm, expected = file.digest.split(":")
    digest = hashlib.sha1(b"blob %d\0" % _size(path)) if algorithm == "git" else hashlib.new(algorithm)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() == expected and file.size in (None, _size(path)):
        return path
    message = (f"{path} is not what was published: {_size(path):,} bytes with {algorithm} {digest.hexdigest()}, not "
               f"{expected}. It was deleted: run the same command to download it again")
    path.unlink()
    raise DataError(message)


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Each file of a zip or tar, in its order: name, stream. Raises DataError at a name that points outside."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as z:
                for name in z.namelist():
                    if not _inside(name, archive).endswith("/"):
                        with z.open(name) as stream:
                            yield name, stream
        else:
            with tarfile.open(archive, "r|*") as tar:
                for member in tar:
                    if (content := tar.extractfile(member) if member.isfile() else None) is not None:
                        yield _inside(member.name, archive), content
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive} cannot be unpacked ({error}). Delete it and run the same command again") from error


def _inside(name: str, archive: Path) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise DataError(f"{archive} holds a file named {name!r}, which points outside: nothing was unpacked. Delete "
                        f"the archive, and get it from a place that you trust")
    return name


def _unpack_splits(pattern: str, archive: Path, folder: Path) -> None:
    """Members that match the pattern, whose group is the split."""
    found = set()
    for name, stream in _members(archive):
        if match := re.search(pattern, name):
            found.add(match[1])
            with open(folder / f"{match[1]}.txt", "wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
    _all_found(found == set(SPLITS), archive, "a file for each of train, valid and test")


def _unpack_cut(member: str, archive: Path, folder: Path) -> None:
    """The first 10^8 bytes of Wikipedia, cut as everyone does: 90, 5 and 5 million bytes."""
    size = 0
    for name, stream in _members(archive):
        if name == member:
            for split, millions in zip(SPLITS, (90, 5, 5)):
                with open(folder / f"{split}.txt", "wb") as out:
                    size += sum(out.write(stream.read(1_000_000)) for _ in range(millions))
            size += len(stream.read(1))
    _all_found(size == 100_000_000, archive, f"exactly 100,000,000 bytes in {member}")


def _unpack_lm1b(archive: Path, folder: Path) -> None:
    """The 99 training shards, and of the held-out one the first piece, which is valid and test both."""
    wanted = {*LM1B_SHARDS, LM1B_HELD_OUT}
    for name, stream in _members(archive):
        if (file := "/".join(PurePosixPath(name).parts[-2:])) in wanted:
            (folder / file).parent.mkdir(exist_ok=True)
            with open(folder / file, "wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
            wanted.remove(file)
    _all_found(not wanted, archive, "99 training shards and the first piece of the held-out one")


def _all_found(found: bool, archive: Path, what: str) -> None:
    if not found:
        raise DataError(f"{archive} does not hold {what}. Delete it and run the same command again")


_SMERITY = "https://wikitext.smerity.com"                                # the author's own copy, the same bytes
_METAMIND = "https://s3.amazonaws.com/research.metamind.io/wikitext"     # the first origin, answers 403 since 2024
_OPENAI = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
_WIKITEXT = partial(_unpack_splits, r"/wiki\.(train|valid|test)\.tokens$")

FOLDERS = {"wt103": "data/wikitext-103", "wt2": "data/wikitext-2", "ptb": "data/penn", "enwik8": "data/enwik8",
           "text8": "data/text8", "lm1b": "data/one-billion-words", "stdlib": "data/stdlib", "wiki": "data/wiki",
           "git": "data/git", "gpt2": "data/gpt2"}

SOURCES: dict[str, tuple[File, ...]] = {
    # huggingface/datasets dataset_infos.json; the loaders that pin the MD5 (torchtext: 9ddaacaf..., 542ccefa...) and
    # those that pin the sha256 name the same urls
    "wt103": (File((f"{_SMERITY}/wikitext-103-v1.zip", f"{_METAMIND}/wikitext-103-v1.zip"),
                   "sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590", 190_229_076, _WIKITEXT),),
    "wt2": (File((f"{_SMERITY}/wikitext-2-v1.zip", f"{_METAMIND}/wikitext-2-v1.zip"),
                 "sha256:92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c", 4_475_746, _WIKITEXT),),
    # PaddlePaddle, python/paddle/dataset/imikolov.py (first url) and text/datasets/imikolov.py (second): one MD5
    "ptb": (File(("http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",
                  "https://dataset.bj.bcebos.com/imikolov%2Fsimple-examples.tgz"),
                 "md5:30177ea32e27c525793142b6bf2c8e2d", None,
                 partial(_unpack_splits, r"simple-examples/data/ptb\.(train|valid|test)\.txt$")),),
    # huggingface/datasets dataset_infos.json, and compression benchmarks that pin the sha256
    "enwik8": (File(("http://mattmahoney.net/dc/enwik8.zip", "https://data.deepai.org/enwik8.zip"),
                    "sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc", 36_445_475,
                    partial(_unpack_cut, "enwik8")),),
    # size: TensorFlow's word2vec_basic.py; the sha256 is that of eight public loaders of word vectors
    "text8": (File(("http://mattmahoney.net/dc/text8.zip",),
                   "sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232", 31_344_016,
                   partial(_unpack_cut, "text8")),),
    # tensorflow/datasets url_checksums/lm1b.txt and huggingface/datasets dataset_infos.json; of the vocabulary, the
    # blob's name in the repository that publishes it
    "lm1b": (File(("http://www.statmt.org/lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",),
                  "sha256:01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e", 1_792_209_805,
                  _unpack_lm1b, (*LM1B_SHARDS, LM1B_HELD_OUT)),
             File(("https://github.com/rafaljozefowicz/lm/raw/master/1b_word_vocab.txt",),
                  "git:249020af8359cef6aff5ce083bad42bc7cce0715", gives=("1b_word_vocab.txt",))),
    # openai/tiktoken, tiktoken_ext/openai_public.py
    "gpt2": (File((f"{_OPENAI}/encoder.json",), gives=("encoder.json",),
                  digest="sha256:196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783", size=1_042_301),
             File((f"{_OPENAI}/vocab.bpe",), gives=("vocab.bpe",),
                  digest="sha256:1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5", size=456_318)),
}
