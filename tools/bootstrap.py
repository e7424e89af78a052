"""Makes `.venv` for the Makefile: `bootstrap.py runtime` for running Sublet, `bootstrap.py dev` for testing it too.

Runs on the host's own Python, with nothing installed. What is missing is said in one sentence; pip's own output goes to
`.venv/install.log`. Kept free of new syntax, so that an old Python reaches the sentence about its age.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
LOG = VENV / "install.log"
LOCK = ROOT / ".venv.lock"
PYTHON_MIN = (3, 11)
# `--group` came with pip 25.1; Debian 12 and Ubuntu 24.04 ship older ones.
PIP_WITH_GROUPS = "pip>=25.1"
EXTRAS = ".[services,gpu]"


class Missing(Exception):
    """What the host lacks, as one sentence for a person."""


def main(stage):
    """Exit status for make: 0 when the stage stands, 1 with one sentence when it cannot."""
    try:
        python = suitable_python()
        check_c_compiler()
        with only_one_at_a_time():
            make_venv(python)
            if stage == "dev":
                install(["--upgrade", PIP_WITH_GROUPS], "a newer pip")
                install(["-e", EXTRAS, "--group", "dev"], "test and lint tools")
            else:
                install(["-e", EXTRAS], "Sublet's libraries")
    except Missing as missing:
        print("sublet: " + str(missing), file=sys.stderr)
        return 1
    return 0


def suitable_python():
    """The Python to build `.venv` from: this one if new enough, else the newest `python3.N` on PATH."""
    if sys.version_info >= PYTHON_MIN:
        return sys.executable
    for minor in range(14, PYTHON_MIN[1] - 1, -1):
        found = shutil.which("python3.%d" % minor)  # noqa: UP031 - an old Python must be able to read this file
        if found:
            return found
    raise Missing(
        "Python 3.11 or newer is needed, and %s is %d.%d; install one (Debian, Ubuntu: apt-get install python3.11 "
        "python3.11-venv) and run make again, or name it with make PYTHON=..."
        % ((sys.executable,) + sys.version_info[:2])  # noqa: UP031, RUF005
    )


def check_c_compiler():
    """Refuse early: the software GPU is built on this host."""
    wanted = os.environ.get("CC", "").split()
    if not any(shutil.which(name) for name in wanted[:1] + ["cc", "gcc", "clang"]):
        raise Missing(
            "a C compiler is needed to build the software GPU, and none of cc, gcc, clang is on PATH; install one "
            "(Debian, Ubuntu: apt-get install gcc libc6-dev; Fedora: dnf install gcc) and run make again"
        )


class only_one_at_a_time:  # noqa: N801 - used as a function
    """Two makes in one checkout take turns instead of spoiling each other's `.venv`."""

    def __enter__(self):
        import fcntl

        self.file = LOCK.open("w")
        fcntl.flock(self.file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self.file.close()


def make_venv(python):
    """A working `.venv`; one that is half made, or whose Python has gone, is made afresh."""
    if works(VENV / "bin" / "python"):
        return
    say("making .venv with " + python)
    made = subprocess.run([python, "-m", "venv", "--clear", str(VENV)], capture_output=True, text=True, check=False)
    if made.returncode == 0 and works(VENV / "bin" / "python"):
        return
    words = made.stdout + made.stderr
    if "ensurepip" in words or "No module named venv" in words:
        raise Missing(
            "Python's venv module is incomplete on this host; install it (Debian, Ubuntu: apt-get install "
            "python3-venv) and run make again"
        )
    raise Missing("`%s -m venv .venv` failed: %s" % (python, last_line(words)))  # noqa: UP031


def works(python):
    """Whether this interpreter starts, is new enough and has pip."""
    if not python.exists():
        return False
    probe = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([str(python), "-c", probe], capture_output=True, check=False).returncode == 0


def install(what, in_words):
    """Run pip; on failure say whether it was the network, and where the whole output is."""
    say("installing " + in_words + " (pip, one to three minutes on a first run)")
    began = time.monotonic()
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    done = subprocess.run(command + what, cwd=ROOT, capture_output=True, text=True, check=False)
    with LOG.open("a") as log:
        log.write("$ " + " ".join(command + what) + "\n" + done.stdout + done.stderr)
    if done.returncode == 0:
        say("  done in %.0f s" % (time.monotonic() - began))  # noqa: UP031
        return
    words = done.stdout + done.stderr
    unreachable = (
        "NewConnectionError",
        "Temporary failure in name resolution",
        "ConnectTimeout",
        "ProxyError",
        "SSLError",
    )
    if any(sign in words for sign in unreachable):
        raise Missing(
            "the Python package index cannot be reached, so libraries cannot be installed; check the network or set "
            "PIP_INDEX_URL to a mirror and run make again (whole output: .venv/install.log)"
        )
    raise Missing("pip could not install %s: %s (whole output: .venv/install.log)" % (in_words, last_line(words)))  # noqa: UP031


def last_line(words):
    """The last line that says something, preferring pip's own `ERROR:` lines."""
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["no output"])[-1]


def say(words):
    """One progress line, at once."""
    print(words, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "runtime"))
