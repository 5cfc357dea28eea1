from __future__ import annotations

import subprocess
import sys

from engine.files import write_whole


def test_what_does_not_fit_on_the_disk_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "status.json"
    write_whole(path, "old")
    done = subprocess.run([sys.executable, "-c", f"""
import resource, signal
from pathlib import Path
from engine.files import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)                 # else a write past the limit is no OSError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
write_whole(Path({str(path)!r}), "n" * 10_000)
"""], capture_output=True, text=True)
    assert f"OSError: [Errno 27] File too large: {str(path)!r}" in done.stderr
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
