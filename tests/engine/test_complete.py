from __future__ import annotations

import json

import pytest

from engine.complete import intact

META = {"step": 20, "ranks": 1, "valid_loss": None, "vocabulary": "v", "files": {"model.pt": 3}}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"123")
    (tmp_path / "meta.json").write_text(json.dumps(META))
    return tmp_path


def test_a_whole_checkpoint_gives_its_meta_json(path):
    assert intact(path) == META


@pytest.mark.parametrize("content", [b"12", b"1234", None])
def test_a_model_of_another_size_or_none_is_not_whole(content, path):
    (path / "model.pt").unlink()
    if content is not None:
        (path / "model.pt").write_bytes(content)
    assert intact(path) is None


@pytest.mark.parametrize("content", [b"12", None])
def test_a_file_of_a_rank_may_be_damaged_or_on_another_machine(content, path):
    meta = META | {"files": {"model.pt": 3, "rank-0.pt": 4}}
    (path / "meta.json").write_text(json.dumps(meta))
    if content is not None:
        (path / "rank-0.pt").write_bytes(content)
    assert intact(path) == meta


def test_a_meta_json_that_does_not_list_the_model_is_not_whole(path):
    """That of a machine which has only its ranks' files."""
    (path / "meta.json").write_text(json.dumps(META | {"files": {"rank-1.pt": 3}}))
    assert intact(path) is None


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b'"x"', b'{"files": {}}', b'{"files": 3, "step": 20}'])
def test_a_meta_json_that_says_something_else_is_not_whole(text, path):
    (path / "meta.json").write_bytes(text)
    assert intact(path) is None


def test_an_empty_folder_is_not_whole(tmp_path):
    assert intact(tmp_path) is None
    assert intact(tmp_path / "none") is None
