"""What the driver said of checkpoints in this boot, so that a returning agent need not ask again before it adopts.

A new process's first answer of the driver takes seconds on a host with many GPUs. Only a yes is kept: a no may be over.
"""

import logging
from pathlib import Path
from typing import Final

import msgspec

from services.nodeagent.mover import wire

log = logging.getLogger("nodeagent")

OF_THE_HOST: Final = (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/driver/nvidia/version"))
"""The boot, and the driver where there is a real one: what was said holds for these."""


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    told: wire.Supported


class KeptSupport:
    """One file."""

    def __init__(self, path: Path, *, of_the_host: tuple[Path, ...] = OF_THE_HOST) -> None:
        self._path = path
        self._of_the_host = of_the_host

    def read(self) -> wire.Supported | None:
        """None when nothing was said in this boot, by this driver."""
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=_Kept)
        except (OSError, msgspec.MsgspecError):
            return None
        return kept.told if kept.host == self._host() else None

    def write(self, told: wire.Supported) -> None:
        try:
            if not told.is_supported:
                self._path.unlink(missing_ok=True)
                return
            self._path.parent.mkdir(parents=True, exist_ok=True)
            draft = self._path.with_suffix(".new")
            draft.write_bytes(msgspec.json.encode(_Kept(host=self._host(), told=told)))
            draft.replace(self._path)
        except OSError as error:
            log.warning("support not kept", extra={"path": str(self._path), "reason": str(error)})

    def _host(self) -> str:
        return "\n".join(path.read_text().strip() for path in self._of_the_host if path.exists())
