from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from engine import cli
from engine.cli import flag, parse, this_python


@dataclass(frozen=True)
class Flags:
    config: str = flag("what to train")
    name: str | None = flag("of the run", None)
    dry_run: bool = flag("print only", False)
    machines: int | None = flag("how many", None)
    rate: float = flag("per second", 1.0)
    split: Literal["train", "valid"] = flag("which", "valid")
    set: tuple[str, ...] = flag("may be repeated", ())


def parsed(*argv: str) -> Flags:
    return parse(Flags, list(argv), prog="prog.py", about="What it does.", more=lambda: "And more.")


@pytest.mark.parametrize("argv", [
    ["--config=a", "--dry_run", "--machines=2"],
    ["--config", "a", "--dry-run", "--machines", "2"],
    ["--dry_run", "--machines=2", "--config=a"],
    ["--dry_run=true", "--machines=2e0", "--config=a"],
])
def test_a_flag_is_understood_in_every_usual_spelling(argv):
    assert parsed(*argv) == Flags("a", dry_run=True, machines=2)


def test_numbers_stand_between_commas_or_in_flags_of_their_own_but_a_text_keeps_its_commas():
    @dataclass(frozen=True)
    class Many:
        length: tuple[int, ...] = flag("how long", ())
        set: tuple[str, ...] = flag("may be repeated", ())
    given = parse(Many, ["--length=1,2", "--set=a,b", "--length=30", "--set=c"], prog="prog.py", about="")
    assert given == Many((1, 2, 30), ("a,b", "c"))


def test_a_value_is_what_was_typed_and_not_evaluated_as_python():
    assert parsed("--config=1e3", "--name=[1,2]", "--rate=1e3") == Flags("1e3", name="[1,2]", rate=1000.0)
    assert parsed("--config=True", "--name=None-such") == Flags("True", name="None-such")
    assert parsed("--config=a=b", "--name", "x y") == Flags("a=b", name="x y")


def test_only_a_list_may_be_repeated_and_keeps_its_order_and_its_commas():
    assert parsed("--set=a=1,2", "--config=a", "--set", "b=2", "--set=a=1,2").set == ("a=1,2", "b=2", "a=1,2")


@pytest.mark.parametrize(("argv", "message"), [
    (["--confg=a"], "no flag --confg. Did you mean '--config'?"),
    (["--config=a", "--nodry_run"], "no flag --nodry_run. Did you mean '--dry_run'?"),
    (["--config=a", "-m", "2"], "no flag -m."),
    (["--config=a", "train"], "What is 'train' for?"),
    (["train", "--config=a"], "What is 'train' for?"),
    (["--config=a", "-", "upper"], "What is '-' for?"),
    (["--config=a", "--", "--interactive"], "What is '--' for?"),
    (["--config=a", "--config=b"], "--config is given twice"),
    (["--config=a", "--dry_run", "--dry-run"], "--dry_run is given twice"),
    (["--config=a", "--name"], "--name needs a value"),
    (["--config=a", "--name", "--dry_run"], "--name needs a value"),
    (["--config=a", "--set"], "--set needs a value"),
    (["--config=a", "--name="], "--name= is empty"),
    (["--config=a", "--dry_run", "yesterday"], "--dry_run takes true or false, not 'yesterday'"),
    (["--config=a", "--machines=two"], "--machines takes a whole number or none, not 'two'"),
    (["--config=a", "--machines=1.5"], "--machines takes a whole number or none, not '1.5'"),
    (["--config=a", "--machines=1e400"], "--machines takes a whole number"),
    (["--config=a", "--rate=fast"], "--rate takes a number, not 'fast'"),
    (["--config=a", "--split=vlid"], "--split must be one of train, valid, not 'vlid'. Did you mean 'valid'?"),
    ([], "--config is missing: what to train"),
])
def test_misuse_is_said_on_stderr_and_ends_with_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(*argv)
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert out == ""


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["--config=a", "--help"], ["nonsense", "--confg", "-h"]])
def test_help_is_printed_wherever_it_is_asked_for(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        parsed(*argv)
    assert ended.value.code == 0
    assert capsys.readouterr().out == """\
What it does.

Flags of prog.py:
  --config=TEXT              what to train
  --name=TEXT                of the run
  --dry_run                  print only
  --machines=N               how many
  --rate=X                   per second
  --split=train|valid        which
  --set=TEXT                 may be repeated
And more.
"""


@pytest.fixture
def env(tmp_path, monkeypatch):
    """A virtual environment at .venv whose Python runs this, first on the PATH but not activated."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "python3.11"):
        (tmp_path / ".venv" / "bin" / name).symlink_to(Path(sys.executable).resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python3.11"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setenv("PATH", str(tmp_path / ".venv" / "bin"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    return tmp_path


def test_only_in_an_activated_environment_is_python_called_python(env, monkeypatch):
    assert this_python() == ".venv/bin/python3.11"
    monkeypatch.setenv("VIRTUAL_ENV", str(env / ".venv"))
    assert this_python() == "python"
    monkeypatch.setenv("PATH", "/nowhere")
    assert this_python() == ".venv/bin/python3.11"


def test_outside_environments_python_is_called_python_where_the_shell_finds_this_one(env, monkeypatch):
    monkeypatch.setattr(sys, "base_prefix", sys.prefix)
    assert this_python() == "python"
    (env / ".venv" / "bin" / "python").unlink()
    assert this_python() == ".venv/bin/python3.11"
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "executable", "/elsewhere/bin/python")
    monkeypatch.chdir(env)
    assert this_python() == "/elsewhere/bin/python"


def test_examples_and_the_way_to_help_name_the_python_that_runs(monkeypatch, capsys):
    monkeypatch.setattr(cli, "this_python", lambda: "env/python")
    with pytest.raises(SystemExit):
        parse(Flags, ["--help"], prog="prog.py", about="Trains.\n\n    python prog.py --config=a     in python\n")
    assert "\n    env/python prog.py --config=a     in python\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        parsed()
    assert "The flags: env/python prog.py --help" in capsys.readouterr().err
