"""Secrets of this node, which engines get as variables: one file each, named like the variable.

They never leave the node: facts and logs have their names only.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from services.nodeagent.runtimes.api import StartRefused

NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def secrets_of(names: Sequence[str], *, folder: str) -> dict[str, str]:
    """``{name: content without the last line's end}``. Raises `StartRefused` with what to do."""
    found: dict[str, str] = {}
    for name in names:
        if not NAME.fullmatch(name):
            raise StartRefused(f"'{name}' is no name of a secret: it must be one of a variable")
        if not folder:
            raise StartRefused(f"it needs the secret '{name}', and this node has no folder for secrets (secrets_dir)")
        try:
            found[name] = (Path(folder) / name).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not a text"
            raise StartRefused(f"it needs the secret '{name}', which this node does not have ({why})") from None
    return found
