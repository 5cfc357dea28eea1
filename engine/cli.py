"""Flags as a frozen dataclass: python-fire splits the command line, this checks all of it before anything happens.

Fire alone would call the program first and complain of an unknown flag afterwards (google/python-fire #168), evaluate
values as Python, keep the last of repeated flags and look stray words up as members. So it calls a function that only
takes notes.

    @dataclass(frozen=True)
    class Flags:
        name: str = flag("what the run is called")
        machines: int | None = flag("how many", default=None)
        set: tuple[str, ...] = flag("may be given several times", default=())

    flags = parse(Flags, sys.argv[1:], prog="launch.py", about=__doc__)
"""
from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from engine import values

T = TypeVar("T")
_BARE = "\0bare"                                  # stands for the value of a flag that came without one


def flag(about: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a flags class: its line in --help and, unless the flag must be given, its default."""
    return dataclasses.field(default=default, metadata={"about": about})


def parse(flags: type[T], argv: list[str], *, prog: str, about: str, more: Callable[[], str] = str,
          advice: Callable[[str], str | None] = lambda name: None) -> T:
    """The command line as a `flags`. Misuse is one line on stderr and exit status 2; --help prints and exits with 0.

    `about` heads the help and `more()` ends it. `advice` may know what to say of a flag that there is not. A field of
    type tuple may be repeated, any other not; numbers may also stand between commas.
    """
    if "--help" in argv or "-h" in argv:
        print(_help(flags, prog, about) + more())
        raise SystemExit(0)
    try:
        return _checked(flags, argv, advice)
    except values.BadValue as error:
        misuse(f"{error}. The flags: {this_python()} {prog} --help".replace("?.", "?"))


def misuse(message: str) -> NoReturn:
    """Ends the program as misused: the message on stderr, exit status 2."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def this_python() -> str:
    """How to type the Python that runs this: `python` where the shell finds it by that name, else its path.

    In a virtual environment only an activated one counts: a script may have put another first on its own PATH.
    """
    found, this = shutil.which("python"), os.path.abspath(sys.executable)
    by_name = found and os.path.dirname(found) == os.path.dirname(this) and os.path.samefile(found, this)
    if by_name and (sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix):
        return "python"
    relative = os.path.relpath(this)
    return this if relative.startswith(os.pardir) or os.sep not in relative else relative


def _checked(flags: Any, argv: list[str], advice: Callable[[str], str | None]) -> Any:
    hints = typing.get_type_hints(flags)
    given: dict[str, Any] = {}
    for typed, name, text in _split(argv):
        if name not in hints:
            if known_elsewhere := advice(name):
                raise values.BadValue(f"{typed} is {known_elsewhere}")
            near = values.nearest(f"--{name}", [f"--{known}" for known in hints])
            raise values.BadValue(f"There is no flag {typed}.{near}")
        kind, many = hints[name], typing.get_origin(hints[name]) is tuple
        if name in given and not many:
            raise values.BadValue(f"--{name} is given twice. Give it once")
        if text == _BARE and kind is not bool:
            raise values.BadValue(f"--{name} needs a value: --{name}=...")
        if not text:
            raise values.BadValue(f"--{name}= is empty. Give a value or leave it out")
        if many:
            of = typing.get_args(kind)[0]
            given.setdefault(name, []).extend(values.parse(kind, text, f"--{name}") if of in (int, float) else
                                              [values.parse(of, text, f"--{name}")])
        else:
            given[name] = True if text == _BARE else values.parse(kind, text, f"--{name}")
    for f in dataclasses.fields(flags):
        if f.name not in given and f.default is dataclasses.MISSING:
            raise values.BadValue(f"--{f.name} is missing: {f.metadata['about']}")
    return flags(**{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()})


def _split(argv: list[str]) -> Iterator[tuple[str, str, str]]:
    """(flag as typed, its name, its text) in the order given. Raises BadValue on words that belong to no flag."""
    import fire  # 60 ms, so not for --help
    from fire import decorators

    notes: dict[str, str] = {}
    stray = [word for word in argv if word in ("-", "--")]                 # Fire's own separators

    @decorators.SetParseFn(str)
    def take_notes(*words: str, **texts: str) -> None:
        stray.extend(words)
        notes.update(texts)

    fire.Fire(take_notes, command=[] if stray else list(_numbered(argv)), serialize=lambda _: None)
    if stray:
        raise values.BadValue(f"What is {stray[0]!r} for? Everything is a flag: --name=value")
    for key, text in sorted(notes.items(), key=lambda note: int(note[0].split(".")[0])):
        index, _, name = key.partition(".")
        yield argv[int(index)].split("=")[0], name, text


def _numbered(argv: list[str]) -> Iterator[str]:
    """--set=a --set=b --nospot as --0.set=a --1.set=b --2.nospot=BARE: Fire drops none, and makes none 'True'."""
    is_flag = [word.startswith("--") or (word[:1] == "-" and word[1:2].isalpha()) for word in argv] + [True]
    for i, word in enumerate(argv):
        bare = is_flag[i] and "=" not in word and is_flag[i + 1]
        yield (f"--{i}.{word.lstrip('-')}" if is_flag[i] else word) + (f"={_BARE}" if bare else "")


def _help(flags: type, prog: str, about: str) -> str:
    examples = re.sub(r"^( +)python ", lambda indent: f"{indent[1]}{this_python()} ", about.strip(), flags=re.MULTILINE)
    lines = [examples, "", f"Flags of {prog}:"]
    for f in dataclasses.fields(flags):
        kind = typing.get_type_hints(flags)[f.name]
        lines.append(f"  --{f.name + ('' if kind is bool else '=' + _placeholder(kind)):<24} {f.metadata['about']}")
    return "\n".join(lines) + "\n"


def _placeholder(kind: Any) -> str:
    args = [a for a in typing.get_args(kind) if a not in (type(None), ...)]
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, args))
    return {int: "N", float: "X"}.get(args[0] if args else kind, "TEXT")
