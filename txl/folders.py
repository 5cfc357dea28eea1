"""Texts made of a folder's files: source code, Wikipedia as extracted, and what every Python brings along.

The SHA-256 of a file's name below the folder decides its split: one in twenty is valid, one in twenty test. So a file
keeps its split whatever comes beside it (the ancestors took the 42nd and the 1337th of the sorted files). Where that
leaves valid or test empty, train gives it the file of its lowest SHA-256. Files stay whole, in the natural order of
their names (2 before 10); a line tells where a file of source code or an article begins.

What is not text is left out and counted: hidden files and folders, links, what cannot be read or is not UTF-8, and of
source code files with a line of more than 740 characters, which machines write.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from txl.datasets import SPLITS, TEXTS, DataError, install

FILE = "\u2131"                                   # the ancestors' symbol of a file


class _LeftOut(Exception):
    """Why a file is no part of a text."""


@dataclass(frozen=True)
class Kind:
    """What a folder's files are: what each becomes, their order, and which of them count. Names are those below it."""
    text: Callable[[PurePath, Path], str]         # of the name and the file; raises _LeftOut
    order: Callable[[PurePath], Any]
    takes: Callable[[PurePath], bool] = lambda name: True
    skips: frozenset[str] = frozenset()           # names of folders


def write_texts(kind: str, source: Path, folder: Path) -> str:
    """Writes train, valid and test.txt into `folder`, of the files in `source`; in words, of which and of which not.

    Raises DataError, and then has written nothing.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder. Name the one whose files are the text: --source=FOLDER")
    rules, left_out, names = _KINDS[kind], Counter[str](), list[PurePath]()
    for name in _files(source, folder, rules, lambda _: left_out.update(["folders that cannot be read"])):
        try:
            rules.text(name, source / name)       # read twice: the split of a few files depends on which they are
            names.append(name)
        except _LeftOut as reason:
            left_out[str(reason)] += 1
    splits = split_of(names, rules.order)
    counted = f"{len(names):,} files, " + ", ".join(f"{len(files):,} for {split}" for split, files in splits.items())
    if left_out:
        counted += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
    if not all(splits.values()):
        raise DataError(f"{source} has too few files of text for train, valid and test: {counted}. Name a folder of "
                        f"more files, or write train, valid and test.txt yourself and use --dataset=text")

    def write(temporary: Path) -> None:
        for split, files in splits.items():
            with open(temporary / f"{split}.txt", "w", encoding="utf-8", newline="\n") as out:
                out.writelines(rules.text(name, source / name) for name in files)
    install(write, TEXTS, folder)
    return f"{folder} is made of {source}: {counted}"


def write_stdlib(folder: Path) -> None:
    """Writes the standard library's own source code, that of the running Python, as train, valid and test.txt.

    Real text without a download: every machine that can run this has it. It is preferred to pydoc's topics for being
    ten times larger, and because identifiers recur over long distances, which is what a memory is for. Its files come
    in the order of the SHA-256 of their names, so the text is the same wherever the Python is.
    """
    root = Path(sysconfig.get_path("stdlib"))
    try:
        write_texts("stdlib", root, folder)
    except DataError as error:
        raise DataError(f"This Python has no source code in {root}. Use one that has (any from python.org, "
                        f"Debian or conda), or another data set") from error


def split_of(names: Iterable[PurePath], order: Callable[[PurePath], Any]) -> dict[str, list[PurePath]]:
    """The files of each split, in order."""
    splits: dict[str, list[PurePath]] = {split: [] for split in SPLITS}
    for name in sorted(names, key=_digest):
        splits[{0: "valid", 1: "test"}.get(int(_digest(name)[:8], 16) % 20, "train")].append(name)
    for split in ("valid", "test"):
        if not splits[split]:
            splits[split], splits["train"] = splits["train"][:1], splits["train"][1:]
    return {split: sorted(files, key=order) for split, files in splits.items()}


def _files(source: Path, but: Path, rules: Kind, unreadable: Callable[[OSError], None]) -> Iterator[PurePath]:
    """Regular files below `source` that are not hidden, links, or in the folder that the texts go to."""
    for folder, folders, files in os.walk(source, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in rules.skips
                      and not (but.exists() and but.samefile(Path(folder, name)))]
        for file in files:
            name = Path(folder, file).relative_to(source)
            regular = stat.S_ISREG((source / name).lstat().st_mode)
            if regular and not file.startswith(".") and rules.takes(name):
                yield name


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise _LeftOut("that cannot be read") from error
    except UnicodeDecodeError as error:
        raise _LeftOut("that are not UTF-8") from error
    if "\0" in text:
        raise _LeftOut("that are binary")
    if not text.strip():
        raise _LeftOut("that are empty")
    return text


def _standard_library(name: PurePath, path: Path) -> str:
    return f"# Lib/{name.as_posix()}\n{_read(path).rstrip()}\n\n"


def _source_code(name: PurePath, path: Path) -> str:
    """FILE and the file's name stand above it, so that it can be told where a file begins, also in generated text."""
    if not name.as_posix().isprintable():
        raise _LeftOut("whose names cannot be printed")
    text = _read(path)
    if max(map(len, text.split("\n"))) > 740:
        raise _LeftOut("with a line of more than 740 characters")
    return f"{FILE} {name.as_posix()}\n{text.rstrip()}\n\n"


def _wikipedia(name: PurePath, path: Path) -> str:
    """The articles of wikiextractor's JSON lines or <doc> elements, each under its title; any other text as it is."""
    text = _read(path)
    articles = _in_json(text, path) or _DOC.findall(text)
    return "".join(_article(*article) for article in articles) if articles else f"{text.rstrip()}\n\n"


_DOC = re.compile(r'^<doc [^\n]*title="([^\n]*)">\n(.*?)^</doc>', re.MULTILINE | re.DOTALL)


def _in_json(text: str, path: Path) -> list[tuple[str, str]]:
    articles = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            article = json.loads(line) if line.strip() else {"text": ""}
            articles.append((str(article.get("title") or ""), str(article["text"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == 1:
                return []                         # no JSON lines at all
            raise DataError(f"{path}, line {number} is not JSON with a text, as the lines before it are. If the file "
                            f"was cut short, get it anew; else move it away") from error
    return articles


def _article(title: str, text: str) -> str:
    body = text.strip().removeprefix(f"{title}\n").strip()        # which some versions begin with the title
    heading = f"= {title} =\n\n" if title else ""
    return f"{heading}{body}\n\n" if body else ""


def _natural(name: PurePath) -> list[list[int | str]]:
    """Numbers in names count as numbers."""
    return [[int(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d+)", part))] for part in name.parts]


def _digest(name: PurePath) -> str:
    return hashlib.sha256(name.as_posix().encode(errors="surrogateescape")).hexdigest()


def _of_the_library(name: PurePath) -> bool:
    """Tests, tools with a life of their own, and machine-made tables stay out."""
    return (name.suffix == ".py" and name.as_posix() not in _TABLES
            and not name.name.startswith("_sysconfigdata"))


_SKIPPED = frozenset({"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__",
                      "turtledemo", "ensurepip", "encodings", "pydoc_data"})
_TABLES = {"html/entities.py", "re/_casefix.py", "stringprep.py"}

FROM_FOLDERS = {"wiki": Kind(_wikipedia, _natural), "git": Kind(_source_code, _natural)}
_KINDS = FROM_FOLDERS | {"stdlib": Kind(_standard_library, _digest, _of_the_library, _SKIPPED)}
