"""The exported file against the model it was made of, and its reader where this project is not."""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers
from torch.testing import assert_close

from engine.world import World
from tests.txl.small import RECIPE
from txl import evaluate, export, exported
from txl.config import Context
from txl.model import TransformerXL
from txl.trained import restore
from txl.vocab import BpeVocab, ByteVocab, CharVocab, WordVocab

ALONE = World(0, 0, 1, torch.device("cpu"))
PLAIN = replace(RECIPE.model, cutoffs=())
CASES = {
    "plain": (PLAIN, Context(8, 8)),
    "adaptive": (replace(RECIPE.model, div_val=2, pre_lnorm=True), Context(8, 6, clamp_len=5, same_length=True)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_computes_what_the_model_does_for_any_number_of_streams_and_tokens(case):
    model, context = CASES[case]
    torch.manual_seed(0)
    net = TransformerXL(model, 30).eval()
    step = export.program(net, context).module()
    for B, T in [(1, 1), (1, 8), (2, 3), (5, 13)]:
        memory, length = torch.zeros(2, B, context.mem_len, 16), torch.zeros(B, dtype=torch.long)
        expected, eager = None, None
        for tokens in torch.randint(0, 30, (3, B, T)):
            with torch.no_grad():
                found, memory, length = step(tokens, memory, length)
                hidden, eager = net.hidden(tokens, eager, context)
                expected = net.vocabulary.log_prob(hidden.flatten(0, 1)).unflatten(0, (B, T))
            assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert_close(memory, eager[0], rtol=1e-5, atol=1e-5)
            assert length.tolist() == [eager[1]] * B


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory) -> Path:
    """A folder outside the project with the run's exported model and its reader, m.pt2 and m.py."""
    folder = tmp_path_factory.mktemp("alone")
    assert export.main([f"--run={run}", f"--output={folder / 'm.pt2'}"]) == 0
    return folder


def there(folder: Path, code: str) -> str:
    """What Python says in `folder`, knowing of nothing but its standard library, torch and what torch needs."""
    hidden = "import sys, importlib.util as u; assert not any(u.find_spec(x) for x in ('txl', 'engine', 'tests'));"
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", hidden + code], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=300, check=True).stdout


def greedy(net: TransformerXL, ids: list[int], length: int, context: Context) -> list[int]:
    """What is likeliest, token by token, each read alone."""
    memory, written = None, []
    for token in [0, *ids]:
        hidden, memory = net.hidden(torch.tensor([[token]]), memory, context)
    for _ in range(length):
        written.append(int(net.vocabulary.log_prob(hidden[:, -1]).argmax()))
        hidden, memory = net.hidden(torch.tensor([[written[-1]]]), memory, context)
    return written


def test_away_from_the_project_it_scores_and_writes_what_the_run_does(run, alone):
    text = "the quick brown fox\njumps over the lazy dog\nthe quick\n"
    said, line = there(alone, f"""
import json, m
model = m.LanguageModel("m.pt2")
score = model.score({text!r})
drawn = [model.generate("the quick", length=12, temperature=0.7, seed=seed) for seed in (1, 1, 2)]
print(json.dumps([score.nats, score.words, score.per_token, model.generate("the", length=6), drawn]))
sys.exit(m.main(["--text", {text!r}]))""").splitlines()
    said, trained = json.loads(said), restore(run, ALONE)
    context, vocab = trained.recipe.context_of("test"), trained.corpus.vocab
    with torch.no_grad():
        nats = evaluate.token_nats(trained.net, vocab.encode(text), vocab.start, context)
        table = evaluate.text_table(trained, text, context)
        likeliest = greedy(trained.net, vocab.encode("the"), 6, context)
    assert said[0] == pytest.approx(nats, rel=1e-5, abs=1e-5)
    assert f"{said[1]} words, {len(nats)} tokens" in table
    assert f"perplexity {said[2]:.2f} per token" in table
    assert "the" + said[3] == vocab.decode([*vocab.encode("the"), *likeliest])
    assert said[4][0] == said[4][1] != said[4][2]
    assert line.startswith(f"{len(nats)} tokens, {said[1]} words: ")


def test_what_it_cannot_read_is_one_clear_line(alone, capsys):
    assert exported.main([f"--model={alone / 'absent.pt2'}", "--text=the fox"]) == 1
    assert exported.main([f"--model={alone / 'm.py'}", "--text=the fox"]) == 1
    assert re.fullmatch(r"(.* is not there, or is no exported model\n){2}", capsys.readouterr().err)
    assert exported.main([f"--model={alone / 'm.pt2'}", "--text=the zebra"]) == 1
    assert "'zebra' is not in the vocabulary" in capsys.readouterr().err


def test_nothing_in_the_file_is_pickled(alone):
    with zipfile.ZipFile(alone / "m.pt2") as file:
        held = {name: file.read(name) for name in file.namelist()}
    assert any(len(content) for name, content in held.items() if "weight_" in name)
    assert not [name for name, content in held.items() if content.startswith((b"PK", b"\x80"))]
    assert b'"use_pickle": true' not in b"".join(x for name, x in held.items() if name.endswith("config.json"))


TEXTS = ["", "a", "don't we'll I'VE 'tis", "  two  spaces\n\n\ttab \r\n end ", "x=1;y_2==3.5e-7 ½²Ⅳ๓",
         "naïve Ünïcödé 漢字仮名 🙂👍🏽", "a\u00a0b\u2003c\u3000 d\x1ce\x85f", "no<|endoftext|>doubt <|endoftext|>",
         "'s'll''d  's", "\n\n\n", "été_1a2b"]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "train.txt"
    source = Path(json.__file__).read_text() + Path(subprocess.__file__).read_text()
    path.write_text(source + "\n".join(TEXTS).replace("<|endoftext|>", ""))
    return {"bpe": BpeVocab.train([path], 600), "byte": ByteVocab.make(), "word": WordVocab.count([path], max_size=50),
            "lower": WordVocab.count([path], lower_case=True, end="<S>", min_freq=2),
            "char": CharVocab.count([path], min_freq=2)}


@pytest.mark.parametrize("text", [*TEXTS, Path(json.__file__).read_text()], ids=range(len(TEXTS) + 1))
def test_a_text_is_cut_as_tokenizers_cuts_it(text):
    """Pairs of this text's own never cross a cut, so tokens alone would not tell."""
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    assert exported.pieces(text) == [text[first:last] for _, (first, last) in cut]


@pytest.mark.parametrize("kind", ["bpe", "byte", "word", "lower", "char"])
def test_a_text_has_the_same_tokens_there_as_here(vocabularies, kind):
    vocab = vocabularies[kind]
    theirs = exported.vocabulary(json.loads(json.dumps(export.portable(vocab))))
    for text in [*TEXTS, Path(json.__file__).read_text(), Path(shutil.__file__).read_text()]:
        ids = vocab.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == vocab.decode(ids)
    assert theirs.start == vocab.start


def test_what_cannot_be_exported_is_said_in_a_line_and_leaves_nothing(run, alone, tmp_path, capsys):
    assert export.main([f"--run={run}", f"--output={alone / 'm.pt2'}"]) == 1
    assert "m.pt2 is there already" in capsys.readouterr().err
    assert export.main([f"--run={tmp_path}", f"--output={tmp_path / 'n.pt2'}"]) == 1
    assert "No checkpoint" in capsys.readouterr().err
    assert export.main([f"--run={run}", f"--output={tmp_path / 'absent' / 'n.pt2'}"]) == 1
    assert "could not be written" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        export.main([f"--run={run}", f"--output={tmp_path / 'n.onnx'}"])
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    recipe = json.loads((copy / "recipe.json").read_text())
    recipe["eval_context"]["ext_len"] = 3
    (copy / "recipe.json").write_text(json.dumps(recipe))
    assert export.main([f"--run={copy}", f"--output={tmp_path / 'n.pt2'}"]) == 1
    assert "re-reads 3 tokens (ext_len)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
