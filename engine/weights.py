"""Weights that a training takes from elsewhere, and those that it leaves as they are."""
from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from engine import checkpoint
from engine.values import BadValue


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Parameters by name, or pattern of names, that are not trained. Raises BadValue of a pattern without any, and
    where nothing is left to train."""
    for pattern in patterns:
        found = [p for name, p in model.named_parameters() if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise BadValue(f"No parameter is called {pattern}, which is to be frozen. There are: "
                           f"{span([name for name, _ in model.named_parameters()])}")
        for p in found:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise BadValue("All parameters are frozen: nothing would be trained")


def load_weights(model: nn.Module, source: checkpoint.Checkpoint, vocabulary: str, *, partly: bool = False
                 ) -> list[str]:
    """The model's weights from a checkpoint, as `set_weights` does. Raises CheckpointError where they are of another
    vocabulary, too."""
    source.check_vocabulary(vocabulary)
    return set_weights(model, source.shared("cpu")["model"], source.path, partly=partly)


def set_weights(model: nn.Module, weights: dict[str, Tensor], path: Path, *, partly: bool = False) -> list[str]:
    """Weights into a model. With `partly`, of a smaller one: the others stay, and are named.

    Raises CheckpointError, naming the tensors and `path`, where they come from, where they do not fit.
    """
    own = model.state_dict()
    new = [name for name in own if name not in weights] if partly else []
    shapes = [{name: tuple(x.shape) for name, x in state.items()}
              for state in (weights, {name: x for name, x in own.items() if name not in new})]
    wrong = [f"{name} is {shapes[0].get(name, 'absent')} there and {shapes[1].get(name, 'absent')} here"
             for name in dict(shapes[0] | shapes[1]) if shapes[0].get(name) != shapes[1].get(name)]
    if wrong:
        more = f", and {len(wrong) - 3} more tensors" if len(wrong) > 3 else ""
        raise checkpoint.CheckpointError(f"The weights of {path} do not fit this model: {'; '.join(wrong[:3])}{more}. "
                                         f"Use the recipe.model that they were trained as, in the recipe.json of their "
                                         f"run, or start without them, under another name")
    model.load_state_dict(weights, strict=not partly)
    return new


def span(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 6 else f"{', '.join(names[:3])} … {names[-1]}"
