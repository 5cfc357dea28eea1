"""Reading a run back: its table, its samples, and what is said when there is nothing to read."""
from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.world import world
from tests.ranks import run_ranks
from txl import evaluate
from txl.config import Context, Data
from txl.data import load
from txl.model import TransformerXL
from txl.task import read_recipe
from txl.train import main as train_main


def test_the_table_compares_unigram_no_memory_and_memory(run, capsys):
    assert evaluate.main([f"--run={run}"]) == 0
    out = capsys.readouterr().out
    unigram, without, with_memory = (
        float(re.search(rf"^{name}\s+(\d+\.\d+)", out, re.MULTILINE)[1])
        for name in ("a unigram model", "this model without memory", "this model with memory"))
    assert with_memory < without < unigram
    tested = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert tested["kind"] == "test"
    assert with_memory == pytest.approx(tested["ppl"], abs=0.005)
    assert "every token once, 3 streams" in out


def test_the_unigram_model_is_counts_plus_one():
    train_ids, text = np.array([0, 0, 1, 2, 0], dtype=np.uint16), np.array([0, 3, 1], dtype=np.uint16)
    expected = -math.log(4 / 9) - math.log(1 / 9) - math.log(2 / 9)
    assert evaluate.unigram_nats(train_ids, text, 4) == pytest.approx(expected)


def test_flags_change_the_context_and_the_table_says_so(run, capsys):
    assert evaluate.main([f"--run={run}", "--split=valid", "--tgt_len=5", "--mem_len=11", "--clamp_len=7",
                          "--same_length"]) == 0
    assert "tgt_len 5, mem_len 11, clamp_len 7, same_length" in capsys.readouterr().out


def perplexities(out: str) -> list[str]:
    return re.findall(r"^(?:a|this) .*model.*", out, re.MULTILINE)


def test_all_is_validation_and_test(run, capsys):
    def said(split):
        assert evaluate.main([f"--run={run}", f"--split={split}"]) == 0
        return capsys.readouterr().out
    valid, test, both = map(said, ("valid", "test", "all"))
    assert perplexities(both) == perplexities(valid) + perplexities(test)
    assert perplexities(valid) != perplexities(test)


def test_a_vocabulary_of_words_has_its_perplexity_per_word(run, capsys):
    assert evaluate.main([f"--run={run}"]) == 0
    for row in perplexities(capsys.readouterr().out):
        perplexity, _, per_word, bits_per_byte = row.split()[-4:]
        assert perplexity == per_word
        text = (run / "test.txt").read_text()
        n_words = len(text.split()) + text.count("\n")
        assert 2 ** (float(bits_per_byte) * len(text) / n_words) == pytest.approx(float(perplexity), abs=0.02)


@pytest.mark.parametrize("protocol", ["exact", "nvidia", "original"])
def test_ranks_make_no_difference(run, protocol):
    flags = [f"--run={run}", f"--protocol={protocol}", "--streams=5", "--tgt_len=8", "--mem_len=8"]
    alone, (leader, other) = _said(flags), run_ranks(2, _said, flags)
    assert perplexities(leader) == perplexities(alone) != []
    assert re.findall(r"^\(.*", leader, re.MULTILINE) == re.findall(r"^\(.*", alone, re.MULTILINE) != []
    assert other == ""


def _said(flags: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert evaluate.main(flags) == 0
    return out.getvalue()


def test_other_protocols_have_their_own_number_of_streams_and_say_so(run, capsys):
    for protocol, words in (("nvidia", "NVIDIA's protocol: 16 streams, each after the last 8 tokens"),
                            ("original", "the original's protocol: 10 streams from an empty memory")):
        assert evaluate.main([f"--run={run}", f"--protocol={protocol}", "--tgt_len=4", "--mem_len=6"]) == 0
        assert words in capsys.readouterr().out
    assert evaluate.main([f"--run={run}", "--protocol=nvidia", "--mem_len=999"]) == 1
    assert "Give fewer --streams" in capsys.readouterr().err


def test_a_segments_time_leaves_out_the_first_and_the_last():
    how = evaluate.How(Context(tgt_len=10, mem_len=25), streams=4, protocol="exact")
    seconds = [9.0, 9.0, 9.0, 9.0, *(x / 1000 for x in range(101)), 9.0]
    assert evaluate.speed(seconds, how, (90, 99.5)) == (
        "a segment of 4 x 10 tokens takes 50.00 ms on average, 90% within 90.00, 99.5% within 99.50: 800 tokens/s "
        "(101 of 106 segments: without the first 4 and the last)")
    assert "too short to time: 5 segments" in evaluate.speed(seconds[:5], how, (90,))


def test_lengths_of_memory_are_compared_and_drawn(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert evaluate.main([f"--run={copy}", "--scan_mem_len=0,4,8", "--percentiles=50,75"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["0", "4", "8"]
    for mem_len, perplexity, *_ in rows:
        assert evaluate.main([f"--run={run}", f"--mem_len={mem_len}"]) == 0
        assert perplexities(capsys.readouterr().out)[-1].split()[-4] == perplexity
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    drawn = EventAccumulator(str(copy / "tensorboard" / "mem_len-test"))
    drawn.Reload()
    assert [(str(x.step), f"{x.value:.2f}") for x in drawn.Scalars("scan/ppl_by_mem_len")] == [
        (mem_len, perplexity) for mem_len, perplexity, *_ in rows]


def test_a_text_costs_what_the_same_text_as_a_split_does(run, capsys, monkeypatch):
    assert evaluate.main([f"--run={run}", "--streams=1"]) == 0
    of_split = perplexities(capsys.readouterr().out)[-1].split()[-4]
    monkeypatch.setattr("sys.stdin", io.StringIO((run / "test.txt").read_text()))
    assert evaluate.main([f"--run={run}", "--text=-"]) == 0
    assert f"perplexity {of_split} per token, {of_split} per word" in capsys.readouterr().out


def test_a_text_is_scored_word_by_word_by_what_stands_before(run, capsys):
    assert evaluate.main([f"--run={run}", "--text=the quick\nbrown"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert [row[0] for row in rows] == ["the", "quick", "\\n", "brown"]
    with world() as w, torch.no_grad():
        trained = evaluate.restore(run, w)
        vocab, net = trained.corpus.vocab, trained.net
        ids = [vocab.start, *vocab.encode("the quick\nbrown")]
        for i, (_, tokens, nats, perplexity) in enumerate(rows):
            hidden, _ = net.hidden(torch.tensor([ids[:i + 1]]), None, Context(1, 0))
            expected = -float(net.vocabulary.log_prob(hidden[:, -1])[0, ids[i + 1]])
            assert (tokens, float(nats)) == ("1", pytest.approx(expected, abs=0.001))
            assert float(perplexity) == pytest.approx(math.exp(expected), rel=0.01, abs=0.01)


def test_what_cannot_be_scored_is_one_clear_line(run, capsys):
    for text, words in (("the zebra", "'zebra'"), (" ", "There is no word in the text to score")):
        assert evaluate.main([f"--run={run}", f"--text={text}"]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert words in error


def test_a_word_that_unk_stands_for_is_scored_and_named(run, tmp_path, capsys):
    """<unk> in the place of the dog in every text: as many words, in another order of frequency."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for split in ("train", "valid", "test"):
        (copy / f"{split}.txt").write_text((copy / f"{split}.txt").read_text().replace("dog", "<unk>"))
    recipe = replace(read_recipe(copy / "recipe.json"), data=Data("text", str(copy)))
    corpus = load(recipe.data)
    trained = evaluate.Trained(recipe, corpus, TransformerXL(recipe.model, corpus.n_token), SimpleNamespace(step=1))
    with torch.no_grad():
        said = evaluate.text_table(trained, "the zebra", Context(8, 8))
    assert said.splitlines()[2].split()[0] == "zebra"
    assert said.endswith("Not in the vocabulary and read as <unk>: zebra")


def test_a_folder_without_a_run_is_one_clear_line(tmp_path, capsys):
    assert evaluate.main([f"--run={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No checkpoint at" in error


def test_what_cannot_be_evaluated_is_one_clear_line(run, tmp_path, capsys):
    def said(*flags):
        assert evaluate.main(list(flags)) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error
    assert "tgt_len=0: tgt_len and clamp_len must be at least 1" in said(f"--run={run}", "--tgt_len=0")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    text = (copy / "recipe.json").read_text()
    (copy / "recipe.json").write_text(text[:50])
    assert "recipe.json is not a recipe that can be read" in said(f"--run={copy}")
    (copy / "recipe.json").write_text(text.replace('"n_layer"', '"n_layers"'))
    assert "unknown key 'n_layers'. Did you mean 'n_layer'?" in said(f"--run={copy}")
    (copy / "recipe.json").write_text(text.replace('"n_layer": 2', '"n_layer": 3'))
    assert "do not fit this model" in said(f"--run={copy}")
    (copy / "recipe.json").unlink()
    assert "recipe.json is not a recipe that can be read" in said(f"--run={copy}")


def test_weights_are_not_evaluated_on_words_that_now_mean_something_else(run, tmp_path, capsys):
    """The same number of words in another order: without a check it would run, and print nonsense."""
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    recipe = json.loads((copy / "recipe.json").read_text())
    recipe["data"]["dir"] = str(copy)
    (copy / "recipe.json").write_text(json.dumps(recipe))
    assert evaluate.main([f"--run={copy}"]) == 0
    for split in ("train", "valid", "test"):
        text = (copy / f"{split}.txt").read_text()
        (copy / f"{split}.txt").write_text(text.replace("quick", "Q").replace("the", "quick").replace("Q", "the"))
    capsys.readouterr()
    assert evaluate.main([f"--run={copy}"]) == 1
    assert "was trained on another vocabulary" in capsys.readouterr().err


def test_a_run_stopped_before_its_first_log_line_has_a_table(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "metrics.jsonl").write_text('{"kind": "tra')
    assert evaluate.main([f"--run={copy}"]) == 0
    assert "evaluated at" in capsys.readouterr().out


def test_a_recipe_that_is_not_there_starts_nothing(tmp_path, capsys):
    assert train_main([str(tmp_path / "typo" / "recipe.json")]) == 1
    assert "is not a recipe that can be read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_first_segments_of_one_stream_are_the_beginning_of_the_text(run, tmp_path, capsys):
    """Read to there, or a text that ends there: the same loss."""
    whole = json.loads(saved(run, tmp_path / "whole.json", capsys, "--streams=1", "--max_segments=3", "--tgt_len=7"))
    corpus, recipe = load(read_recipe(run / "recipe.json").data), read_recipe(run / "recipe.json")
    with world() as w:
        trained = evaluate.restore(run, w)
        begun = SimpleNamespace(splits={"test": corpus.splits["test"][:21]}, vocab=corpus.vocab)
        score = evaluate.evaluate(trained.net, begun, "test", replace(recipe.eval_context, tgt_len=7), 1, w)
    assert whole["test"]["tokens"] == score.tokens == 21
    assert whole["test"]["loss"] == pytest.approx(score.loss)
    assert "of each the first 3 segments alone" in whole["test"]["protocol"]


def test_segments_that_only_warm_the_memory_are_not_among_the_first(run, tmp_path, capsys):
    flags = ("--protocol=nvidia", "--streams=2", "--max_segments=2", "--tgt_len=7", "--mem_len=20")
    assert json.loads(saved(run, tmp_path / "x.json", capsys, *flags))["test"]["tokens"] == 2 * 2 * 7


def saved(run, path, capsys, *flags) -> str:
    assert evaluate.main([f"--run={run}", f"--save={path}", *flags]) == 0
    capsys.readouterr()
    return path.read_text()


def test_what_is_saved_is_what_is_said(run, tmp_path, capsys):
    assert evaluate.main([f"--run={run}", f"--save={tmp_path / 'x.json'}", "--split=all", "--tgt_len=4"]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    assert list(found) == ["valid", "test"]
    for numbers, row in zip(found.values(), re.findall(r"^this model with memory +(\S+)", out, re.MULTILINE)):
        assert f"{numbers['perplexity']:.2f}" == row
        assert math.log(numbers["perplexity"]) == pytest.approx(numbers["loss"])
        assert f": {numbers['tokens_per_s']:,.0f} tokens/s (" in out
        assert len(numbers["segment_s"]) == -(-numbers["tokens"] // (3 * 4))


@pytest.mark.parametrize(("goals", "status", "said"), [
    (["--target_perplexity=1000"], 0, "reached: test ppl"),
    (["--target_perplexity=1.01"], 3, "MISSED: test ppl"),
    (["--target_perplexity=1000", "--target_tokens_per_s=1e9"], 3, "tokens/s (target: at least 1,000,000,000)"),
])
def test_a_missed_target_is_said_and_is_the_exit_status(run, goals, status, said, capsys):
    assert evaluate.main([f"--run={run}", "--tgt_len=4", *goals]) == status
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--max_segments=0"], ["--streams=0"], ["--text=hello", "--save=x.json"],
                                   ["--scan_mem_len=1,2", "--target_perplexity=3"]])
def test_flags_that_make_no_sense_are_refused(run, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main([f"--run={run}", *flags])
    assert ended.value.code == 2
    assert "must be at least 1" in (err := capsys.readouterr().err) or "for the evaluation of a split" in err
