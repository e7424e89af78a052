"""The command line of a benchmark: whatever is wrong with it is said in one sentence, without the whole usage."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")

    def value(self, option: str, read: Callable[[str], T], text: str) -> T:
        """What was said for this option. `read` raises `ValueError` with one sentence."""
        try:
            return read(text)
        except ValueError as error:
            self.error(f"{option}: {error}")

    def check_folder(self, option: str, path: Path | None) -> None:
        """Before a long run, and not after it."""
        if path is not None and not path.resolve().parent.is_dir():
            self.error(f"{option}: {path} cannot be written: its folder does not exist")
