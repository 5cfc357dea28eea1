"""Frozen dataclasses as data: to JSON and back, one typed override, the difference of two. Standard library only.

A value that does not fit its field's type is an error that names the field, what came and what fits;
nothing is coerced silently, and no key is ignored.
"""
from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


class BadValue(ValueError):
    """A value does not fit the type of its field. The message is meant for the user as it stands."""


def to_json(value: Any) -> Any:
    """A dataclass as dictionaries, lists and scalars; `from_json` of its type gives it back."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return [to_json(x) for x in value] if isinstance(value, (tuple, list)) else value


def from_json(kind: type[T], data: Any, where: str = "") -> T:
    """`data` as a value of type `kind`, checked all the way down.

    Raises BadValue, naming the path `where`, on an unknown or missing key and on a value of another type.
    """
    return _fit(kind, data, where or kind.__name__.lower(), parse=False)


def parse(kind: Any, text: str, where: str) -> Any:
    """What a person typed, as a value of type `kind`: 0.02, 1e9, true, none, a,b,c. Raises BadValue."""
    return _fit(kind, text, where, parse=True)


def override(value: T, *assignments: str) -> T:
    """`value` with fields replaced: override(config, "recipe.optim.lr=0.02", "recipe.seed=3"). Raises BadValue.

    All of them take effect at once, so that fields which exclude each other can be exchanged. A path's first
    word is a field of `value`.
    """
    texts: dict[str, str] = {}
    for assignment in assignments:
        path, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not path:
            raise BadValue(f"{assignment!r} is not an assignment. "
                           f"Write it as PATH=VALUE, for example recipe.optim.lr=0.02")
        clash = next((old for old in texts if f"{path}.".startswith(f"{old}.") or f"{old}.".startswith(f"{path}.")),
                     None)
        if clash:
            raise BadValue(f"{clash}={texts[clash]} and {path}={text} set the same thing. Give one of them")
        texts[path] = text
    return _replace(value, "", texts) if texts else value


def differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    """One line for each leaf in which two values of a type differ: 'optim.lr: 0.01 -> 0.02'."""
    if dataclasses.is_dataclass(old) and type(old) is type(new):
        for f in dataclasses.fields(old):
            yield from differences(getattr(old, f.name), getattr(new, f.name), f"{where}.{f.name}".lstrip("."))
    elif old != new:
        yield f"{where}: {old} -> {new}"


def nearest(word: str, words: Iterable[Any]) -> str:
    """ Did you mean 'that'? - with a space before it, or nothing where no word is near."""
    close = difflib.get_close_matches(word, [str(w) for w in words], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _replace(value: Any, where: str, texts: dict[str, str]) -> Any:
    """`value` with the fields at the paths `texts`; `where` is the path to `value` itself, for messages."""
    hints, new = _hints(type(value)), {}
    for name, inner in _by_first_word(texts).items():
        path = f"{where}{name}"
        if name not in hints:
            raise BadValue(f"{path}: {type(value).__name__} has no field {name!r}.{nearest(name, hints)} "
                           f"It has: {', '.join(hints)}")
        old = getattr(value, name)
        if "" not in inner:
            if not dataclasses.is_dataclass(old):
                raise BadValue(f"{path}.{next(iter(inner))}: {name} is {old!r} and has no fields of its own")
            new[name] = _replace(old, f"{path}.", inner)
        elif dataclasses.is_dataclass(old) and inner[""].lower() != "none" and _dataclass_only(hints[name]):
            raise BadValue(f"{path} is a group of fields; set one of them: "
                           f"{', '.join(f'{path}.{x}' for x in _hints(type(old)))}")
        else:
            new[name] = parse(hints[name], inner[""], path)
    try:
        return dataclasses.replace(value, **new)
    except BadValue:
        raise
    except ValueError as error:                          # the dataclass's own __post_init__ refuses it
        raise BadValue(f"{', '.join(f'{where}{path}={text}' for path, text in texts.items())}: {error}") from error


def _by_first_word(texts: dict[str, str]) -> dict[str, dict[str, str]]:
    """{"a.b": "1", "a.c": "2", "d": "3"} as {"a": {"b": "1", "c": "2"}, "d": {"": "3"}}."""
    groups: dict[str, dict[str, str]] = {}
    for path, text in texts.items():
        first, _, rest = path.partition(".")
        groups.setdefault(first, {})[rest] = text
    return groups


def _fit(kind: Any, data: Any, where: str, parse: bool) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return _fit_union(args, data, where, parse)
    if origin is typing.Literal:
        if data in args:
            return data
        raise BadValue(f"{where} must be one of {', '.join(map(str, args))}, not {data!r}.{nearest(str(data), args)}")
    if origin is tuple:
        items = ([x for x in data.strip("()[] ").split(",") if x.strip()] if parse else data)
        if not isinstance(items, (list, tuple)):
            raise _bad(kind, data, where)
        kinds = [args[0]] * len(items) if args[1:] == (...,) else list(args)
        if len(kinds) != len(items):
            raise BadValue(f"{where} takes {len(kinds)} values, not {len(items)}: {data!r}")
        return tuple(_fit(k, x.strip() if parse else x, f"{where}[{i}]", parse)
                     for i, (k, x) in enumerate(zip(kinds, items)))
    if dataclasses.is_dataclass(kind):
        return _fit_dataclass(kind, data, where)
    return _fit_scalar(kind, data, where, parse)


def _fit_union(kinds: tuple, data: Any, where: str, parse: bool) -> Any:
    """The first member that takes the data; None before the rest, so that 'none' is not a string."""
    for kind in sorted(kinds, key=lambda k: (k is not type(None), k is str)):
        try:
            return _fit(kind, data, where, parse)
        except BadValue as error:
            if dataclasses.is_dataclass(kind) and isinstance(data, dict):
                raise error                                # the shape fits, so its message is the useful one
    raise _bad(typing.Union[kinds], data, where)  # noqa: UP007 - built from a tuple


def _fit_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _bad(kind, data, where)
    hints = _hints(kind)
    for key in data:
        if key not in hints:
            raise BadValue(f"{where}: unknown key {key!r}.{nearest(key, hints)}")
    needed = [f.name for f in dataclasses.fields(kind)
              if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    missing = [name for name in needed if name not in data]
    if missing:
        raise BadValue(f"{where}: missing {', '.join(missing)}")
    fields = {key: _fit(hints[key], x, f"{where}.{key}", parse=False) for key, x in data.items()}
    try:
        return kind(**fields)
    except BadValue:
        raise
    except ValueError as error:
        raise BadValue(f"{where}: {error}") from error


def _fit_scalar(kind: Any, data: Any, where: str, parse: bool) -> Any:
    if parse:
        try:
            return _PARSERS[kind](data)
        except (ValueError, KeyError, OverflowError) as error:
            raise _bad(kind, data, where) from error
    if kind is float and type(data) is int:
        return float(data)
    if type(data) is kind or (kind is type(None) and data is None):
        return data
    raise _bad(kind, data, where)


def _parse_int(text: str) -> int:
    number = float(text)                                   # 1.8e9 tokens is a whole number too
    if number != int(number):
        raise ValueError(text)
    return int(text.replace("_", "")) if text.replace("_", "").lstrip("+-").isdigit() else int(number)


def _parse_float(text: str) -> float:
    number = float(text)
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(text)
    return number


_PARSERS: dict[Any, Any] = {
    int: _parse_int, float: _parse_float, str: str,
    bool: lambda text: {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[text.lower()],
    type(None): lambda text: {"none": None, "null": None}[text.lower()],
}


def _bad(kind: Any, data: Any, where: str) -> BadValue:
    return BadValue(f"{where} takes {_describe(kind)}, not {data!r}")


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(k) for k in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    return words.get(kind) or str(getattr(kind, "__name__", kind))


def _dataclass_only(kind: Any) -> bool:
    return all(dataclasses.is_dataclass(k) or k is type(None) for k in typing.get_args(kind) or (kind,))


def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}
