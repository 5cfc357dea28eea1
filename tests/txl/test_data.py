"""Prepared tokens: never stale, never half-made, made once however many ask."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from txl import data, datasets, folders
from txl.data import Data, DataError, load, main, prepare, with_eval_sets
from txl.datasets import LM1B_HELD_OUT, LM1B_SHARDS
from txl.vocab import WordVocab

TEXTS = {"train": "the cat sat\n\nthe dog\n", "valid": "the dog sat\n", "test": "a cat\na dog\n"}


@pytest.fixture
def folder(tmp_path):
    for split, text in TEXTS.items():
        (tmp_path / f"{split}.txt").write_text(text)
    (tmp_path / "train.txt").write_text(TEXTS["train"] + "a\n")
    return tmp_path


def words(folder, **options) -> Data:
    return Data(**{"dataset": "text", "dir": str(folder), **options})


def as_words(corpus, split: str) -> str:
    return corpus.vocab.decode(corpus.splits[split])


def leftovers(folder) -> list[str]:
    """What lies in tokens/ besides whole folders and the lock."""
    return [p.name for p in (folder / "tokens").glob("*") if p.name != ".lock" and not (p / "manifest.json").exists()]


def test_tokens_are_those_of_a_slow_derivation(folder):
    corpus = load(words(folder))
    lines = {split: [line.split() for line in (folder / f"{split}.txt").read_text().splitlines()] for split in TEXTS}
    counted = Counter(word for line in lines["train"] for word in line)
    symbols = ["<eos>", *(word for word, _ in counted.most_common())]
    for split in TEXTS:
        assert corpus.splits[split].tolist() == [symbols.index(w) for line in lines[split] for w in [*line, "<eos>"]]
        assert corpus.n_bytes[split] == (folder / f"{split}.txt").stat().st_size
    assert corpus.n_token == len(symbols)


def test_splits_are_read_only_memory_maps_of_the_smaller_type_that_fits(folder):
    ids = load(words(folder)).splits["train"]
    assert isinstance(ids, np.memmap)
    assert (ids.dtype, ids.flags.writeable) == (np.uint16, False)
    (folder / "train.txt").write_text(" ".join(map(str, range(70_000))) + " the a cat dog sat\n")
    corpus = load(words(folder))
    assert corpus.splits["train"].dtype == np.int32
    assert corpus.splits["train"].max() == corpus.n_token - 1 == 70_005


def test_a_second_time_nothing_is_read_or_made(folder, monkeypatch):
    first = prepare(words(folder))
    monkeypatch.setattr(data, "_build", lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(WordVocab, "_words", property(lambda _: pytest.fail("words read before they were needed")))
    assert prepare(words(folder)) == first
    assert load(words(folder)).n_token == load(first).n_token == 6


def test_a_changed_text_of_the_same_size_is_encoded_anew(folder):
    before = load(words(folder))
    (folder / "test.txt").write_text(TEXTS["test"].replace("cat", "dog"))
    after = load(words(folder))
    assert as_words(after, "test") == "a dog\na dog\n"
    assert as_words(before, "test") == "a cat\na dog\n"       # who has it open keeps it


def test_a_change_hidden_from_size_and_mtime_is_seen(folder):
    path = folder / "test.txt"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    prepare(words(folder))
    path.write_text(TEXTS["test"].replace("cat", "dog"))
    os.utime(path, ns=times)
    assert as_words(load(words(folder)), "test") == "a dog\na dog\n"


def test_a_touched_text_of_the_same_content_is_read_but_not_encoded_anew(folder, monkeypatch):
    first = prepare(words(folder))
    monkeypatch.setattr(data, "_write_tokens", lambda *_: pytest.fail("encoded again"))
    os.utime(folder / "train.txt", ns=(1, 1))
    assert prepare(words(folder)) == first
    monkeypatch.setattr(data, "_build", lambda *_: pytest.fail("read again"))
    assert prepare(words(folder)) == first


@pytest.mark.parametrize("change", [{"lower_case": True}, {"min_freq": 2}, {"max_size": 3}, {"dataset": "ptb"},
                                    {"vocab": "byte"}, {"vocab": "char"}, {"vocab": "bpe", "n_token": 260}])
def test_another_option_makes_other_tokens_and_leaves_the_first(folder, change):
    (folder / "train.txt").write_text("The the cat sat a dog dog dog\n" * 9)
    first, other = prepare(words(folder)), prepare(words(folder, **change))
    assert first != other
    assert prepare(words(folder)) == first
    assert load(other).splits["train"].tolist() != load(first).splits["train"].tolist()


def test_another_version_of_the_code_makes_the_tokens_anew(folder, monkeypatch):
    first = prepare(words(folder))
    monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    assert prepare(words(folder)) != first


@pytest.mark.parametrize("damage", [lambda p: os.truncate(p / "train.bin", 3), lambda p: (p / "vocab.txt").unlink(),
                                    lambda p: (p / "manifest.json").write_text("{\"ver")])
def test_damaged_tokens_are_made_anew(folder, damage):
    path = prepare(words(folder))
    damage(path)
    assert as_words(load(words(folder)), "train") == (folder / "train.txt").read_text()
    assert leftovers(folder) == []


def test_ptb_and_wt2_count_all_three_texts_and_ptb_in_lower_case(folder):
    (folder / "valid.txt").write_text("The new Word\n")
    assert "Word" in load(words(folder, dataset="wt2")).vocab.content().split("\n")
    assert "word" in load(words(folder, dataset="ptb")).vocab.content().split("\n")
    with pytest.raises(DataError, match=r"'The' of .*valid.txt, line 1, is not in the vocabulary"):
        load(words(folder))
    assert leftovers(folder) == []


def test_the_billion_words_use_their_closed_vocabulary_once_it_is_there(folder):
    assert as_words(load(words(folder, dataset="lm1b")), "valid").split() == ["the", "dog", "sat"]
    (folder / "1b_word_vocab.txt").write_text("<S>\n<UNK>\ndog\n")
    assert load(words(folder, dataset="lm1b")).splits["valid"].tolist() == [1, 2, 1, 0]


def test_the_billion_words_are_read_from_their_shards(tmp_path):
    """In the order of the names; valid and test are the same file. With a shard missing nothing is made."""
    for i, name in enumerate([*LM1B_SHARDS, LM1B_HELD_OUT]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"shard {i}\n<unk> {i}" + "\n" * (i % 2))
    data = Data("lm1b", str(tmp_path))
    corpus = load(data)
    assert as_words(corpus, "train") == "".join(f"shard {i}\n<unk> {i}\n" for i in range(99))
    assert as_words(corpus, "valid") == as_words(corpus, "test") == "shard <unk>\n<unk> <unk>\n"
    assert corpus.n_bytes["train"] == sum((tmp_path / name).stat().st_size for name in LM1B_SHARDS)
    assert prepare(data) == corpus.dir
    (tmp_path / LM1B_SHARDS[3]).write_text("shard 4\nmore")      # of as many bytes
    assert prepare(data) != corpus.dir
    (tmp_path / LM1B_SHARDS[3]).unlink()
    with pytest.raises(DataError, match=r"lacks train.txt \(or, the benchmark's folders, whole\). Get them"):
        prepare(replace(data, vocab="byte"))


def test_words_of_a_list_are_not_chosen_by_frequency(folder):
    (folder / "words").write_text("<eos>\nthe\n<unk>\n")
    with pytest.raises(DataError, match=r"words is the list of the words, so recipe\.data\.min_freq"):
        load(words(folder, word_list=str(folder / "words"), min_freq=2))
    with pytest.raises(ValueError, match="lower_case and max_size is for a word or char vocabulary"):
        words(folder, vocab="byte", lower_case=True, max_size=3)


def test_characters_are_of_all_three_texts(folder):
    corpus = load(words(folder, vocab="char"))
    assert {split: as_words(corpus, split) for split in TEXTS} == {**TEXTS, "train": TEXTS["train"] + "a\n"}
    assert corpus.n_token == len(set("".join(TEXTS.values())))


def test_tokens_that_none_of_the_vocabulary_is_are_an_error_with_what_to_do(folder):
    """Of a damaged file whose length is right."""
    made = prepare(words(folder))
    (made / "test.bin").write_bytes(b"\xff" * (made / "test.bin").stat().st_size)
    with pytest.raises(DataError, match=rf"test.bin is damaged.*Delete {made} and run the same command again"):
        load(words(folder))


def test_tokens_that_nobody_has_touched_are_not_read_through(folder, monkeypatch):
    made = prepare(words(folder))
    monkeypatch.setattr(np.memmap, "max", lambda *_: pytest.fail("read through"))
    assert len(load(made).splits["train"]) == 10
    shutil.copytree(made, folder / "copy")                    # of which nobody knows how it was made
    with pytest.raises(pytest.fail.Exception, match="read through"):
        load(folder / "copy")


def test_evaluation_sets_are_splits_in_the_same_vocabulary(folder, tmp_path):
    (tmp_path / "more").write_text("a dog\nsat")
    data = words(folder, eval_sets=(f"more={tmp_path / 'more'}", f"again={folder / 'valid.txt'}"))
    corpus = with_eval_sets(load(data), data)
    assert as_words(corpus, "more") == "a dog\nsat\n"
    assert corpus.splits["again"].tolist() == corpus.splits["valid"].tolist()
    assert (corpus.splits["more"].dtype, corpus.n_bytes["more"]) == (np.uint16, 9)
    assert corpus.dir == load(words(folder)).dir                  # the tokens of the text are not made again
    (tmp_path / "more").write_text("a cat\nsat")
    assert with_eval_sets(load(data), data).fingerprint != corpus.fingerprint


@pytest.mark.parametrize(("text", "said"), [
    (None, r"The evaluation set more cannot be read: .*No such file.* --set recipe.data.eval_sets=NAME=PATH"),
    ("", r"more, the evaluation set more, is empty"), ("a\nzebra", r"'zebra' of .*more, line 2, is not in the vocab")])
def test_an_evaluation_set_that_cannot_be_scored_is_an_error(folder, tmp_path, text, said):
    if text is not None:
        (tmp_path / "more").write_text(text)
    data = words(folder, eval_sets=(f"more={tmp_path / 'more'}",))
    with pytest.raises(DataError, match=said):
        with_eval_sets(load(data), data)


def test_wikitexts_own_file_names_are_found(folder):
    for split in TEXTS:
        (folder / f"{split}.txt").rename(folder / f"wiki.{split}.tokens")
    assert as_words(load(words(folder)), "valid") == TEXTS["valid"]


def test_tokens_whose_texts_are_gone_are_still_served_with_a_warning(folder, caplog):
    first = prepare(words(folder))
    (folder / "train.txt").unlink()
    assert prepare(words(folder)) == first
    assert "lacks train.txt" in caplog.text
    (folder / "valid.txt").write_text("changed\n")            # but not beside a text that is another
    with pytest.raises(DataError, match=r"lacks train\.txt"):
        prepare(words(folder))


def test_a_missing_text_is_an_error_with_the_command_that_gets_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"lacks train.txt, valid.txt, test.txt .*python -m txl.data --dataset=wt103$"):
        prepare(Data("wt103", "data/wikitext-103"))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "train.txt").write_text("a\n")
    with pytest.raises(DataError, match=rf"lacks valid.txt, test.txt .*--dataset=wt103 --dir={tmp_path}$"):
        prepare(Data("wt103", str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["train.txt"]


def test_an_empty_text_is_an_error(folder):
    (folder / "valid.txt").write_text("")
    with pytest.raises(DataError, match=r"valid.txt is empty"):
        prepare(words(folder))


def test_a_text_that_is_not_utf8_is_an_error_with_its_place_and_fine_as_bytes(folder):
    (folder / "valid.txt").write_bytes(b"the\ndog \xe9\n")
    with pytest.raises(DataError, match=r"valid.txt is not UTF-8 at byte 8 \(line 2\)"):
        prepare(words(folder))
    assert leftovers(folder) == []
    assert load(words(folder, vocab="byte")).splits["valid"].tolist() == list(b"the\ndog \xe9\n")


def test_a_vocabulary_of_another_size_than_expected_is_an_error_new_or_cached(folder):
    for _ in range(2):
        with pytest.raises(DataError, match=r"has 6 tokens, but data.n_token expects 267,735.*n_token=6"):
            prepare(words(folder, n_token=267735))
        assert leftovers(folder) == []
        prepare(words(folder, n_token=6))


def test_missing_byte_pair_files_are_an_error_with_the_command_that_gets_them(folder):
    with pytest.raises(DataError, match=r"python -m txl.data --dataset=gpt2 --dir=nowhere"):
        prepare(words(folder, vocab="bpe", n_token=50257, bpe_files="nowhere"))


def test_a_full_disk_is_an_error_that_leaves_nothing(folder, monkeypatch):
    def full(self, path, scratch):
        yield np.zeros(9, np.int32)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(WordVocab, "encode_file", full)
    with pytest.raises(DataError, match=r"disk .* is full"):
        prepare(words(folder))
    assert leftovers(folder) == []


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=r"Cannot prepare .*Not a directory"):
        prepare(words(tmp_path / "file"))
    assert main(["--dataset=wt2", f"--dir={tmp_path / 'file'}"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_text_that_changes_while_it_is_read_is_an_error(folder, monkeypatch):
    encode = WordVocab.encode_file

    def meddle(self, path, scratch):
        (folder / "test.txt").write_text("a\n")
        return encode(self, path, scratch)
    monkeypatch.setattr(WordVocab, "encode_file", meddle)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(words(folder))
    assert leftovers(folder) == []


def child(program: str, folder) -> subprocess.Popen:
    program = f"import sys; from txl import data; from txl.data import *; folder = sys.argv[1]\n{program}"
    return subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent.parent)})


def test_processes_that_come_at_once_share_one_result(folder):
    (folder / "train.txt").write_text("the cat sat a dog\n" * 50_000)
    program = ("write = data._write_tokens\n"
               "data._write_tokens = lambda *x: (print('made'), write(*x))[1]\n"
               "print(prepare(data.Data('text', folder)))")
    outputs = [p.communicate()[0].split() for p in [child(program, folder) for _ in range(3)]]
    assert sorted(map(len, outputs)) == [1, 1, 2]             # one says 'made' before its folder
    assert {output[-1] for output in outputs} == {str(prepare(words(folder)))}


def test_a_killed_encode_leaves_nothing_that_is_served(folder):
    program = ("import time\n"
               "def slow(self, path, scratch):\n"
               "    print('encoding', flush=True)\n"
               "    yield data.np.zeros(9, 'int32')\n"
               "    time.sleep(60)\n"
               "data.WordVocab.encode_file = slow\n"
               "prepare(data.Data('text', folder))")
    process = child(program, folder)
    assert process.stdout.readline() == "encoding\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert leftovers(folder) == [".building"]
    assert as_words(load(words(folder)), "train") == (folder / "train.txt").read_text()
    assert leftovers(folder) == []


def test_a_folder_that_was_never_moved_into_place_is_not_served(folder):
    first = prepare(words(folder))
    first.rename(folder / "tokens" / ".building")             # killed just before the end
    assert prepare(words(folder)) == first
    assert [p.name for p in (folder / "tokens").iterdir() if p.is_dir()] == [first.name]


def test_the_command_writes_the_standard_librarys_text_and_its_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folders, "split_of", lambda names, order: {
        "train": [Path("argparse.py")], "valid": [Path("json/decoder.py")], "test": [Path("abc.py")]})
    assert main(["--dataset=stdlib", f"--dir={tmp_path}", "--n_token=500"]) == 0
    out = capsys.readouterr().out
    corpus = load(Data("stdlib", str(tmp_path), "bpe", 500))
    assert as_words(corpus, "valid") == (tmp_path / "valid.txt").read_text()
    assert f"{len(corpus.splits['train']):,}" in out
    assert "500 tokens in the bpe vocabulary" in out
    assert str(corpus.dir) in out


def test_the_command_makes_what_gpt2s_byte_pairs_make_and_fetches_them_only_where_they_are_missing(
        folder, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(data, "fetch", lambda name, where: fetched.append((name, where)))
    assert main(["--dataset=wt2", f"--dir={folder}", f"--bpe_files={folder / 'gpt2'}"]) == 1
    assert fetched == [("gpt2", folder / "gpt2")]                 # the texts were there
    assert "lacks encoder.json or vocab.bpe" in capsys.readouterr().err


def test_the_command_takes_the_options_of_a_word_vocabulary(folder):
    argv = ["--dataset=wt2", f"--dir={folder}", "--lower_case=True", "--min_freq=2", "--max_size=3"]
    assert main(argv) == 0
    wanted = Data("wt2", str(folder), lower_case=True, min_freq=2, max_size=3)
    made, = (folder / "tokens").glob("[!.]*")
    assert prepare(wanted) == made


def test_the_command_says_in_one_line_that_it_is_offline_and_changes_nothing(tmp_path, monkeypatch, capsys):
    file = datasets.File(("http://127.0.0.1:9/wikitext-2-v1.zip",), "md5:0")       # the discard port: nobody listens
    monkeypatch.setitem(datasets.SOURCES, "wt2", (file,))
    assert main(["--dataset=wt2", f"--dir={tmp_path / 'wt2'}"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_go_together_are_one_line(tmp_path, capsys):
    assert main(["--dataset=text", f"--dir={tmp_path}", "--vocab=byte", "--n_token=9"]) == 1
    assert capsys.readouterr().err == "data: a byte vocabulary has exactly 256 tokens\n"


def test_the_manifest_tells_what_the_tokens_were_made_of(folder):
    manifest = json.loads((prepare(words(folder)) / "manifest.json").read_text())
    assert set(manifest["inputs"]["train"]) == {"path", "sha256", "size", "stat"}
    assert manifest["tokens"] == {"train": 10, "valid": 4, "test": 6}
    assert manifest["vocab_hash"] == load(words(folder)).vocab.hash
