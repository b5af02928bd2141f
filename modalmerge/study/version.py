"""Which code runs."""

import subprocess
from pathlib import Path

from modalmerge import __version__


def code_version() -> str:
    """Commit of the code where it lies in a git checkout (with `+` when it was changed since), else the version."""
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout

    try:
        if not git("ls-files", __file__).strip():
            return __version__  # installed inside somebody else's checkout
        changed = git("status", "--porcelain", "--", str(folder)).strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+" if changed else "")
    except (subprocess.CalledProcessError, FileNotFoundError):
        return __version__
