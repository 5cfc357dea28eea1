"""What every table of this folder has in common."""
from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).parent


def commit() -> str:
    """The commit, and whether anything but the tables differs from it."""
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=HERE).stdout.strip()
    changed = git("status", "--porcelain", "--", ":/", ":!*.md")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")
