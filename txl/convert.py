"""Weights of other Transformer-XL code as a run of ours, and ours as theirs (docs/weights.md).

    python -m txl.convert --weights=transfo-xl-wt103 --run=runs/xl --config=wt103_large_paper   # Hugging Face: a folder
    python -m txl.convert --weights=checkpoint_best.pt --run=runs/xl --config=nvidia_base       # NVIDIA
    python -m txl.convert --weights=state.pt --run=runs/xl --config=wt103_base_paper            # the original
    python -m txl.convert --run=runs/xl --to=xl.pt --format=original

The config tells what a file does not: data, batch, optimizer, and for the original the model too. No code that is
pickled in a file is ever run.
"""
from __future__ import annotations

import argparse
import json
import pickle
import shutil
import sys
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from configs import CONFIGS
from engine import checkpoint
from engine.cli import flag, misuse, parse
from engine.values import BadValue, nearest, override, to_json
from engine.world import world
from txl import dialects, options
from txl.config import Recipe
from txl.data import DataError, load
from txl.dialects import Dialect, Unconvertible
from txl.task import read_recipe
from txl.vocab import WordVocab

STATE_DICT_ONLY = ("python -c \"import torch; torch.save(torch.load('model.pt', map_location='cpu').state_dict(), "
                   "'state.pt')\"")


@dataclass(frozen=True)
class Flags:
    run: str = flag("folder of a run: made by --weights, read by --to")
    weights: str | None = flag("what to bring in: Hugging Face's folder, NVIDIA's checkpoint, or a state dict",
                               default=None)
    config: str | None = flag("with --weights: the config that tells what the file does not", default=None)
    set: tuple[str, ...] = flag("with --weights: change the config, as for launch.py: recipe.data.dir=FOLDER",
                                default=())
    to: str | None = flag("where to write the run's weights; for hf a folder", default=None)
    format: Literal["original", "nvidia", "hf"] | None = flag("with --to: whose", default=None)


@dataclass(frozen=True)
class Foreign:
    """What was read: a state dict, and what came with it."""
    state: dict[str, Tensor]
    config: dict[str, Any] | None                 # their model's
    vocab: dict[str, Any] | None                  # the attributes of their Vocab


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m txl.convert", about=__doc__, advice=options.advice)
    inwards = flags.weights is not None and flags.config is not None and flags.to is None and flags.format is None
    outwards = (flags.to is not None and flags.format is not None and flags.weights is None and flags.config is None
                and not flags.set)
    if not inwards and not outwards:
        misuse("Give --weights and --config to bring weights in, or --to and --format to take them out")
    try:
        if flags.weights is not None:
            print(bring_in(Path(flags.weights), Path(flags.run), _recipe(flags.config or "", flags.set)))
        elif flags.to is not None and flags.format is not None:
            print(take_out(Path(flags.run), Path(flags.to), flags.format))
    except (Unconvertible, BadValue, DataError, checkpoint.CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def bring_in(source: Path, run: Path, recipe: Recipe) -> str:
    """Makes the run's folder: recipe, vocabulary if the file has one, checkpoint. Says what was done. Raises
    Unconvertible, BadValue, DataError, CheckpointError, leaving no folder."""
    if run.exists():
        raise Unconvertible(f"{run} is there already. Give another folder with --run")
    foreign = read(source)
    dialect = dialects.dialect_of(foreign.state)
    model = recipe.model if foreign.config is None else dialects.model_of(foreign.config, dialect, recipe.model)
    weights = dialects.to_ours(foreign.state, model, dialect)
    n_token = len(weights["vocabulary.bias"])
    partial = run.with_name(f".{run.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if foreign.vocab is None:
            vocabulary, has = _prepared(recipe, n_token), "the vocabulary of " + recipe.data.dir
        else:
            vocabulary, has = _given(foreign.vocab, partial / "vocab.txt", n_token, recipe), "its own vocabulary"
        data = replace(recipe.data, n_token=n_token) if foreign.vocab is None else replace(
            recipe.data, n_token=n_token, vocab="word", word_list=str(run / "vocab.txt"),
            lower_case=bool(foreign.vocab.get("lower_case")))
        recipe = replace(recipe, model=model, data=data)
        (partial / "recipe.json").write_text(json.dumps(to_json(recipe), indent=1))
        with world() as w:
            checkpoint.save(w, partial / "checkpoints", 0, {"model": weights}, {},
                            {"tokens": 0, "valid_loss": None, "vocabulary": vocabulary}, keep=1)
        (partial / "status.json").write_text(json.dumps(
            {"state": "finished", "step": 0, "message": f"weights of {source}, brought in by txl.convert"}))
        partial.rename(run)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    count = sum(x.numel() for x in weights.values())
    same_words = f" --set=recipe.data.word_list={data.word_list}" if foreign.vocab is not None else ""
    return (f"{run} has the {count:,} parameters of {source} ({dialect}) with {has}, {n_token:,} tokens.\n"
            f"Next:  python -m txl.evaluate --run={run}\n"
            f"       python launch.py --config=NAME --set=recipe.init_from={run}{same_words}")


def take_out(run: Path, target: Path, dialect: Dialect) -> str:
    """Writes the run's weights as `dialect`'s code reads them. Says what was done."""
    if target.exists():
        raise Unconvertible(f"{target} is there already. Give another name with --to")
    found = checkpoint.find(run)
    recipe = read_recipe(found.path.parent.parent / "recipe.json")
    weights = found.shared()["model"]
    state = dialects.from_ours(weights, recipe.model, dialect)
    n_token = len(weights["vocabulary.bias"])
    if dialect == "original":
        torch.save(state, target)
        return f"{target} has the state dict of {found.path}. Build the same model there and load_state_dict it"
    config = dialects.config_of(recipe.model, n_token, dialect)
    context = recipe.test_context or recipe.eval_context
    lengths = {"tgt_len": context.tgt_len, "ext_len": context.ext_len, "mem_len": context.mem_len,
               "clamp_len": context.clamp_len or -1, "same_length": context.same_length}
    if dialect == "nvidia":
        torch.save({"args": argparse.Namespace(vocab=recipe.data.vocab), "model_config": config | lengths,
                    "model_state": state}, target)
        return f"{target} has the weights of {found.path}, for NVIDIA's eval.py --model={target}"
    corpus = load(recipe.data)
    found.check_vocabulary(corpus.vocab.hash)
    target.mkdir(parents=True)
    torch.save(state, target / "pytorch_model.bin")
    (target / "config.json").write_text(json.dumps(config | lengths, indent=1))
    if isinstance(corpus.vocab, WordVocab):
        (target / "vocab.txt").write_text(corpus.vocab.content() + "\n", encoding="utf-8")
    return f"{target} has the weights of {found.path}, for TransfoXLLMHeadModel.from_pretrained"


def read(source: Path) -> Foreign:
    """What is in their file or folder; nothing in it is run. Raises Unconvertible where it cannot be read."""
    if source.is_dir():
        weights = _first(source, "model.safetensors", "pytorch_model.bin")
        names = [name for name in ("vocab.pkl", "vocab.bin", "vocab.txt") if (source / name).exists()]
        config = _config(_first(source, "config.json"))
        state = read_safetensors(weights) if weights.suffix == ".safetensors" else read_torch(weights)
        return Foreign(_tensors(state, weights), config, read_vocab(source / names[0]) if names else None)
    content = read_safetensors(source) if source.suffix == ".safetensors" else read_torch(source)
    if isinstance(content, dict) and "model_state" in content:
        told: dict[str, Any] = content
        vocab = getattr(told.get("vocab"), "__dict__", {})
        return Foreign(_tensors(told["model_state"], source), told.get("model_config"),
                       vocab if "idx2sym" in vocab else None)
    return Foreign(_tensors(content, source), None, None)


class Inert:
    """Stands for whatever a pickle names and nobody vouched for: it can be called, does nothing, and keeps what is
    set as its state, so that a Vocab's words can be read without the class Vocab."""

    def __new__(cls, *args: Any, **kwargs: Any):
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):                # numpy's are tuples
            self.__dict__.update(state)


def read_torch(path: Path) -> Any:
    """What torch.save wrote, by torch's weights_only, with an Inert for each class that it would refuse."""
    with open(path, "rb"):                         # an OSError of torch's own is one of a damaged file
        pass
    try:
        strange = get_unsafe_globals_in_checkpoint(path) if zipfile.is_zipfile(path) else []
        with safe_globals([(Inert, name) for name in strange]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Unconvertible(f"{path} is damaged, or holds more than tensors in a form that cannot be read without "
                            f"running it. If it is a whole model, save its tensors in the project that made it: "
                            f"{STATE_DICT_ONLY}") from error
    except Exception as error:                     # a damaged file fails in many ways, in zipfile, pickle or torch
        raise Unconvertible(f"{path} is damaged or was not written by torch.save ({type(error).__name__}). "
                            f"Get it anew") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file: eight bytes of length, a JSON header with type, shape and place of every tensor, bytes."""
    try:
        with open(path, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            content = bytearray(f.read())
        header.pop("__metadata__", None)
        return {name: torch.frombuffer(content[slice(*about["data_offsets"])], dtype=_DTYPES[about["dtype"]]
                                       ).reshape(about["shape"]) for name, about in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError, RuntimeError) as error:
        raise Unconvertible(f"{path} is damaged or no safetensors file ({type(error).__name__}: {error}). "
                            f"Get it anew") from error


def read_vocab(path: Path) -> dict[str, Any]:
    """The attributes of Hugging Face's tokenizer: `idx2sym`, the words in the order of their ids, among them."""
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").split("\n")
        return {"idx2sym": [line.split()[0] for line in lines if line.strip()]}
    content = read_torch(path) if zipfile.is_zipfile(path) else None
    try:
        with open(path, "rb") as f:
            while not (isinstance(content, dict) and "idx2sym" in content):
                content = _Unpickler(f).load()     # torch.save's old format is several pickles, one after the other
    except Exception as error:                     # a damaged pickle fails in many ways
        raise Unconvertible(f"{path} is damaged, or has no idx2sym, the list of words ({type(error).__name__}). "
                            f"Get it anew, or put vocab.txt in its place, a word a line in the order of ids") from error
    return content


class _Unpickler(pickle.Unpickler):
    """Finds nothing but two harmless containers, so nothing else can be called."""

    def find_class(self, module: str, name: str) -> Any:
        return {("collections", x.__name__): x for x in (Counter, OrderedDict)}.get((module, name), Inert)


def _given(vocab: dict[str, Any], path: Path, n_token: int, recipe: Recipe) -> str:
    """Writes the words, one a line; the hash of what that means here."""
    words = [str(word) for word in vocab["idx2sym"]] if isinstance(vocab["idx2sym"], list) else []
    path.write_text("\n".join(words) + "\n", encoding="utf-8", newline="\n")
    closed = WordVocab.closed(path, end=recipe.data.end_of_line)
    if closed.size != n_token or closed.content().split("\n") != words:
        raise Unconvertible(f"The vocabulary of {len(words):,} words is not one of {n_token:,} different words without "
                            f"spaces, for which the weights are")
    return closed.hash


def _prepared(recipe: Recipe, n_token: int) -> str:
    """The hash of the vocabulary of the recipe's text."""
    corpus = load(replace(recipe.data, n_token=None) if recipe.data.vocab == "word" else recipe.data)
    if corpus.n_token != n_token:
        raise Unconvertible(f"The weights are for a vocabulary of {n_token:,} tokens, and {recipe.data.dir} has one of "
                            f"{corpus.n_token:,}. Name the text they were trained on: --set=recipe.data.dir=FOLDER")
    return corpus.vocab.hash


def _recipe(name: str, changes: tuple[str, ...]) -> Recipe:
    if name not in CONFIGS:
        raise BadValue(f"There is no config {name!r}.{nearest(name, CONFIGS)} python launch.py --help lists them")
    recipe = override(CONFIGS[name], *changes).recipe
    if not isinstance(recipe, Recipe):
        raise BadValue(f"{name} is not a config of Transformer-XL")
    return recipe


def _first(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise Unconvertible(f"{folder} has no {' and no '.join(names)}. Give a folder as Hugging Face's save_pretrained "
                        f"writes it, or a file of weights")


def _config(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Unconvertible(f"{path} is damaged ({error}). Get it anew") from error


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Inert):
        raise Unconvertible(f"{path} is a whole pickled model, whose code is not run here. Save its tensors in the "
                            f"project that made it: {STATE_DICT_ONLY}")
    if not isinstance(content, dict) or not all(isinstance(x, Tensor) for x in content.values()):
        raise Unconvertible(f"{path} holds no state dict, a dictionary of tensors by name, but a "
                            f"{type(content).__name__}")
    return content


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
           "I64": torch.int64}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
