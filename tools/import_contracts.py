"""Checks the import contracts of pyproject.toml (`[tool.importlinter]`), leaving out modules that do not exist yet.

import-linter refuses a contract that names a missing module. Ours are written for the whole layout, so that a new
service is under contract from its first file on; until then its name is dropped here. Exit status 1 when a contract is
broken. Another checkout's folder may be given as the only argument.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parent.parent
# Lists in a contract that name modules, and how few of them still make a contract.
NAMED_MODULES_MIN = {"modules": 2, "source_modules": 1, "forbidden_modules": 1, "layers": 2}


def main(root: Path) -> int:
    """Exit status for make; import-linter's report is shown only when a contract is broken."""
    kept, report = check(root)
    if not kept:
        print(report)
    return 0 if kept else 1


def check(root: Path) -> tuple[bool, str]:
    """Whether every contract holds for the checkout at `root`, and import-linter's report."""
    config = existing_part(tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"], root)
    if not config["root_packages"]:
        return True, "nothing to check yet"
    report = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(root), contextlib.redirect_stdout(report):
        file = Path(folder) / "contracts.toml"
        file.write_text(as_toml(config))
        # Its colours and widths come from the terminal; the report is read in logs.
        os.environ.setdefault("COLUMNS", "120")
        status = lint_imports(config_filename=str(file), no_cache=True, no_logo=True)
    return status == 0, report.getvalue()


def existing_part(config: dict[str, Any], root: Path) -> dict[str, Any]:
    """The configuration without our own modules that are not in the checkout; a contract left empty goes too."""
    ours = set(config["root_packages"])

    def exists(name: str) -> bool:
        if "*" in name or name.split(".", maxsplit=1)[0] not in ours:
            return True
        path = root.joinpath(*name.split("."))
        return (path / "__init__.py").exists() or path.with_suffix(".py").exists()

    contracts = []
    for contract in config["contracts"]:
        kept = dict(contract)
        for key in NAMED_MODULES_MIN.keys() & contract.keys():
            alternatives = [[name.strip() for name in entry.split("|")] for entry in contract[key]]
            standing = [[name for name in names if exists(name)] for names in alternatives]
            kept[key] = [" | ".join(names) for names in standing if names]
        if all(len(kept[key]) >= fewest for key, fewest in NAMED_MODULES_MIN.items() if key in kept):
            contracts.append(kept)
    roots = [name for name in config["root_packages"] if exists(name)]
    return {**config, "root_packages": roots, "contracts": contracts}


def as_toml(config: dict[str, Any]) -> str:
    """Strings, booleans and lists of strings look the same in JSON and TOML; nothing else occurs here."""
    lines = ["[tool.importlinter]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in config.items() if key != "contracts"]
    for contract in config["contracts"]:
        lines.append("[[tool.importlinter.contracts]]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in contract.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT))
