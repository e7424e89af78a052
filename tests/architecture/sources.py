"""The files that git tracks, as the architecture tests see them: new files count from the moment they are added."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
# Endings of files that are not text of ours: pictures, recorded data, vendored code with its own rules.
BINARY_SUFFIXES = frozenset({".png", ".ico", ".gz", ".zst", ".parquet", ".woff2", ".bin"})


@functools.cache
def tracked_files() -> tuple[Path, ...]:
    """Tracked files that still exist, relative to the root, sorted. Empty outside a git checkout (a source archive)."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return tuple(sorted(Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()))


def text_files() -> list[Path]:
    """Tracked files that people read."""
    return [path for path in tracked_files() if path.suffix not in BINARY_SUFFIXES]


def python_files() -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py"]


def code_files() -> list[Path]:
    """Python, C, shell, make and configuration: all but prose."""
    endings = {".py", ".c", ".h", ".sh", ".yaml", ".yml", ".toml", ".js"}
    return [
        path for path in tracked_files() if path.suffix in endings or path.name in {"Makefile", "Dockerfile", "run"}
    ]


def read(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8", errors="replace")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """The parsed module; cached, because several checks walk it."""
    return ast.parse(read(path), filename=str(path))


def is_test(path: Path) -> bool:
    return path.parts[0] == "tests"


def service_folders() -> list[str]:
    """Names of folders in services/ that hold Python, sorted."""
    return sorted({path.parts[1] for path in python_files() if path.parts[0] == "services" and len(path.parts) > 2})


def listing(findings: list[str]) -> str:
    """One finding a line, for the end of a failure message."""
    return "\n  " + "\n  ".join(findings)
