"""Builds the driver libraries from `src/` when they are missing or older than their sources."""

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

from softgpu.errors import BuildError

_PACKAGE = Path(__file__).resolve().parent
_PRODUCTS = ("libcuda.so.1", "libnvidia-ml.so.1", "softgpu-control")
_BUILD_TIMEOUT_S = 300.0  # two seconds are usual; an emulated arm64 container is slow


def library_directory() -> Path:
    """Where the libraries are or will be: `SOFTGPU_BUILD`, or `build/softgpu` beside the package."""
    chosen = os.environ.get("SOFTGPU_BUILD")
    return Path(chosen) if chosen else _PACKAGE.parent / "build" / "softgpu"


def build() -> Path:
    """The directory with up-to-date libraries.

    Several processes may call this at once: one builds, the others wait. The products are replaced by a rename, so
    that a process which loads them meanwhile finds either the old or the new ones. Raises `BuildError`.
    """
    directory = library_directory()
    if _is_current(directory):
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
    except OSError as error:
        raise BuildError(
            f"softgpu cannot write to {directory} ({error.strerror}): set SOFTGPU_BUILD to a writable directory."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current(directory):
            _make(directory)
    return directory


def _sources() -> list[Path]:
    return [_PACKAGE / "Makefile", *sorted((_PACKAGE / "src").glob("*.[ch]"))]


def _is_current(directory: Path) -> bool:
    products = [directory / name for name in _PRODUCTS]
    if not all(product.exists() for product in products):
        return False
    newest_source_ns = max(source.stat().st_mtime_ns for source in _sources())
    return min(product.stat().st_mtime_ns for product in products) >= newest_source_ns


def _make(directory: Path) -> None:
    compiler = os.environ.get("CC", "cc")
    for program in (compiler, "make"):
        if shutil.which(program) is None:
            raise BuildError(
                f"softgpu needs a C compiler and make to build its driver libraries, and {program} is not installed: "
                "install both (Debian, Ubuntu: apt-get install build-essential) and try again."
            )
    staging = directory / "staging"
    command = ["make", "-C", str(_PACKAGE), f"OUT={staging}", f"CC={compiler}", f"-j{os.cpu_count() or 1}"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT_S, check=False)
    if finished.returncode != 0:
        last_lines = "\n".join((finished.stderr or finished.stdout).strip().splitlines()[-20:])
        raise BuildError(f"softgpu could not be built with {compiler}; the compiler said:\n{last_lines}")
    for name in _PRODUCTS:
        os.utime(staging / name)  # make keeps what it need not rebuild, with its old time
        (staging / name).replace(directory / name)
