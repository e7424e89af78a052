"""Keeps engines' logs from filling the disk."""

import contextlib
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import anyio
import anyio.to_thread

# An engine that writes 10 MB/s adds 50 MB between two looks.
_LOOK_EVERY_S: Final = 5.0


async def keep_bounded(paths: Callable[[], Iterable[Path]], *, bytes_max: int) -> None:
    """Looks at the logs for ever."""
    while True:
        await anyio.sleep(_LOOK_EVERY_S)
        for path in paths():
            await anyio.to_thread.run_sync(rotate, path, bytes_max)


def rotate(path: Path, bytes_max: int) -> bool:
    """Move what is in a log that outgrew its bound to `NAME.1`; true when it did.

    The engine holds the file open (for appending), so the content is copied and the file emptied; lines written between
    the two are lost.
    """
    with contextlib.suppress(OSError):
        if path.stat().st_size > bytes_max:
            shutil.copyfile(path, path.with_name(path.name + ".1"))
            with path.open("r+b") as log:
                log.truncate(0)
            return True
    return False
