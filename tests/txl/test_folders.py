"""Texts made of a folder's files: which file goes where, and what is left out."""
from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from pathlib import Path, PurePath

import pytest

from txl import datasets
from txl.data import Data, load, main
from txl.datasets import SPLITS, DataError
from txl.folders import split_of, write_stdlib, write_texts


def source_of(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def texts(folder: Path) -> dict[str, str]:
    return {split: (folder / f"{split}.txt").read_text(encoding="utf-8") for split in SPLITS}


def split_by_hand(name: str) -> str:
    number = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 20
    return "valid" if number == 0 else "test" if number == 1 else "train"


def test_a_folder_of_source_code_becomes_whole_files_in_natural_order_by_split(tmp_path):
    files = {f"pkg{i % 3}/m{i}.py": f"x = {i}\n\n" for i in range(120)}
    report = write_texts("git", source_of(tmp_path / "src", files), tmp_path / "git")
    by_hand = dict.fromkeys(SPLITS, "")
    for package in range(3):
        for i in range(package, 120, 3):                          # 2 before 10
            by_hand[split_by_hand(f"pkg{package}/m{i}.py")] += f"\u2131 pkg{package}/m{i}.py\nx = {i}\n\n"
    assert texts(tmp_path / "git") == by_hand
    assert "left out" not in report


def test_what_is_not_text_is_left_out_and_counted(tmp_path):
    files = {"a.py": "a", "b.py": "b", "c/d.txt": "d\r\ne", "latin.py": b"\xe9", "image.png": b"a\0b", "empty": "",
             "blank": " \n", "min.js": "x" * 741, "wide.js": "x" * 740, ".git/config": "hidden", "c/.env": "hidden"}
    source = source_of(tmp_path / "src", files)
    (source / "link.py").symlink_to(source / "a.py")
    source_of(source, {"data/git/train.txt": "an earlier one"})   # the folder it goes to is no part of it
    for split in ("valid", "test"):
        source_of(source, {f"data/git/{split}.txt": "an earlier one"})
    report = write_texts("git", source, source / "data" / "git")
    every = "".join(texts(source / "data" / "git").values())
    assert sorted(re.findall(r"^\u2131 (.*)$", every, re.M)) == ["a.py", "b.py", "c/d.txt", "wide.js"]
    assert "d\ne\n" in every
    counted, _, left_out = report.partition("; left out: ")
    assert counted.endswith("4 files, 2 for train, 1 for valid, 1 for test")
    assert set(left_out.split(", ")) == {"1 that are binary", "1 that are not UTF-8", "2 that are empty",
                                         "1 with a line of more than 740 characters"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_cannot_be_read_is_left_out_and_counted(tmp_path):
    source = source_of(tmp_path / "src", {f"{x}.py": x for x in "abcd"})
    (source / "a.py").chmod(0)
    assert "1 that cannot be read" in write_texts("git", source, tmp_path / "git")


def test_wikipedia_comes_as_wikiextractor_writes_it_or_as_plain_text(tmp_path):
    def line(title, text):
        return json.dumps({"id": "1", "title": title, "text": text}, ensure_ascii=False) + "\n"
    files = {"AA/wiki_2": line("Cat", "Cat\n\nA cat\u2028is.") + line("Empty", "") + line("Dog", "A dog."),
             "AA/wiki_10": '<doc id="1" url="u" title="A "B" C">\nA "B" C\n\nIt is.\n</doc>\n'
                           '<doc id="2" title="D">\nE\n</doc>\n',
             "BB/plain.txt": "{ no json\nlines\n\n"}
    report = write_texts("wiki", source_of(tmp_path / "src", files), tmp_path / "wiki")
    assert sorted(texts(tmp_path / "wiki").values()) == sorted([
        "= Cat =\n\nA cat\u2028is.\n\n= Dog =\n\nA dog.\n\n", '= A "B" C =\n\nIt is.\n\n= D =\n\nE\n\n',
        "{ no json\nlines\n\n"])
    assert report.endswith("3 files, 1 for train, 1 for valid, 1 for test")


def test_an_extract_that_was_cut_short_is_an_error_with_its_place(tmp_path):
    files = {f"wiki_{i}": '{"text": "whole"}\n' for i in range(9)} | {"wiki_9": '{"text": "whole"}\n{"text": "cu'}
    with pytest.raises(DataError, match=r"wiki_9, line 2 is not JSON .*cut short, get it anew"):
        write_texts("wiki", source_of(tmp_path / "src", files), tmp_path / "wiki")
    assert not (tmp_path / "wiki").exists()


def test_too_few_files_for_three_splits_are_an_error(tmp_path):
    with pytest.raises(DataError, match=r"too few files of text .*: 2 files, 0 for train, 1 .* --dataset=text"):
        write_texts("git", source_of(tmp_path / "src", {"a.py": "a", "b.py": "b"}), tmp_path / "git")
    with pytest.raises(DataError, match=r"elsewhere is not a folder.*--source=FOLDER"):
        write_texts("git", tmp_path / "elsewhere", tmp_path / "git")


@pytest.mark.parametrize("count", range(3, 60, 7))
def test_no_split_is_empty_and_every_file_is_in_one(count):
    names = [PurePath(f"f{i}") for i in range(count)]
    splits = split_of(names, str)
    assert all(splits.values())
    assert sorted(name for files in splits.values() for name in files) == sorted(names)


def test_the_command_makes_texts_and_tokens_of_a_folder_and_says_what_it_did(tmp_path, capsys):
    source = source_of(tmp_path / "src", {f"m{i}.py": f"def f{i}():\n    return {i}\n" for i in range(30)})
    flags = ["--dataset=git", f"--dir={tmp_path / 'git'}", "--vocab=char"]
    assert main(flags) == 1
    assert f"--dataset=git --dir={tmp_path / 'git'} --source=FOLDER" in capsys.readouterr().err
    assert main([*flags, f"--source={source}"]) == 0
    assert f"is made of {source}: " in capsys.readouterr().out
    corpus = load(Data("git", str(tmp_path / "git"), vocab="char"))
    for split, text in texts(tmp_path / "git").items():
        assert corpus.vocab.decode(corpus.splits[split]) == text
    assert main([*flags, f"--source={source}"]) == 0
    assert f"has texts already, so {source} was not read. To make them anew, delete" in capsys.readouterr().out
    assert main(["--dataset=wt2", f"--source={source}", f"--dir={tmp_path / 'wt2'}"]) == 1
    assert "--source is for wiki and git" in capsys.readouterr().err


def test_the_source_code_of_the_running_python_is_a_text(tmp_path):
    """`git` of a real folder: a package of the standard library with binary neighbours."""
    source = Path(sysconfig.get_path("stdlib")) / "json"
    report = write_texts("git", source, tmp_path / "git")
    every = "".join(texts(tmp_path / "git").values())
    for path in source.glob("*.py"):
        assert f"\u2131 {path.name}\n{path.read_text().rstrip()}\n\n" in every
    assert "left out" not in report or "not UTF-8" in report       # compiled files, where there are any


def test_the_standard_librarys_text_is_the_same_every_time(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    write_stdlib(first)
    write_stdlib(second)
    assert sorted(p.name for p in first.iterdir()) == ["test.txt", "train.txt", "valid.txt"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in datasets.TEXTS)


def test_the_standard_library_is_split_by_whole_files(tmp_path):
    write_stdlib(tmp_path)
    root, names, sizes = Path(sysconfig.get_path("stdlib")), {}, {}
    for name in datasets.TEXTS:
        text = (tmp_path / name).read_text(encoding="utf-8")
        names[name], sizes[name] = re.findall(r"^# Lib/(\S+)\n", text, re.M), len(text)
        for file in names[name]:
            source = (root / file).read_text(encoding="utf-8").rstrip()
            assert f"# Lib/{file}\n{source}\n" in text
    every = [file for files in names.values() for file in files]
    assert len(every) == len(set(every)) > 200
    assert "json/decoder.py" in every
    assert not [file for file in every if re.search(r"(^|/)(tests?|idlelib|site-packages)/", file)]
    assert .03 < sizes["valid.txt"] / sum(sizes.values()) < .1
    assert .03 < sizes["test.txt"] / sum(sizes.values()) < .1


def test_a_files_split_depends_on_its_name_alone():
    names = [PurePath(f"m{i}.py") for i in range(400)]
    before = split_of(names, str)
    after = split_of([PurePath("other.py"), *reversed(names[8:])], str)
    assert all(len(files) > 8 for files in before.values())
    gone, new = set(names[:8]), {PurePath("other.py")}
    assert {split: set(files) - new for split, files in after.items()} == {
        split: set(files) - gone for split, files in before.items()}


def test_a_python_without_sources_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "empty"))
    with pytest.raises(DataError, match="no source code"):
        write_stdlib(tmp_path / "stdlib")
    assert not (tmp_path / "stdlib").exists()
