"""Texts as tokens: found or written, encoded once, memory-mapped ever after.

    python -m txl.data --dataset=stdlib              # the standard library's source code: nothing to download
    python -m txl.data --dataset=wt103               # downloads 190 MB to data/wikitext-103
    python -m txl.data --dataset=wt103 --dir=/mnt/wt103 --vocab=bpe --n_token=16384
    python -m txl.data --dataset=git --source=~/src  # the source code in a folder, as data/git
    python -m txl.data --dataset=wiki --source=extracted             # Wikipedia, as wikiextractor leaves it
    python -m txl.data --dataset=gpt2                # GPT-2's byte pairs: --set recipe.data.bpe_files=data/gpt2
    python -m txl.data --dataset=wt103 --bpe_files=data/gpt2         # both, and the text as GPT-2's byte pairs

Tokens lie in DIR/tokens/KEY, where KEY names the texts' content, the options that matter and VERSION, so what is
found there is never stale. A text whose size, times and inode are as they were is taken to be as it was.
"""
from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from engine.cli import flag, parse
from engine.values import BadValue, from_json
from txl import options
from txl.config import Data, Dataset
from txl.datasets import FOLDERS, LM1B_HELD_OUT, LM1B_SHARDS, SOURCES, SPLITS, DataError, fetch
from txl.folders import FROM_FOLDERS, write_stdlib, write_texts
from txl.vocab import BpeVocab, ByteVocab, CharVocab, Vocab, WordVocab
from txl.vocab import load as load_vocab

__all__ = ["Corpus", "DataError", "Flags", "load", "main", "prepare", "with_eval_sets"]

VERSION = 1                                       # raised when the same text and options come to give other tokens
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Prepared tokens: one read-only memory map a split, of uint16 where the vocabulary allows, else of int32.

    Evaluation sets are splits too, once `with_eval_sets` has brought them.
    """
    dir: Path
    vocab: Vocab
    splits: dict[str, np.ndarray]
    n_bytes: dict[str, int]                       # of each split's text

    @property
    def n_token(self) -> int:
        return self.vocab.size

    @property
    def fingerprint(self) -> str:
        """Equal for corpora of equal tokens: the name of the texts and options, what tokens mean, and how many."""
        counts = ", ".join(f"{len(ids):,} of {split}" + (f" ({hashlib.sha256(ids.tobytes()).hexdigest()[:16]})"
                                                         if split not in SPLITS else "")
                           for split, ids in self.splits.items())
        return f"{counts} (text {self.dir.name}, vocabulary {self.vocab.hash[:16]})"


def load(data: Data | Path) -> Corpus:
    """The tokens of a data set, prepared first where that is due, or those in a folder that `prepare` returned.

    Raises DataError.
    """
    folder = data if isinstance(data, Path) else prepare(data)
    manifest, vocab = json.loads((folder / "manifest.json").read_text()), load_vocab(folder)
    splits: dict[str, np.ndarray] = {
        split: np.memmap(folder / f"{split}.bin", manifest["dtype"], "r") for split in SPLITS}
    for split, ids in splits.items():
        if manifest.get("written", {}).get(split) == _stat(folder / f"{split}.bin"):
            continue                              # nobody has touched it since, so that it need not be read through
        if not 0 <= ids.min() <= ids.max() < vocab.size:
            raise DataError(f"{folder / split}.bin is damaged: it has a token that is none of the {vocab.size:,} in "
                            f"the vocabulary. Delete {folder} and run the same command again: the text is encoded anew")
    sizes = {split: sum(x["size"] for name, x in manifest["inputs"].items() if _split_of(name) == split)
             for split in SPLITS}
    return Corpus(folder, vocab, splits, sizes)


def with_eval_sets(corpus: Corpus, data: Data) -> Corpus:
    """The corpus with the further texts that `data` names as splits, in memory. Raises DataError."""
    splits, n_bytes = dict(corpus.splits), dict(corpus.n_bytes)
    for name, text in data.eval_paths.items():
        path = Path(text)
        try:
            n_bytes[name] = path.stat().st_size
            pieces = list(corpus.vocab.encode_file(path))
        except OSError as error:
            raise DataError(f"The evaluation set {name} cannot be read: {error}. Put its text at {path}, or change "
                            f"--set recipe.data.eval_sets=NAME=PATH") from error
        if not n_bytes[name]:
            raise DataError(f"{path}, the evaluation set {name}, is empty. Put its text there, or leave it out of "
                            f"recipe.data.eval_sets")
        splits[name] = np.concatenate(pieces).astype(corpus.splits["train"].dtype)
    return replace(corpus, splits=splits, n_bytes=n_bytes)


def prepare(data: Data) -> Path:
    """The folder of the prepared tokens, made first where there is none. Raises DataError, leaving nothing half-made.

    Processes that come at once wait for the first and find its work. Where a text is gone, its tokens are still
    served, with a warning: a machine may have been given only them.
    """
    folder = Path(data.dir)
    with _explained(folder):
        found = _prepared(data)
        if found is None:
            if data.dataset != "stdlib" and _missing(data):
                raise DataError(_missing(data))
            with _locked(folder / "tokens"):
                if data.dataset == "stdlib" and _missing(data):
                    write_stdlib(folder)
                found = _prepared(data) or _build(data, folder / "tokens")
        elif _missing(data):
            log.warning("The tokens prepared earlier will do, but %s", _missing(data))
        _check_size(data, json.loads((found / "manifest.json").read_text())["vocab_size"])
        return found


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m txl.data", about=__doc__, advice=options.advice)
    folder = Path(flags.dir or FOLDERS.get(flags.dataset, "data/text"))
    try:
        with _explained(folder):
            if flags.dataset == "gpt2":
                fetch("gpt2", folder)
                print(f"GPT-2's byte pairs are in {folder}. Use them with --set recipe.data.bpe_files={folder}")
            else:
                data = _usual(flags, folder)
                if data.bpe_files is not None:
                    fetch("gpt2", Path(data.bpe_files))
                if data.dataset in SOURCES and _missing(data):
                    fetch(data.dataset, folder)
                if flags.source is not None:
                    print(_from_source(data, Path(flags.source).expanduser()))
                print(_table(load(data)))
    except (DataError, BadValue) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


@dataclass(frozen=True)
class Flags:
    dataset: Literal[Dataset, "gpt2"] = flag("which text; gpt2: GPT-2's byte pairs")
    dir: str | None = flag("its folder, rather than the usual one under data/", default=None)
    source: str | None = flag("of wiki and git: the folder of files to make the texts of", default=None)
    vocab: Literal["word", "char", "byte", "bpe"] | None = flag("rather than the usual one", default=None)
    n_token: int | None = flag("vocabulary size: made for bpe, 2048 unless given; else checked", default=None)
    bpe_files: str | None = flag("folder of GPT-2's byte pairs, to use them for bpe", default=None)
    word_list: str | None = flag("a file of the words in the order of their ids, rather than counted", default=None)
    lower_case: bool = flag("the text in lower case", default=False)
    min_freq: int = flag("words rarer than this become <unk>", default=0)
    max_size: int | None = flag("only so many of the most frequent words; the rest become <unk>", default=None)


def _usual(flags: Flags, folder: Path) -> Data:
    usual = {"enwik8": "byte", "text8": "byte", "stdlib": "bpe", "wiki": "bpe", "git": "bpe"}.get(flags.dataset, "word")
    vocab = flags.vocab or ("bpe" if flags.bpe_files else usual)
    n_token = flags.n_token
    if n_token is None and vocab == "bpe":
        n_token = 50257 if flags.bpe_files else 2048
    if flags.source is not None and flags.dataset not in FROM_FOLDERS:
        raise BadValue(f"--source is for {' and '.join(FROM_FOLDERS)}, which are made of a folder's files, not for "
                       f"{flags.dataset}")
    given = {name: x for name, x in vars(flags).items() if name != "source"}
    return from_json(Data, given | {"dir": str(folder), "vocab": vocab, "n_token": n_token})


def _from_source(data: Data, source: Path) -> str:
    """Makes the texts of the files in `source`, unless they are there; what was done, in words."""
    folder = Path(data.dir)
    if _texts(data):
        return (f"{folder} has texts already, so {source} was not read. To make them anew, delete "
                f"{', '.join(str(path) for paths in _texts(data).values() for path in paths)}")
    return write_texts(data.dataset, source, folder)


def _table(corpus: Corpus) -> str:
    rows = [(split, f"{corpus.n_bytes[split]:,}", f"{len(ids):,}") for split, ids in corpus.splits.items()]
    lines = [f"{split:<6}{size:>15}{tokens:>15}" for split, size, tokens in [("split", "bytes", "tokens"), *rows]]
    return "\n".join([*lines, f"{corpus.n_token:,} tokens in the {corpus.vocab.kind} vocabulary; all in {corpus.dir}"])


def _texts(data: Data) -> dict[str, tuple[Path, ...]]:
    """The files of each split that is there, under the names they have here, had in WikiText, or have in lm1b."""
    folder = Path(data.dir)
    there = {entry.name for entry in os.scandir(folder)} if folder.exists() else set()
    found: dict[str, tuple[Path, ...]] = {
        split: (folder / name,) for split in SPLITS
        for name in (f"wiki.{split}.tokens", f"{split}.txt") if name in there}
    if data.dataset == "lm1b":
        theirs = {"train": LM1B_SHARDS, "valid": (LM1B_HELD_OUT,), "test": (LM1B_HELD_OUT,)}
        found = {split: tuple(folder / name for name in names) for split, names in theirs.items()
                 if all((folder / name).exists() for name in names)} | found
    return found


def _missing(data: Data) -> str:
    """What to tell the user of the texts that are not there; empty if all are."""
    lacking = [f"{split}.txt" for split in SPLITS if split not in _texts(data)]
    if not lacking:
        return ""
    where = "" if data.dir == FOLDERS.get(data.dataset) else f" --dir={data.dir}"
    command = f"python -m txl.data --dataset={data.dataset}{where}"
    remedy = (f"Make them of a folder's files with: {command} --source=FOLDER" if data.dataset in FROM_FOLDERS else
              f"Get them with: {command}" if data.dataset in FOLDERS else
              "Put them there, or name their folder with --set recipe.data.dir=FOLDER")
    others = "the benchmark's folders, whole" if data.dataset == "lm1b" else "by their old names, wiki.SPLIT.tokens"
    return f"{data.dir} lacks {', '.join(lacking)} (or, {others}). {remedy}"


def _inputs(data: Data) -> dict[str, Path]:
    """Every file that the tokens depend on and that exists."""
    inputs = {f"{split}/{path.name}" if len(paths) > 1 else split: path
              for split, paths in _texts(data).items() for path in paths}
    closed = Path(data.word_list or Path(data.dir) / "1b_word_vocab.txt")
    if data.vocab == "word" and (data.word_list or (data.dataset == "lm1b" and closed.exists())):
        inputs["closed"] = closed
    if data.vocab == "bpe" and data.bpe_files is not None:
        inputs |= {name: Path(data.bpe_files) / name for name in ("encoder.json", "vocab.bpe")}
        if not all(path.exists() for path in inputs.values()):
            raise DataError(f"{data.bpe_files} lacks encoder.json or vocab.bpe. Get GPT-2's with: "
                            f"python -m txl.data --dataset=gpt2 --dir={data.bpe_files}")
    return inputs


def _options(data: Data) -> dict[str, Any]:
    """What, besides the inputs, the tokens depend on."""
    if data.vocab == "byte":
        return {"vocab": "byte"}
    if data.vocab == "bpe":
        return {"vocab": "bpe", "n_token": None if data.bpe_files is not None else data.n_token}
    counted = SPLITS if data.vocab == "char" or data.dataset in ("ptb", "wt2", "enwik8", "text8") else SPLITS[:1]
    rules = {"lower_case": data.lower_case or data.dataset == "ptb", "min_freq": data.min_freq,
             "max_size": data.max_size, "counted": list(counted)}
    return {"vocab": data.vocab} | rules | ({"end": data.end_of_line} if data.vocab == "word" else {})


def _prepared(data: Data) -> Path | None:
    """The newest folder of tokens whose options are these and whose inputs, those that exist, have not been touched."""
    now = {name: _stat(path) for name, path in _inputs(data).items()}
    folders = [path.parent for path in (Path(data.dir) / "tokens").glob("[!.]*/manifest.json")]
    for folder in sorted(folders, key=lambda f: (f / "manifest.json").stat().st_mtime_ns, reverse=True):
        manifest = _manifest(folder)
        if manifest is not None and (manifest["version"], manifest["options"]) == (VERSION, _options(data)):
            then = {name: x["stat"] for name, x in manifest["inputs"].items()
                    if name in now or _split_of(name) not in SPLITS}
            if then == now:
                return folder
    return None


def _manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder of tokens says of itself; None if a file of it is missing or not as long as it was."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        return manifest if whole else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):       # also one that is not a manifest
        return None


def _build(data: Data, tokens: Path) -> Path:
    """Makes the folder of tokens, or notes the new times of texts whose content it has already. Holds the lock."""
    inputs = _inputs(data)
    stats = {name: _stat(path) for name, path in inputs.items()}
    for name, path in inputs.items():
        if not stats[name][0]:
            raise DataError(f"{path} is empty. Put the text there, or delete the file and get it anew")
    hashes = {name: _sha256(path) for name, path in inputs.items()}
    key = hashlib.sha256(json.dumps([VERSION, _options(data), hashes], sort_keys=True).encode()).hexdigest()[:16]
    final, temporary = tokens / key, tokens / ".building"
    shutil.rmtree(temporary, ignore_errors=True)              # of a process that was killed: the lock is ours
    try:
        manifest = _manifest(final)
        if manifest is None:
            temporary.mkdir()
            manifest = {"version": VERSION, "options": _options(data)} | _write_tokens(data, inputs, temporary)
        if stats != {name: _stat(path) for name, path in inputs.items()}:
            raise DataError(f"A text in {data.dir} changed while it was read. Run the same command again")
        manifest["inputs"] = {name: {"path": str(path), "size": stats[name][0], "stat": stats[name],
                                     "sha256": hashes[name]} for name, path in inputs.items()}
        folder = temporary if temporary.exists() else final
        (folder / ".manifest").write_text(json.dumps(manifest, indent=1))
        (folder / ".manifest").replace(folder / "manifest.json")
        if folder is temporary:
            shutil.rmtree(final, ignore_errors=True)          # damaged, or it would have been found
            temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write_tokens(data: Data, inputs: dict[str, Path], folder: Path) -> dict[str, Any]:
    with TemporaryDirectory(dir=folder) as scratch:
        vocab = _make_vocab(data, inputs, Path(scratch))
        _check_size(data, vocab.size)
        dtype = np.dtype(np.uint16 if vocab.size <= 1 << 16 else np.int32)
        for split in SPLITS:
            with open(folder / f"{split}.bin", "wb") as out:
                for path in _files_of(split, inputs):
                    log.info("Encoding %s", path)
                    for ids in vocab.encode_file(path, Path(scratch)):
                        out.write(ids.astype(dtype, copy=False).data)
                out.flush()
                os.fsync(out.fileno())
    vocab.save(folder)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    return {"dtype": dtype.name, "vocab_size": vocab.size, "vocab_hash": vocab.hash, "files": files,
            "written": {split: _stat(folder / f"{split}.bin") for split in SPLITS},
            "tokens": {split: files[f"{split}.bin"] // dtype.itemsize for split in SPLITS}}


def _make_vocab(data: Data, inputs: dict[str, Path], scratch: Path) -> Vocab:
    options = _options(data)
    if data.vocab == "byte":
        return ByteVocab.make()
    if data.vocab == "bpe":
        return (BpeVocab.train(_files_of("train", inputs), options["n_token"]) if data.bpe_files is None else
                BpeVocab.from_files(Path(data.bpe_files)))
    lower_case, end = options["lower_case"], data.end_of_line
    if "closed" in inputs:
        if data.min_freq or data.max_size is not None:
            raise DataError(f"{inputs['closed']} is the list of the words, so recipe.data.min_freq and max_size choose "
                            f"none: leave them out")
        return WordVocab.closed(inputs["closed"], lower_case=lower_case, end=end)
    counted = [path for split in options["counted"] for path in _files_of(split, inputs)]
    if data.vocab == "char":
        return CharVocab.count(counted, lower_case=lower_case, min_freq=data.min_freq, max_size=data.max_size)
    return WordVocab.count(counted, lower_case=lower_case, end=end, min_freq=data.min_freq, max_size=data.max_size,
                           scratch=scratch)


def _split_of(name: str) -> str:
    """Whose text an input is; of one that is no text, its name."""
    return name.partition("/")[0]


def _files_of(split: str, inputs: dict[str, Path]) -> list[Path]:
    return [path for name, path in inputs.items() if _split_of(name) == split]


def _check_size(data: Data, size: int) -> None:
    if data.n_token not in (None, size):
        raise DataError(f"The {data.vocab} vocabulary of {data.dir} has {size:,} tokens, but data.n_token expects "
                        f"{data.n_token:,}. If this is the text you mean: --set recipe.data.n_token={size}")


def _stat(path: Path) -> list[int]:
    s = path.stat()
    return [s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def _locked(tokens: Path) -> Iterator[None]:
    tokens.mkdir(parents=True, exist_ok=True)
    with open(tokens / ".lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)                         # released when the file closes, however the process ends
        yield


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Whatever the file system refuses, as a DataError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(f"The disk of {folder} is full; nothing half-written was left. Free some space (tokens "
                            f"take up to 4 bytes a word, 8 while they are made) and run the same command "
                            f"again") from error
        raise DataError(f"Cannot prepare {folder}: {error}. Make it readable and writable, or name another folder "
                        f"with --set recipe.data.dir=FOLDER") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
