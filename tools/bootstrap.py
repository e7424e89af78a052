"""Makes `.venv` for the Makefile: `bootstrap.py runtime` for running Sublet, `bootstrap.py dev` for testing it too.

Runs on the host's own Python, with nothing installed. What is missing is said in one sentence; pip's own output goes to
`.venv/install.log`. Written so that Python 3.6 can read it and reach the sentence about its age.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
LOCK = ROOT / ".venv.lock"
PYTHON_MIN = (3, 11)
# The newest minor version looked for by name when `python3` itself is too old.
PYTHON_MINOR_MAX = 14
# `--group` came with pip 25.1; Debian 12 and Ubuntu 24.04 ship older ones.
PIP_WITH_GROUPS = "pip>=25.1"
EXTRAS = ".[services,gpu]"
# How pip words an index that it cannot reach; "from versions: none" is all that it says once its retries are used up.
UNREACHABLE = ("NewConnectionError", "name resolution", "Timeout", "ProxyError", "SSLError", "from versions: none")


class MissingError(Exception):
    """What the host lacks, as one sentence for a person."""


def main(stage: str) -> int:
    """Exit status for make: 0 when the stage stands, 1 with one sentence when it cannot."""
    try:
        python = suitable_python()
        check_c_compiler()
        with one_at_a_time():
            make_venv(python)
            if stage == "dev":
                install(["--upgrade", PIP_WITH_GROUPS], "pip itself")
                install(["-e", EXTRAS, "--group", "dev"], "test and lint tools")
            else:
                install(["-e", EXTRAS], "Sublet's libraries")
    except MissingError as missing:
        print(f"sublet: {missing}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("sublet: stopped; run make again to go on", file=sys.stderr)
        return 130
    return 0


def suitable_python() -> str:
    """The Python to build `.venv` from: this one if new enough, else the newest `python3.N` on PATH."""
    if sys.version_info >= PYTHON_MIN:
        return sys.executable
    for minor in range(PYTHON_MINOR_MAX, PYTHON_MIN[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    raise MissingError(
        f"Python 3.11 or newer is needed, and {sys.executable} is {sys.version_info[0]}.{sys.version_info[1]}; install "
        "one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv) and run make again, or name it: PYTHON=..."
    )


def check_c_compiler() -> None:
    """Refuse early: the software GPU is built on this host."""
    candidates = [*os.environ.get("CC", "").split()[:1], "cc", "gcc", "clang"]
    if not any(shutil.which(name) for name in candidates):
        raise MissingError(
            "a C compiler is needed to build the software GPU, and none of cc, gcc, clang is on PATH; install one "
            "(Debian, Ubuntu: apt-get install gcc libc6-dev; Fedora: dnf install gcc) and run make again"
        )


@contextlib.contextmanager
def one_at_a_time() -> "Iterator[None]":
    """Two makes in one checkout take turns instead of spoiling each other's `.venv`."""
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_venv(python: str) -> None:
    """A working `.venv`; one that is half made, or whose Python has gone, is made afresh."""
    if is_working(VENV_PYTHON):
        return
    say(f"making .venv with {python}")
    made = run([python, "-m", "venv", "--clear", str(VENV)])
    if made.returncode == 0 and is_working(VENV_PYTHON):
        return
    if "ensurepip" in made.stdout or "No module named venv" in made.stdout:
        raise MissingError(
            "Python's venv module is incomplete on this host; install it (Debian, Ubuntu: apt-get install "
            "python3-venv) and run make again"
        )
    raise MissingError(f"`{python} -m venv .venv` failed: {last_line(made.stdout)}")


def is_working(python: Path) -> bool:
    """Whether this interpreter starts, is new enough and has pip."""
    probe = f"import sys, pip; sys.exit(sys.version_info < {PYTHON_MIN})"
    return python.exists() and run([str(python), "-c", probe]).returncode == 0


def install(what: "list[str]", in_words: str) -> None:
    """Run pip; on failure say whether it was the network, and where the whole output is."""
    say(f"installing {in_words} (pip; may take a minute or two)")
    began_s = time.monotonic()
    command = [str(VENV_PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *what]
    done = run(command)
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}\n")
    if done.returncode == 0:
        say(f"  done in {time.monotonic() - began_s:.0f} s")
        return
    if any(sign in done.stdout for sign in UNREACHABLE):
        raise MissingError(
            "the Python package index cannot be reached, or lacks a library; check the network, or set PIP_INDEX_URL "
            "to a mirror, and run make again (whole output: .venv/install.log)"
        )
    raise MissingError(f"pip could not install {in_words}: {last_line(done.stdout)} (whole output: .venv/install.log)")


def run(command: "list[str]") -> "subprocess.CompletedProcess[str]":
    """The finished command, its two output streams together in `stdout`."""
    return subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def last_line(words: str) -> str:
    """The last line that says something; pip's own `ERROR:` lines go before others."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no output"])[-1]


def say(words: str) -> None:
    """One progress line, at once."""
    print(words, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "runtime"))
