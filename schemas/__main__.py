"""``python -m schemas [--check | --golden]``: writes what is derived from the types, or checks that it is current."""

import argparse
import sys
from pathlib import Path
from typing import Final

from schemas.catalogue import MESSAGES
from schemas.generate import COMMAND, outputs
from schemas.generators.fixtures import fixture

ROOT: Final = Path(__file__).resolve().parent.parent
GOLDEN: Final = "tests/golden/messages"


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Exit status: 1 when `--check` finds something stale, else 0."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="write nothing; exit 1 and name what is not current")
    modes.add_argument("--golden", action="store_true", help="write the first fixture of each message that has none")
    chosen = parser.parse_args(arguments)
    if chosen.golden:
        return write_fixtures(root)
    return check(root) if chosen.check else write(root)


def write(root: Path) -> int:
    contents = outputs()
    for name in stale(root, contents):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents[name], encoding="utf-8")
        print(f"wrote {name}")
    return 0


def check(root: Path) -> int:
    """Names each file that is not current, and the command that mends it."""
    missing = [f"{GOLDEN}/{tag}.json" for tag in MESSAGES if not (root / GOLDEN / f"{tag}.json").exists()]
    old = stale(root, outputs())
    for name in old:
        print(f"{name} is not current; run `{COMMAND}`", file=sys.stderr)
    for name in missing:
        print(f"{name} is missing; run `{COMMAND} --golden`", file=sys.stderr)
    return 1 if old or missing else 0


def stale(root: Path, contents: dict[str, str]) -> list[str]:
    """Generated files whose content is not what the types give now."""
    return [
        name
        for name, content in contents.items()
        if not (root / name).exists() or (root / name).read_text(encoding="utf-8") != content
    ]


def write_fixtures(root: Path) -> int:
    """Only for messages that have none: a fixture is what was published once, and that does not change."""
    folder = root / GOLDEN
    folder.mkdir(parents=True, exist_ok=True)
    for tag, kind in MESSAGES.items():
        path = folder / f"{tag}.json"
        if not path.exists():
            path.write_bytes(fixture(kind))
            print(f"wrote {path.relative_to(root)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
