"""Writing: by memory what the whole text would say, together what each would alone, and on the screen as it comes."""
from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from engine.world import world
from tests.txl.small import RECIPE, corpus
from txl import evaluate, generate
from txl.config import Context
from txl.evaluate import token_nats
from txl.generate import Flags, Rows
from txl.model import Attention, TransformerXL
from txl.trained import restore


def small(context: Context, **shape):
    torch.manual_seed(2)
    net = TransformerXL(replace(RECIPE.model, **shape), 30).double().eval()
    return SimpleNamespace(net=net, corpus=corpus(), recipe=SimpleNamespace(eval_context=context))


def test_what_follows_by_memory_is_what_follows_the_whole_text():
    trained = small(Context(tgt_len=4, mem_len=60))
    texts, tokens, net = Rows(trained, [[3, 1, 4, 1, 5, 9, 2, 6, 5]]), [0, 3, 1, 4, 1, 5, 9, 2, 6, 5], trained.net
    for token in (11, 21, 29, 7, 0, 13, 13, 2):
        with torch.no_grad():
            whole, _ = net.hidden(torch.tensor([tokens]), None, Context(1, 0))
            torch.testing.assert_close(texts.log_prob_BV, net.vocabulary.log_prob(whole[:, -1]), rtol=1e-9, atol=1e-9)
        texts.advance([0], [token])
        tokens.append(token)


@pytest.mark.parametrize("shape", [
    {}, {"attn_type": "shaw", "positions": 8}, {"attn_type": "abs"}, {"attn_type": "learned", "positions": 8}])
def test_prompts_of_different_lengths_go_on_as_each_does_alone(shape):
    """Also while some have a full memory (6 here) and others not, and when rows are repeated, exchanged, dropped."""
    trained = small(Context(tgt_len=4, mem_len=4), **shape)
    prompts = [[], [5], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [1, 2, 3], [4, 4, 4]]
    together, alone = Rows(trained, prompts), [Rows(trained, [prompt]) for prompt in prompts]
    torch.testing.assert_close(together.log_prob_BV, torch.cat([x.log_prob_BV for x in alone]), rtol=1e-9, atol=1e-9)
    texts = [list(prompt) for prompt in prompts]
    for rows in ([0, 1, 2, 3, 4], [4, 0, 0, 2, 1], [1, 0, 2], [2, 1, 0], [1, 1], [0, 1], [1], [0], [0]):
        tokens = [(7 * i + len(texts[row])) % 30 for i, row in enumerate(rows)]
        log_prob_BV = together.advance(rows, tokens)
        texts = [[*texts[row], token] for row, token in zip(rows, tokens)]
        for row, text in zip(log_prob_BV, texts):
            origin = max((p for p in prompts if text[:len(p)] == p), key=len)
            single = Rows(trained, [origin])
            for token in text[len(origin):]:
                single.advance([0], [token])
            torch.testing.assert_close(row, single.log_prob_BV[0], rtol=1e-9, atol=1e-9)


def said(capsys, *flags: str) -> str:
    assert generate.main(list(flags)) == 0
    return capsys.readouterr().out


def blocks(out: str) -> list[tuple[str, str]]:
    """(heading, text) of several samples."""
    return re.findall(r"^=== (.*?) ===\n(.*?)\n\n(?==== |\Z)", out, re.DOTALL | re.MULTILINE)


def test_a_file_of_prompts_gives_what_each_of_them_gives(run, tmp_path, capsys):
    prompts = ["the quick", "lazy dog the quick brown fox jumps over the lazy dog the quick brown", "over", ""]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[:3]) + "\n\n")
    how = [f"--run={run}", "--length=25", "--temperature=1", "--seed=3"]
    together = blocks(said(capsys, *how, f"--prompts={tmp_path / 'prompts.txt'}", "--stop=lazy dog"))
    assert [heading for heading, _ in together] == [f"prompt {i}, sample 1" for i in (1, 2, 3, 4)]
    for prompt, (_, text) in zip(prompts, together):
        alone = said(capsys, *how, "--stop=lazy dog", *([f"--prompt={prompt}"] if prompt else []))
        assert alone.removesuffix("\n") == text


def test_a_batch_is_the_samples_of_the_seeds_that_follow(run, capsys):
    how = [f"--run={run}", "--length=15", "--temperature=2", "--prompt=the quick"]
    found = blocks(said(capsys, *how, "--batch=3", "--seed=5"))
    assert [text + "\n" for _, text in found] == [said(capsys, *how, f"--seed={seed}") for seed in (5, 6, 7)]
    assert len({text for _, text in found}) > 1


def test_a_text_ends_before_its_stop_string(run, capsys):
    how = [f"--run={run}", "--length=40", "--seed=2", "--temperature=1"]
    whole = said(capsys, *how)
    assert "fox" in whole
    assert said(capsys, *how, "--stop=fox", "--stop=no such thing") == whole[:whole.index("fox")] + "\n"
    assert said(capsys, *how, "--stop=own f") == whole[:whole.index("own f")] + "\n"


def test_one_beam_writes_what_temperature_0_does(run, capsys):
    how = [f"--run={run}", "--prompt=the", "--length=12"]
    [(_, text)] = blocks(said(capsys, *how, "--beams=1"))
    assert text + "\n" == said(capsys, *how, "--temperature=0")


def test_beams_are_found_in_order_with_the_log_probability_of_their_text(run, capsys):
    out = said(capsys, f"--run={run}", "--prompt=the quick", "--length=2", "--beams=4", "--groups=2")
    found = blocks(out)
    scores = [float(heading.split()[-1]) for heading, _ in found]
    assert [heading.split(", log")[0] for heading, _ in found] == [f"prompt 1, group {g}" for g in (1, 1, 2, 2)]
    assert scores[0] >= scores[1]
    assert scores[2] >= scores[3]
    with world() as w, torch.no_grad():
        trained = restore(run, w)
        vocab = trained.corpus.vocab
        for (_, text), score in zip(found, scores):
            nats = token_nats(trained.net, vocab.encode(text), vocab.start, Context(1, 99))
            assert len(nats) == 4
            assert -sum(nats[2:]) == pytest.approx(score, abs=0.01)


def test_beams_end_before_a_stop_string_as_well(run, capsys):
    [(_, text)] = blocks(said(capsys, f"--run={run}", "--prompt=the quick", "--length=9", "--beams=1", "--stop=jumps"))
    assert text == "the quick brown fox "


def test_text_comes_while_it_is_written(run):
    with world() as w:
        writing = generate.sample(restore(run, w), [[]], Flags(run=str(run), length=10 ** 9))
        assert len([next(writing) for _ in range(5)]) == 5


@pytest.mark.parametrize("flags", [
    ["--top_k=0"], ["--top_p=0"], ["--top_p=1.1"], ["--batch=0"], ["--prompt=a", "--prompts=b"], ["--groups=2"],
    ["--beams=4", "--top_k=2"], ["--beams=4", "--batch=2"], ["--beams=4", "--groups=3"], ["--beams=0"],
    ["--beams=2", "--diversity=-1"]])
def test_flags_that_make_no_sense_together_are_misuse(run, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        generate.main([f"--run={run}", *flags])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_of_prompts_that_is_not_there_or_empty_is_one_clear_line(run, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    for name, words in (("none.txt", "cannot be read"), ("empty.txt", "is empty")):
        assert generate.main([f"--run={run}", f"--prompts={tmp_path / name}"]) == 1
        assert words in capsys.readouterr().err


def test_an_unknown_word_in_a_prompt_is_one_clear_line(run, capsys):
    assert generate.main([f"--run={run}", "--prompt=the zebra"]) == 1
    error = capsys.readouterr().err
    assert "'zebra'" in error
    assert "Use words of the text" in error
    assert "min_freq" not in error


def test_impossible_temperatures_and_lengths_are_misuse(run, capsys):
    for flags in (["--temperature=-1"], ["--length=0"]):
        with pytest.raises(SystemExit) as ended:
            generate.main([f"--run={run}", *flags])
        assert ended.value.code == 2


def test_samples_repeat_with_their_seed_and_begin_with_the_prompt(run, capsys):
    def sampled(*flags):
        assert generate.main([f"--run={run}", "--length=40", *flags]) == 0
        return capsys.readouterr().out
    assert sampled("--seed=1") == sampled("--seed=1") != sampled("--seed=2")
    assert sampled("--prompt=the quick brown").startswith("the quick brown")
    assert sampled("--temperature=0", "--seed=1") == sampled("--temperature=0", "--seed=2")


def test_the_likeliest_continuation_is_what_the_text_always_says(run, capsys):
    generate.main([f"--run={run}", "--prompt=the quick", "--length=4", "--temperature=0"])
    assert capsys.readouterr().out.split() == ["the", "quick", "brown", "fox", "jumps", "over"]


@pytest.mark.parametrize(("precision", "computed", "said"), [
    ("bf16", torch.bfloat16, ""),
    ("tf32", torch.float32, "The run was trained in tf32, which a CPU cannot do: here it is fp32\n")])
def test_it_computes_as_the_run_was_trained_and_where_that_cannot_be_in_fp32(
        run, tmp_path, capsys, monkeypatch, precision, computed, said):
    copy, used = tmp_path / "copy", set()
    shutil.copytree(run, copy)
    recipe = json.loads((copy / "recipe.json").read_text())
    (copy / "recipe.json").write_text(json.dumps(recipe | {"precision": precision}))
    attention = Attention.read

    def watched(self, *args):
        attended = attention(self, *args)
        used.add(attended[0].dtype)
        return attended
    monkeypatch.setattr(Attention, "read", watched)
    for main, flags in ((generate.main, ["--length=3"]), (evaluate.main, ["--text=the quick fox"])):
        assert main([f"--run={copy}", *flags]) == 0
        assert used == {computed}
        assert capsys.readouterr().err == said
        used.clear()
