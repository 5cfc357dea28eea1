"""Downloads from a real server on the loopback, archives made on the spot."""
import hashlib
import http.server
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from txl import datasets
from txl.datasets import LM1B_HELD_OUT, LM1B_SHARDS, SOURCES, DataError, File, download, fetch

BODY = bytes(range(256)) * 4000


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY and notes what it was asked for and what it sent."""

    def __init__(self, ranges: bool = True, cut_at: int | None = None, body: bytes = BODY, stall: bool = False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges, self.cut_at, self.body = ranges, cut_at, body
        self.go_on = threading.Event()                   # what a cut waits for
        if not stall:
            self.go_on.set()
        self.asked, self.sent = [], []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/body.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked, body = self.headers["Range"], self.server.body
        self.server.asked.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.server.ranges else 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = self.server.cut_at if self.server.cut_at and len(self.server.asked) == 1 else len(body)
        self.server.sent.append(end - start)
        self.wfile.write(body[start:end])
        self.server.go_on.wait(20)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(**options) -> Server:
        servers.append(Server(**options))
        return servers[-1]
    yield start
    for server in servers:
        server.go_on.set()
        server.shutdown()
        server.server_close()


def body_at(*urls: str, body: bytes = BODY, **options) -> File:
    return File(urls, f"sha256:{hashlib.sha256(body).hexdigest()}", **options)


def test_a_download_is_the_servers_bytes(serve, tmp_path):
    server = serve()
    path = download(body_at(server.url, size=len(BODY)), tmp_path / "new" / "folder")
    assert path.read_bytes() == BODY
    assert sorted(p.name for p in path.parent.iterdir()) == ["body.bin"]


def test_a_download_goes_on_where_an_earlier_one_stopped(serve, tmp_path):
    server = serve()
    (tmp_path / "body.bin.part").write_bytes(BODY[:700_000])
    assert download(body_at(server.url, size=len(BODY)), tmp_path).read_bytes() == BODY
    assert (server.asked, server.sent) == (["bytes=700000-"], [len(BODY) - 700_000])


def test_a_connection_that_is_cut_is_taken_up_again(serve, tmp_path):
    server = serve(cut_at=300_000)
    assert download(body_at(server.url), tmp_path).read_bytes() == BODY
    assert server.asked == [None, "bytes=300000-"]
    assert server.sent == [300_000, len(BODY) - 300_000]


def test_an_interrupted_command_keeps_its_part_and_goes_on_from_it(serve, tmp_path):
    server = serve(cut_at=300_000, stall=True)
    file = body_at(server.url, gives=("body.bin",))
    program = (f"import signal, sys\nfrom txl import data\nfrom txl.datasets import *\n"
               f"signal.signal(signal.SIGINT, signal.default_int_handler)\n"
               f"SOURCES['wt2'] = ({file!r},)\nsys.exit(data.main(['--dataset=wt2', '--dir={tmp_path}']))")
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": str(Path(datasets.__file__).parent.parent)})
    part = tmp_path / "body.bin.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size == 4 << 16):
        time.sleep(.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, said.splitlines()[-1]) == (130, "Interrupted. The same command goes on from here.")
    server.go_on.set()
    assert download(file, tmp_path).read_bytes() == BODY
    assert server.asked == [None, f"bytes={4 << 16}-"]


def test_a_server_without_ranges_sends_all_of_it_again(serve, tmp_path):
    server = serve(ranges=False)
    (tmp_path / "body.bin.part").write_bytes(b"x" * 700_000)
    assert download(body_at(server.url), tmp_path).read_bytes() == BODY
    assert server.sent == [len(BODY)]


def test_a_complete_part_is_not_asked_for_again(serve, tmp_path):
    server = serve()
    (tmp_path / "body.bin.part").write_bytes(BODY)
    assert download(body_at(server.url, size=len(BODY)), tmp_path).read_bytes() == BODY
    assert server.asked == []


def test_a_part_that_is_too_long_is_begun_anew(serve, tmp_path):
    server = serve()
    (tmp_path / "body.bin.part").write_bytes(BODY + b"more")
    assert download(body_at(server.url, size=len(BODY)), tmp_path).read_bytes() == BODY
    (tmp_path / "body.bin").rename(tmp_path / "body.bin.part")
    with open(tmp_path / "body.bin.part", "ab") as f:
        f.write(b"more")
    assert download(body_at(server.url), tmp_path).read_bytes() == BODY      # no size known: the server answers 416


@pytest.mark.parametrize("name", ["body.bin", "body.bin.part"])
def test_a_wrong_checksum_deletes_the_file_and_says_so(serve, tmp_path, name):
    (tmp_path / name).write_bytes(b"y" * len(BODY))
    with pytest.raises(DataError, match=r"not what was published.*It was deleted: run the same command"):
        download(body_at(serve().url, size=len(BODY)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_size_at_the_server_is_refused_before_anything_is_written(serve, tmp_path):
    with pytest.raises(DataError, match="it has 1,024,000 bytes there and not 5"):
        download(body_at(serve().url, size=5), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_the_second_url_serves_where_the_first_is_dead(serve, tmp_path):
    assert download(body_at(closed_port(), serve().url), tmp_path).read_bytes() == BODY


def test_offline_is_one_line_and_nothing_changes_on_disk(tmp_path):
    with pytest.raises(DataError, match=r"Could not download body.bin.*refused.*put it at") as error:
        download(body_at(closed_port()), tmp_path / "data" / "set")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_put_there_by_hand_is_used(tmp_path):
    (tmp_path / "body.bin").write_bytes(BODY)
    assert download(body_at(closed_port()), tmp_path).read_bytes() == BODY


def test_a_git_digest_is_gits_name_of_the_blob(tmp_path):
    (tmp_path / "hello").write_bytes(b"hello\n")         # git hash-object: ce013625030ba8dba906f756967f9e9ca394464a
    assert download(File(("http://x/hello",), "git:ce013625030ba8dba906f756967f9e9ca394464a"), tmp_path).exists()


def closed_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/body.bin"


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for name, content in members.items():
            z.writestr(name, content)
    return out.getvalue()


def tarred(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def fetched(serve, monkeypatch, folder: Path, name: str, archive: bytes) -> dict[str, bytes]:
    """What `fetch` leaves in the folder, with the data set's archive replaced by this one."""
    server = serve(body=archive)
    file = body_at(server.url, body=archive, unpack=SOURCES[name][0].unpack, gives=SOURCES[name][0].gives)
    monkeypatch.setitem(SOURCES, name, (file,))
    fetch(name, folder)
    asked = len(server.asked)
    fetch(name, folder)                                  # all there: nothing to do
    assert len(server.asked) == asked
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_wikitext_and_penn_are_unpacked_into_three_texts(serve, monkeypatch, tmp_path):
    texts = {"train.txt": b"a\n", "valid.txt": b"b\n", "test.txt": b"c\n"}
    wikitext = zipped({"wikitext-2/": b""} | {f"wikitext-2/wiki.{x[:-4]}.tokens": text for x, text in texts.items()})
    assert fetched(serve, monkeypatch, tmp_path / "wt2", "wt2", wikitext) == texts
    penn = tarred({"./simple-examples/data/ptb.char.train.txt": b"x"}
                  | {f"./simple-examples/data/ptb.{x}": text for x, text in texts.items()})
    assert fetched(serve, monkeypatch, tmp_path / "ptb", "ptb", penn) == texts


def test_texts_of_ones_own_are_not_overwritten(serve, monkeypatch, tmp_path):
    (tmp_path / "train.txt").write_text("mine")
    server = serve(body=b"")
    monkeypatch.setitem(SOURCES, "wt2", (body_at(server.url, body=b"", unpack=SOURCES["wt2"][0].unpack,
                                                 gives=SOURCES["wt2"][0].gives),))
    with pytest.raises(DataError, match=r"has train.txt already.*move what is there away"):
        fetch("wt2", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]
    assert (tmp_path / "train.txt").read_text() == "mine"
    assert not server.asked


def test_a_hundred_million_bytes_are_cut_at_ninety_and_ninety_five(serve, monkeypatch, tmp_path):
    raw = b"".join(bytes([i]) * 1_000_000 for i in range(100))
    texts = fetched(serve, monkeypatch, tmp_path, "enwik8", zipped({"enwik8": raw}))
    assert texts == {"train.txt": raw[:90_000_000], "valid.txt": raw[90_000_000:95_000_000],
                     "test.txt": raw[95_000_000:]}


def test_other_than_a_hundred_million_bytes_are_refused(serve, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="exactly 100,000,000 bytes"):
        fetched(serve, monkeypatch, tmp_path, "text8", zipped({"text8": b"too short"}))
    assert [p.name for p in tmp_path.iterdir()] == ["body.bin"]


def billion_words() -> dict[str, bytes]:
    """The members of the archive, the training shards in falling order; two held-out pieces of fifty."""
    shards = {f"training-monolingual.tokenized.shuffled/news.en-{i:05}-of-00100": b"%d\n" % i
              for i in reversed(range(1, 100))}
    held_out = {f"heldout-monolingual.tokenized.shuffled/news.en.heldout-{i:05}-of-00050": b"held %d\n" % i
                for i in (1, 0)}
    return shards | held_out


def test_the_billion_words_keep_their_shards_as_files(serve, monkeypatch, tmp_path):
    top = "1-billion-word-language-modeling-benchmark-r13output"
    archive = {f"{top}/{name}": text for name, text in billion_words().items()}
    texts = fetched(serve, monkeypatch, tmp_path / "1", "lm1b", tarred(archive | {f"{top}/README": b"x"}))
    assert texts == {name: text for name, text in billion_words().items() if "00001-of-00050" not in name}
    assert texts.keys() == {*LM1B_SHARDS, LM1B_HELD_OUT}
    del archive[f"{top}/{LM1B_SHARDS[41]}"]
    with pytest.raises(DataError, match="does not hold 99 training shards"):
        fetched(serve, monkeypatch, tmp_path / "2", "lm1b", tarred(archive))
    (tmp_path / "1" / LM1B_SHARDS[7]).unlink()
    with pytest.raises(DataError, match=r"has training-.*news.en-00001-of-00100, .* and 96 more already, but not all"):
        fetch("lm1b", tmp_path / "1")


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt"])
def test_an_archive_that_points_outside_is_refused(serve, monkeypatch, tmp_path, pack, name):
    with pytest.raises(DataError, match="points outside"):
        fetched(serve, monkeypatch, tmp_path / "set", "wt2", pack({name: b"x", "w/wiki.train.tokens": b"a"}))
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "body.bin"]


def test_every_source_names_a_digest_and_its_texts():
    for file in (file for files in SOURCES.values() for file in files):
        algorithm, digest = file.digest.split(":")
        assert len(digest) == {"md5": 32, "sha256": 64, "git": 40}[algorithm]
        assert file.unpack is not None or file.gives == (file.name,)


def test_progress_away_from_a_terminal_is_a_few_lines(serve, tmp_path, capsys):
    download(body_at(serve().url), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 4
    assert re.fullmatch(r"body.bin  100%  1.0/1.0 MB  [\d.]+ MB/s  ETA 0:00", lines[-1])


def test_progress_on_a_terminal_is_one_line_that_moves(serve, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    download(body_at(serve().url), tmp_path)
    assert capsys.readouterr().err.count("\n") == 1
