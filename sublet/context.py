"""Which control plane to talk to: environment over context file over nothing.

``make up`` writes the file. It is ``$SUBLET_CONTEXT``; else ``.sublet/context.json`` in this folder or one above;
else ``~/.config/sublet/context.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Final

from sublet.errors import InvalidInput

IN_FOLDER: Final = Path(".sublet") / "context.json"
VARIABLES: Final = {
    "nats_url": "SUBLET_NATS_URL",
    "nkey_seed_path": "SUBLET_NKEY_SEED_PATH",
    "tenant": "SUBLET_TENANT",
    "gateway_url": "SUBLET_GATEWAY_URL",
    "api_key": "SUBLET_API_KEY",
}
"""Environment variables that override the file, by field."""
DEFAULT_TENANT: Final = "default"
START_IT: Final = "is the stack running? start it with `make up`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Addresses and credentials. Empty strings: not known."""

    nats_url: str = ""
    nkey_seed_path: str = ""
    """A file that holds the NKey seed; empty where the server asks for none."""
    tenant: str = DEFAULT_TENANT
    gateway_url: str = ""
    api_key: str = ""
    label: str = ""
    """Kind of GPU in the fleet, for example ``software GPU``."""
    inbox_prefix: str = ""
    """Where replies arrive; empty: ``_INBOX_<tenant>``, the only one that a tenant may subscribe to."""
    path: str = ""
    """The file that it was read from."""

    def __repr__(self) -> str:
        return f"Context(tenant={self.tenant!r}, path={self.path!r})"

    def nkey_seed(self) -> str:
        """The seed, or an empty string when none is needed. A relative path is relative to the context file."""
        if not self.nkey_seed_path:
            return ""
        path = Path(self.nkey_seed_path).expanduser()
        if not path.is_absolute() and self.path:
            path = Path(self.path).parent / path
        try:
            return path.read_text().strip()
        except OSError as error:
            raise InvalidInput(
                f"the NKey seed {path} cannot be read: {error.strerror}",
                fix="correct nkey_seed_path in the context file, or set SUBLET_NKEY_SEED_PATH",
            ) from error


def find_file(environ: Mapping[str, str], folder: Path) -> Path | None:
    """The context file that counts here, or None."""
    if named := environ.get("SUBLET_CONTEXT"):
        return Path(named).expanduser()
    home = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "/")) / ".config")
    candidates = [above / IN_FOLDER for above in (folder, *folder.parents)] + [home / "sublet" / "context.json"]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def load(environ: Mapping[str, str] | None = None, folder: Path | None = None, path: Path | None = None) -> Context:
    """The context for this folder and environment; `path` names the file and skips the search.

    Raises `InvalidInput` when a file was named but cannot be read, or is no context.
    """
    environ = os.environ if environ is None else environ
    path = path or find_file(environ, folder or Path.cwd())
    context = _read(path) if path else Context()
    overrides = {field: environ[name] for field, name in VARIABLES.items() if environ.get(name)}
    return replace(context, **overrides)


def _read(path: Path) -> Context:
    fix = "start the stack again with `make up`; it writes the file"
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InvalidInput(f"the context file {path} cannot be read: {error.strerror}", fix=fix) from error
    except ValueError as error:
        raise InvalidInput(f"the context file {path} is not JSON: {error}", fix=fix) from error
    if not isinstance(values, dict):
        raise InvalidInput(f"the context file {path} holds no JSON object", fix=fix)
    known = {field.name for field in fields(Context)} - {"path"}
    given = {name: value for name, value in values.items() if name in known and value is not None}
    if wrong := sorted(name for name, value in given.items() if not isinstance(value, str)):
        raise InvalidInput(f"the context file {path}: {wrong[0]} must be a string", fix=fix)
    return Context(**{name: value for name, value in given.items() if value}, path=str(path))


def openai_base_url(context: Context) -> str:
    """The gateway's address as OpenAI clients want it: with ``/v1`` at its end."""
    base = context.gateway_url.rstrip("/")
    return base if base.endswith("/v1") else f"{base}/v1"
