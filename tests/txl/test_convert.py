"""Other projects' weights in ours and back: the same log-probabilities, the same bits, and nothing of a file is run."""
from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
from collections import Counter, OrderedDict
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from engine import checkpoint
from engine.values import to_json
from tests.txl import rivals
from txl import convert, evaluate, generate
from txl.config import Context, Model
from txl.dialects import Unconvertible, dialect_of, from_ours, to_ours
from txl.model import TransformerXL

V = 13
SMALL = {"n_layer": 2, "d_model": 8, "n_head": 2, "d_head": 3, "d_inner": 10, "dropout": 0.0}
MODELS = {
    "plain": Model(**SMALL),
    "pre_lnorm": Model(**SMALL, pre_lnorm=True),
    "adaptive": Model(**SMALL, cutoffs=(4, 9)),
    "adaptive_untied": Model(**SMALL, cutoffs=(4, 9), tie_weight=False),
    "div": Model(**SMALL, cutoffs=(4, 9), div_val=2),
    "div_untied": Model(**SMALL, cutoffs=(4, 9), div_val=2, tie_weight=False),
    "div_none_tied": Model(**SMALL, cutoffs=(4, 9), div_val=2, tie_projs=(False, False, False)),
    "div_all_tied": Model(**SMALL, cutoffs=(4, 9), div_val=2, tie_projs=(True, True, True)),
    "div_narrow": Model(**SMALL, d_embed=6, cutoffs=(4, 9), div_val=2),
    "div_4_wide": Model(**SMALL, d_embed=64, cutoffs=(2, 4, 9), div_val=4),
    "projected": Model(**SMALL, d_embed=6),
    "projected_adaptive": Model(**SMALL, d_embed=6, cutoffs=(4, 9)),
    "untie_r": Model(**SMALL, untie_r=True, cutoffs=(4, 9)),
}
CASES = [(name, dialect) for name in MODELS for dialect in ("original", "nvidia", "hf")
         if (name, dialect) not in {("untie_r", "original"), ("untie_r", "nvidia"), ("div_all_tied", "hf")}]
WORDS = ["<eos>", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "<unk>", "cat", "é", "@-@"]


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_every_word_has_the_log_probability_that_their_model_gives_it(name, dialect):
    model, context = MODELS[name], Context(tgt_len=3, mem_len=4, clamp_len=3)
    state = rivals.state_dict(model, V, dialect)
    net = TransformerXL(model, V).double()
    net.load_state_dict(to_ours(state, model, dialect))
    tokens = torch.randint(0, V, (2, 6), generator=torch.Generator().manual_seed(4))

    past = [[[] for _ in range(model.n_layer)] for _ in tokens]
    memory = None
    for first in (0, 3):
        segment = tokens[:, first:first + 3]
        hidden_BQD, memory = net.hidden(segment, memory, context)
        found_BQV = net.vocabulary.log_prob(hidden_BQD.flatten(0, 1)).view(2, 3, V)
        for b, stream in enumerate(segment.tolist()):
            expected_QV, past[b] = rivals.log_probs(state, model, dialect, stream, past[b], mem_len=4, clamp_len=3)
            assert_close(found_BQV[b], expected_QV, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_there_and_back_again_is_the_same_to_the_last_bit(name, dialect):
    model = MODELS[name]
    state = rivals.state_dict(model, V, dialect, dtype=torch.float32)
    assert dialect_of(state) == dialect
    ours = to_ours(state, model, dialect)
    back = from_ours(ours, model, dialect)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    again = to_ours(back, model, dialect)
    assert again.keys() == ours.keys() == TransformerXL(model, V).state_dict().keys()
    assert all(torch.equal(again[key], ours[key]) for key in ours)


# Names and shapes that the projects' own modules gave for MODELS["div"] and ["projected_adaptive"]: the original at
# 44781ed, NVIDIA's of DeepLearningExamples, transformers 4.30.2. Of a layer: rivals.LAYER.
EDGE = {"r_w_bias": (2, 3), "r_r_bias": (2, 3), "pos_emb.inv_freq": (4,)}
DIV = {"word_emb.emb_layers.0.weight": (4, 8), "word_emb.emb_layers.1.weight": (5, 4),
       "word_emb.emb_layers.2.weight": (4, 2), "word_emb.emb_projs.0": (8, 8), "word_emb.emb_projs.1": (8, 4),
       "word_emb.emb_projs.2": (8, 2)}
DIV_CRIT = {"crit.cluster_weight": (2, 8), "crit.cluster_bias": (2,), "crit.out_projs.0": (8, 8)}
DIV_LAYERS = {"crit.out_layers.0.weight": (4, 8), "crit.out_layers.1.weight": (5, 4),
              "crit.out_layers.2.weight": (4, 2), "crit.out_layers.0.bias": (4,), "crit.out_layers.1.bias": (5,),
              "crit.out_layers.2.bias": (4,), "crit.out_projs.1": (8, 4), "crit.out_projs.2": (8, 2)}
PROJECTED = {"word_emb.emb_layers.0.weight": (13, 6), "word_emb.emb_projs.0": (8, 6)}
PROJECTED_CRIT = {"crit.cluster_weight": (2, 6), "crit.cluster_bias": (2,), "crit.out_projs.0": (8, 6)}
PROJECTED_LAYERS = {"crit.out_layers.0.weight": (13, 6), "crit.out_layers.0.bias": (13,), "crit.out_projs.1": (8, 6),
                    "crit.out_projs.2": (8, 6)}
PUBLISHED = {
    ("div", "original"): (EDGE | DIV, DIV_CRIT | DIV_LAYERS),
    ("div", "nvidia"): (EDGE | DIV, DIV_CRIT | {
        "crit.out_layers_biases.0": (4,), "crit.out_layers_biases.1": (5,), "crit.out_layers_biases.2": (4,),
        "crit.shared_out_projs.0": (8, 8), "crit.shared_out_projs.1": (8, 4), "crit.shared_out_projs.2": (8, 2)}),
    ("div", "hf"): (EDGE | DIV, DIV_CRIT | DIV_LAYERS),
    ("projected_adaptive", "original"): (EDGE | PROJECTED, PROJECTED_CRIT | PROJECTED_LAYERS),
    ("projected_adaptive", "nvidia"): (EDGE | PROJECTED, PROJECTED_CRIT | {
        "crit.out_layers_biases.0": (13,), "crit.shared_out_projs.0": (8, 6)}),
    ("projected_adaptive", "hf"): (EDGE | PROJECTED, PROJECTED_CRIT | PROJECTED_LAYERS),
}


@pytest.mark.parametrize(("name", "dialect"), PUBLISHED)
def test_what_is_written_has_the_names_and_shapes_that_their_modules_have(name, dialect):
    body, crit = PUBLISHED[name, dialect]
    sizes = {"D": 8, "NH": 6, "3NH": 18, "F": 10}
    for i in range(2):
        body = body | {f"layers.{i}.{key}": tuple(sizes[s] for s in shape) for key, shape in rivals.LAYER.items()}
        if dialect == "hf":
            body |= {f"layers.{i}.dec_attn.{key}": (2, 3) for key in ("r_w_bias", "r_r_bias")}
    prefix = "transformer." if dialect == "hf" else ""
    expected = {f"{prefix}{key}": shape for key, shape in body.items()} | crit
    found = from_ours(TransformerXL(MODELS[name], V).state_dict(), MODELS[name], dialect)
    assert {key: tuple(x.shape) for key, x in found.items()} == expected
    made = rivals.state_dict(MODELS[name], V, dialect)
    assert {key: tuple(x.shape) for key, x in made.items()} == expected, "the judge itself"


def test_a_tensor_that_is_missing_unknown_or_of_another_shape_is_named():
    model = MODELS["div"]
    state = rivals.state_dict(model, V, "original")

    def said(changes, model=model):
        with pytest.raises(Unconvertible) as error:
            to_ours({name: x for name, x in (state | changes).items() if x is not None}, model, "original")
        return str(error.value)
    assert "layers.1.dec_attn.r_net.weight is missing" in said({"layers.1.dec_attn.r_net.weight": None})
    assert "layers.2.dec_attn.r_net.weight is unknown" in said({"layers.2.dec_attn.r_net.weight": torch.ones(1)})
    assert "crit.cluster_weight is (3, 8), not (2, 8)" in said({"crit.cluster_weight": torch.ones(3, 8)})
    assert "crit.out_projs.1 is not word_emb.emb_projs.1" in said({"crit.out_projs.1": torch.ones(8, 4)})
    assert "r_w_bias is (2, 3), not (3, 2)" in said({}, Model(**SMALL | {"n_head": 3, "d_head": 2}, cutoffs=(4, 9),
                                                              div_val=2))
    assert "and 12 more" in said({}, Model(**SMALL | {"n_layer": 3}, cutoffs=(3, 9), div_val=2))


def test_one_name_of_a_tied_tensor_is_enough():
    """safetensors holds each tensor once, under whichever of its names."""
    model = MODELS["div"]
    state = rivals.state_dict(model, V, "hf")
    whole = to_ours(state, model, "hf")
    for gone in (["crit.out_projs.1", "crit.out_layers.0.weight"], ["transformer.word_emb.emb_projs.1"]):
        less = to_ours({name: x for name, x in state.items() if name not in gone}, model, "hf")
        assert all(torch.equal(less[name], whole[name]) for name in whole)


def test_a_model_that_they_do_not_have_is_refused():
    for dialect, model, words in (
            ("original", Model(**SMALL, pre_lnorm=True, final_lnorm=True), "original has no models with final_lnorm"),
            ("nvidia", MODELS["untie_r"], "nvidia has no models with untie_r=true"),
            ("hf", MODELS["div_all_tied"], "hf has no models with tie_projs=true,true,true")):
        with pytest.raises(Unconvertible, match=words):
            from_ours(TransformerXL(model, V).state_dict(), model, dialect)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text whose counted vocabulary is WORDS in another order."""
    folder, words = tmp_path_factory.mktemp("text"), random.Random(1)
    for split in ("train", "valid", "test"):
        lines = [" ".join(WORDS[1:]), *(" ".join(words.choices(WORDS[1:], k=6)) for _ in range(20))]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


class Vocab:
    """By the name and the attributes of NVIDIA's."""

    def __init__(self):
        self.counter, self.lower_case = Counter(WORDS), False
        self.idx2sym, self.sym2idx = list(WORDS), OrderedDict((word, i) for i, word in enumerate(WORDS))


def settings(text, *more):
    return [f"--set=recipe.data.{x}" for x in (f"dir={text}", "dataset=text", "n_token=none")] + [*more]


def nvidia_file(path, model, **more):
    told = {name: getattr(model, name) for name in ("n_layer", "n_head", "d_model", "d_head", "d_inner", "dropout",
                                                    "dropatt", "pre_lnorm", "div_val", "tie_weight")}
    told |= {"d_embed": model.d_embed or model.d_model, "cutoffs": list(model.cutoffs), "attn_type": 0, "n_token": V,
             "tie_projs": [False] + [True] * len(model.cutoffs), "tgt_len": 3, "sample_softmax": -1, "dtype": None}
    torch.save({"args": argparse.Namespace(vocab="word", lr=.01), "model_config": told,
                "model_state": rivals.state_dict(model, V, "nvidia", dtype=torch.float32), "vocab": Vocab(),
                "epoch": 3, "train_step": 40000, "best_val_loss": np.float64(3.14)} | more, path)


def hf_folder(folder, model, vocab="vocab.pkl"):
    folder.mkdir()
    told = {name: getattr(model, name) for name in ("n_layer", "n_head", "d_model", "d_head", "d_inner", "dropout",
                                                    "dropatt", "pre_lnorm", "div_val", "untie_r")}
    (folder / "config.json").write_text(json.dumps(told | {
        "d_embed": model.d_embed or model.d_model, "cutoffs": model.cutoffs, "attn_type": 0, "vocab_size": V,
        "layer_norm_epsilon": 1e-5, "mem_len": 4, "clamp_len": 3, "same_length": True, "tie_word_embeddings": True}))
    torch.save(rivals.state_dict(model, V, "hf", dtype=torch.float32), folder / "pytorch_model.bin")
    attributes = vars(Vocab()) | {"never_split": ["<eos>"], "moses": Vocab()}
    if vocab == "vocab.pkl":
        (folder / vocab).write_bytes(pickle.dumps(attributes))
    elif vocab == "vocab.bin":
        torch.save(vars(Vocab()), folder / vocab, _use_new_zipfile_serialization=False)
    else:
        (folder / vocab).write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")


def same_as_theirs(run, model, dialect, words):
    """The run computes their model's probabilities of `words`, which it reads from its own files."""
    from engine.world import world
    with world() as w:
        trained = evaluate.restore(run, w)
    ids = trained.corpus.vocab.encode(" ".join(words))
    assert trained.corpus.vocab.decode(ids) == " ".join(words)
    hidden_BQD, _ = trained.net.hidden(torch.tensor([ids]), None, Context(3, 4, clamp_len=3))
    state = {name: x.double() for name, x in rivals.state_dict(model, V, dialect, dtype=torch.float32).items()}
    expected, _ = rivals.log_probs(state, model, dialect, ids, [[]] * model.n_layer, 4, 3)
    assert_close(trained.net.vocabulary.log_prob(hidden_BQD[0]).double(), expected, rtol=1e-4, atol=1e-4)
    return ids


@pytest.mark.parametrize("vocab", ["vocab.pkl", "vocab.bin", "vocab.txt"])
def test_a_folder_of_hugging_face_becomes_a_run_that_evaluates_and_writes(vocab, text, tmp_path, capsys):
    model, run = MODELS["untie_r"], tmp_path / "run"
    hf_folder(tmp_path / "hf", model, vocab)
    flags = [f"--weights={tmp_path / 'hf'}", f"--run={run}", "--config=wt103_large_paper", *settings(text)]
    assert convert.main(flags) == 0, capsys.readouterr().err
    assert same_as_theirs(run, model, "hf", ["fox", "é", "the"]) == [4, 11, 1]
    capsys.readouterr()
    assert evaluate.main([f"--run={run}", "--mem_len=4"]) == 0
    assert "vocabulary of 13" in capsys.readouterr().out
    assert generate.main([f"--run={run}", "--prompt=the nonsense", "--length=3"]) == 0
    assert capsys.readouterr().out.startswith("the <unk> ")
    assert json.loads((run / "status.json").read_text())["state"] == "finished", "nothing goes on from here by itself"
    assert convert.main(flags) == 1
    assert "is there already" in capsys.readouterr().err


def test_a_checkpoint_of_nvidia_becomes_a_run_and_goes_out_again_as_it_was(text, tmp_path, capsys):
    model, run, source = MODELS["div"], tmp_path / "run", tmp_path / "checkpoint_best.pt"
    nvidia_file(source, model)
    assert convert.main([f"--weights={source}", f"--run={run}", "--config=nvidia_base", *settings(text)]) == 0
    assert same_as_theirs(run, model, "nvidia", ["cat", "dog"]) == [10, 8]
    assert convert.main([f"--run={run}", f"--to={tmp_path / 'back.pt'}", "--format=nvidia"]) == 0
    there, back = (torch.load(path, weights_only=False) for path in (source, tmp_path / "back.pt"))
    assert back["args"].vocab == "word"
    assert {name: back["model_config"][name] for name in there["model_config"] if name != "tgt_len"} == {
        name: x for name, x in there["model_config"].items() if name != "tgt_len"}
    assert back["model_state"].keys() == there["model_state"].keys()
    assert all(torch.equal(x, back["model_state"][name]) for name, x in there["model_state"].items())


def test_a_state_dict_of_the_original_has_its_model_from_the_config_and_its_words_from_the_text(text, tmp_path, capsys):
    model, run, source = MODELS["adaptive"], tmp_path / "run", tmp_path / "state.pt"
    torch.save(rivals.state_dict(model, V, "original", dtype=torch.float32), source)
    shape = [f"--set=recipe.model.{x}" for x in ("n_layer=2", "d_model=8", "n_head=2", "d_head=3", "d_inner=10",
                                                 "cutoffs=4,9")]
    flags = [f"--weights={source}", f"--run={run}", "--config=wt103_base_paper"]
    assert convert.main([*flags, *settings(text)]) == 1, "another shape"
    assert "do not fit the model" in capsys.readouterr().err
    assert not run.exists()
    assert convert.main([*flags, *settings(text, *shape)]) == 0
    same_as_theirs(run, model, "original", ["cat", "dog"])
    assert convert.main([f"--run={run}", f"--to={tmp_path / 'out.pt'}", "--format=original"]) == 0
    back, there = torch.load(tmp_path / "out.pt", weights_only=True), torch.load(source, weights_only=True)
    assert back.keys() == there.keys()
    assert all(torch.equal(x, back[name]) for name, x in there.items())


def test_what_goes_out_for_hugging_face_comes_in_again(text, tmp_path, capsys):
    model, run, out, again = MODELS["div"], tmp_path / "run", tmp_path / "out", tmp_path / "again"
    nvidia_file(tmp_path / "n.pt", model)
    assert convert.main([f"--weights={tmp_path / 'n.pt'}", f"--run={run}", "--config=nvidia_base",
                         *settings(text)]) == 0
    assert convert.main([f"--run={run}", f"--to={out}", "--format=hf"]) == 0
    assert (out / "vocab.txt").read_text(encoding="utf-8").split("\n") == [*WORDS, ""]
    assert convert.main([f"--weights={out}", f"--run={again}", "--config=nvidia_base", *settings(text)]) == 0
    first, second = (checkpoint.find(folder).shared()["model"] for folder in (run, again))
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    recipes = [json.loads((folder / "recipe.json").read_text()) for folder in (run, again)]
    for recipe in recipes:
        recipe["data"].pop("word_list")
    assert recipes[0] == recipes[1]


def test_safetensors_are_read(tmp_path, text):
    """A file made by hand as the format's description has it: length, header, bytes."""
    model = MODELS["untie_r"]
    hf_folder(tmp_path / "hf", model)
    state = torch.load(tmp_path / "hf" / "pytorch_model.bin", weights_only=True)
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        raw = x.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [len(content), len(content) + len(raw)]}
        content += raw
    raw = json.dumps(header).encode()
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + content)
    run = tmp_path / "run"
    assert convert.main([f"--weights={tmp_path / 'hf'}", f"--run={run}", "--config=wt103_large_paper",
                         *settings(text)]) == 0
    same_as_theirs(run, model, "hf", ["cat"])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(Unconvertible, match=r"model.safetensors is damaged"):
        convert.read(tmp_path / "hf")


class Bomb:
    """What a hostile file holds: unpickled as usual, it makes a file."""

    def __init__(self, path, call=os.mkdir):
        self.path, self.call = path, call

    def __reduce__(self):
        return self.call, (str(self.path),)


@pytest.mark.parametrize("call", [os.mkdir, shutil.rmtree, open], ids=["os", "shutil", "builtins"])
def test_nothing_that_is_pickled_in_a_file_is_run(call, tmp_path):
    target = tmp_path / "target"
    if call is shutil.rmtree:
        target.mkdir()
    before = target.exists()
    nvidia_file(tmp_path / "n.pt", MODELS["div"], optimizer_state=Bomb(target, call))
    hf_folder(tmp_path / "hf", MODELS["untie_r"])
    (tmp_path / "hf" / "vocab.pkl").write_bytes(pickle.dumps(vars(Vocab()) | {"more": Bomb(target, call)}))
    torch.save({"w": Bomb(target, call)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for source in ("n.pt", "hf", "old.pt"):
        with suppress(Unconvertible):                 # read without it or not read at all: either will do
            convert.read(tmp_path / source)
        assert target.exists() == before
    if call is os.mkdir:                              # the bomb is live: read as usual, it goes off
        pickle.loads((tmp_path / "hf" / "vocab.pkl").read_bytes())
        assert target.exists()


class Whole(torch.nn.Module):
    """Stands for the original's model.pt: a module, pickled as it is."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_whole_pickled_model_is_refused_with_the_way_out(new_format, tmp_path):
    torch.save(Whole(), tmp_path / "model.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(Unconvertible, match=r"torch.load\('model.pt', map_location='cpu'\).state_dict\(\)"):
        convert.read(tmp_path / "model.pt")


def test_what_cannot_be_brought_in_is_one_clear_line_and_leaves_nothing(text, tmp_path, capsys):
    def said(source, text=text, config="nvidia_base"):
        run = tmp_path / "run"
        assert convert.main([f"--weights={tmp_path / source}", f"--run={run}", f"--config={config}",
                             *settings(text)]) == 1
        assert sorted(x.name for x in tmp_path.iterdir() if "run" in x.name) == []
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error
    nvidia_file(tmp_path / "n.pt", MODELS["div"])
    whole = (tmp_path / "n.pt").read_bytes()
    for share in (0.5, 0.9):
        (tmp_path / "cut.pt").write_bytes(whole[:int(len(whole) * share)])
        assert "cut.pt is damaged" in said("cut.pt")
    assert "No such file" in said("absent.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds no state dict" in said("list.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    assert "not the weights of a Transformer-XL that is known here: weight" in said("other.pt")
    assert "There is no config 'nvidia_bass'. Did you mean 'nvidia_base'?" in said("n.pt", config="nvidia_bass")
    vocab = Vocab()
    vocab.idx2sym = [*WORDS[:-1], "two words"]
    nvidia_file(tmp_path / "words.pt", MODELS["div"], vocab=vocab)
    assert "vocabulary of 13 words is not one of 13 different words without spaces" in said("words.pt")
    nvidia_file(tmp_path / "bpe.pt", MODELS["div"], vocab=None)
    (tmp_path / "short").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "short" / f"{split}.txt").write_text("a b\n")
    assert "vocabulary of 13 tokens" in said("bpe.pt", text=tmp_path / "short")
    hf_folder(tmp_path / "hf", MODELS["untie_r"])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for change, words in (({"layer_norm_epsilon": 1e-12}, "has layer_norm_epsilon=1e-12; here it is always 1e-05"),
                          ({"attn_type": 2}, "has attn_type=2"), ({"d_model": "8"}, "d_model takes a whole number")):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
        assert words in said("hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"n_layer": 2}))
    assert "The configuration lacks n_head" in said("hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    assert "config.json is damaged" in said("hf")
    (tmp_path / "hf" / "config.json").unlink()
    assert "has no config.json" in said("hf")


def test_flags_that_do_not_go_together_are_misuse(capsys):
    for flags in (["--run=r"], ["--run=r", "--weights=w"], ["--run=r", "--to=t"],
                  ["--run=r", "--weights=w", "--config=c", "--to=t", "--format=hf"],
                  ["--run=r", "--to=t", "--format=hf", "--set=recipe.seed=3"]):
        with pytest.raises(SystemExit) as ended:
            convert.main(flags)
        assert ended.value.code == 2


def test_a_vocabulary_given_as_a_list_keeps_its_order(text, tmp_path):
    """Words of equal count have an order of their own in other projects' files; counting anew would shuffle them."""
    from txl.config import Data
    from txl.data import load
    listed = tmp_path / "vocab.txt"
    listed.write_text("".join(f"{word}\n" for word in reversed(WORDS)), encoding="utf-8")
    data = Data("text", str(text), word_list=str(listed), n_token=V)
    vocab = load(data).vocab
    assert vocab.encode("@-@ cat the") == [0, 2, 11]
    assert load(Data("text", str(text))).vocab.hash != vocab.hash
    assert to_json(data)["word_list"] == str(listed)
