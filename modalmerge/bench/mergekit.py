"""mergekit as it comes from PyPI, in an environment of its own, and its command with a clock inside."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

VERSION = "0.1.5"
FLAGS = ("--no-copy-tokenizer", "--quiet")  # its defaults otherwise; there is no tokenizer to copy
# Its fastest on a CPU, and with the least memory: one shard is written while the next is merged. Its other settings for
# little memory are for GPUs (--low-cpu-memory) and pickles (--lazy-unpickle).
TUNED_FLAGS = (
    *("--async-write", "--write-threads", str(os.cpu_count() or 1), "--out-shard-size", "200M"),
    *("--no-write-model-card", *FLAGS),
)
# The command `mergekit-yaml`, which says on standard output how long its run_merge took, and nothing else there.
COMMAND = """\
import json, sys, time
from mergekit.scripts import run_yaml
answer, sys.stdout = sys.stdout, sys.stderr
run_merge = run_yaml.run_merge
def timed(*args, **options):
    began = time.monotonic()
    run_merge(*args, **options)
    print(json.dumps({"seconds": time.monotonic() - began}), file=answer)
run_yaml.run_merge = timed
run_yaml.main()
"""
_VERSIONS = "import importlib.metadata as m, json; print(json.dumps({x: m.version(x) for x in ('mergekit', 'torch')}))"


def environment() -> dict[str, str]:
    """Give the variables for mergekit: nothing of ours on its path, and no network."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**kept, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}


def versions(python: Path) -> Mapping[str, str]:
    """Ask a Python for its versions of mergekit and torch.

    Raises:
        ValueError: it has none, or is no Python.
    """
    try:
        done = subprocess.run([python, "-c", _VERSIONS], env=environment(), capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise ValueError(
            f"--mergekit {python}: not a Python that has mergekit ({said}); leave --mergekit out to have one made"
        ) from error
    found: dict[str, str] = json.loads(done.stdout)
    return found


def make_environment(report: Callable[[str], None]) -> Path:
    """Install mergekit and the torch that runs here into a virtual environment, if that was not done before.

    Args:
        report: called with what is going on.

    Returns:
        Its Python, in `modalmerge` in `$XDG_CACHE_HOME`, else in `~/.cache`.

    Raises:
        ValueError: something could not be installed.
    """
    torch_version = torch.__version__.partition("+")[0]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "modalmerge" / f"mergekit-{VERSION}-torch-{torch_version}"
    python, finished = folder / "bin" / "python", folder / "finished"
    if finished.exists():
        return python
    install = [str(python), "-m", "pip", "install", "-q"]
    for words in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [*install, f"torch=={torch_version}"],  # first and alone: mergekit would take any
        [*install, f"torch=={torch_version}", f"mergekit=={VERSION}"],
    ):
        report(f"making an environment for mergekit: {' '.join(words)}")
        if subprocess.run(words, env=environment(), stdout=subprocess.DEVNULL).returncode:
            raise ValueError(
                f"{' '.join(words)} failed; install mergekit=={VERSION} into a virtual environment of your own and "
                "name its Python with --mergekit"
            )
    finished.touch()
    return python


def command(python: Path, config: Path, output: Path, *, tuned: bool) -> list[str]:
    """Spell out a merge by mergekit.

    Args:
        python: that has mergekit.
        config: its YAML (or JSON) file.
        output: folder to write.
        tuned: with `TUNED_FLAGS` instead of `FLAGS`.
    """
    return [str(python), "-c", COMMAND, str(config), str(output), *(TUNED_FLAGS if tuned else FLAGS)]
