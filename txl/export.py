"""A run as one file that needs torch and no more: `torch.export`'s graph and weights, with the vocabulary in it.

    python -m txl.export --run=runs/demo --output=demo.pt2
    python demo.py --text="def main(argv):"               # demo.py comes with it, and needs nothing of this project
    python demo.py --prompt="def main(" --length=50 --temperature=0.8
"""
from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from engine.checkpoint import CheckpointError
from engine.cli import flag, misuse, parse
from engine.values import BadValue, override
from engine.world import World
from txl import exported, options
from txl.config import Context
from txl.data import DataError
from txl.memory import Hidden, Memory
from txl.model import TransformerXL
from txl.trained import restore
from txl.vocab import BpeVocab, CharVocab, Vocab, WordVocab


@dataclass(frozen=True)
class Flags:
    run: str = flag("folder of the run, or of one of its checkpoints; of a run the best is taken")
    output: str = flag("the .pt2 file to write; beside it comes a .py of the same name, which reads it")
    tgt_len: int | None = flag("tokens scored at a time; unless given, the recipe's for the test", default=None)
    mem_len: int | None = flag("tokens remembered: fixed in the file, as are those below", default=None)
    clamp_len: int | None = flag("cap of the distance that positions express", default=None)
    same_length: bool = flag("every token sees exactly mem_len before it", default=False)


class Step(nn.Module):
    """Tokens [B, T], memory [L, B, M, D] and how much of it is real [B]; log p of every next token [B, T, V], and the
    next two."""

    def __init__(self, net: TransformerXL, context: Context):
        super().__init__()
        self.net, self.context = net, context

    def forward(self, tokens_BT: Tensor, memory_LBMD: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        memory: Memory = memory_LBMD, length_B.view(-1, 1, 1, 1)
        hidden_BTD, memory = self.net.hidden(tokens_BT, memory, self.context)
        memory_LBMD, length = cast(Hidden, memory)
        log_prob_RV = self.net.vocabulary.log_prob(hidden_BTD.flatten(0, 1))
        return log_prob_RV.unflatten(0, tokens_BT.shape), memory_LBMD, cast(Tensor, length).view(-1)


def main(argv: list[str]) -> int:
    flags = parse(Flags, argv, prog="-m txl.export", about=__doc__, advice=options.advice)
    output = Path(flags.output)
    if output.suffix != ".pt2":
        misuse(f"--output must end in .pt2, not {output.name}")
    try:
        print(export(Path(flags.run), output, [f"{name}={x}" for name, x in vars(flags).items()
                                               if name not in ("run", "output") and x is not None and x is not False]))
    except (BadValue, DataError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def export(run: Path, output: Path, changes: list[str]) -> str:
    """Writes the run's best weights for torch.export.load, with a loader beside them; `changes` to the recipe's context
    of the test. Says what was done. Raises BadValue, DataError, CheckpointError."""
    loader = output.with_suffix(".py")
    for path in (output, loader):
        if path.exists():
            raise BadValue(f"{path} is there already. Give another name with --output, or remove it")
    trained = restore(run, World(0, 0, 1, torch.device("cpu")))
    context = override(trained.recipe.context_of("test"), *changes)
    if context.ext_len:
        raise BadValue(f"The test of {trained.folder} re-reads {context.ext_len} tokens (ext_len), which an exported "
                       f"model does not. Set ext_len to 0 in {trained.folder / 'recipe.json'}")
    model = trained.recipe.model
    about = {"n_layer": model.n_layer, "d_model": model.d_model, "tgt_len": context.tgt_len,
             "mem_len": context.mem_len, "step": trained.checkpoint.step, "vocabulary": portable(trained.corpus.vocab)}
    partial = output.with_name(f".{output.stem}.partial.pt2")
    try:
        torch.export.save(program(trained.net, context), str(partial), extra_files={exported.ABOUT: json.dumps(about)})
        shutil.copyfile(exported.__file__, loader)
        partial.replace(output)
    except (OSError, RuntimeError) as error:                  # torch's writer raises the latter of a full disk
        partial.unlink(missing_ok=True)
        raise BadValue(f"{output} could not be written ({error}). Make room or give another --output") from error
    return (f"{output} has the weights of {trained.checkpoint.path} in fp32, reads {context.tgt_len} tokens at a time "
            f"and remembers {context.mem_len}. Try it: python {loader} --prompt=\"\"")


def program(net: TransformerXL, context: Context) -> ExportedProgram:
    """The graph of `Step`, for any number of streams and tokens. It holds no example of its input: nothing in its file
    is pickled."""
    example = (torch.zeros(2, 3, dtype=torch.long),
               torch.zeros(net.config.n_layer, 2, context.mem_len, net.config.d_model),
               torch.zeros(2, dtype=torch.long))
    batch, length = Dim("batch"), Dim("length")
    with torch.no_grad():
        graph = torch.export.export(Step(net, context).eval(), example, dynamic_shapes=(
            {0: batch, 1: length}, {1: batch}, {0: batch}))
    graph.example_inputs = None
    return graph


def portable(vocab: Vocab) -> dict[str, Any]:
    """A vocabulary as JSON, all that exported.py needs."""
    about: dict[str, Any] = {"kind": vocab.kind, "start": vocab.start}
    if isinstance(vocab, WordVocab):
        return about | {"tokens": vocab.content().split("\n"), "unk": vocab.unk, "lower_case": vocab.lower_case}
    if isinstance(vocab, CharVocab):
        return about | {"tokens": list(vocab.content()), "unk": vocab.unk, "lower_case": vocab.lower_case}
    if isinstance(vocab, BpeVocab):
        tokenizer = json.loads(vocab.content())
        ids = tokenizer["model"]["vocab"] | {x["content"]: x["id"] for x in tokenizer["added_tokens"]}
        merges = [x.split(" ") if isinstance(x, str) else x for x in tokenizer["model"]["merges"]]
        return about | {"tokens": sorted(ids, key=ids.__getitem__), "merges": merges}
    return about


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
