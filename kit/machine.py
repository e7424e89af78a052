"""Which machine a node's agent runs on: its part of history is continued on no other.

The id is made once and kept beside the journal, not taken from /etc/machine-id: containers of one image share that, or
have none, and a container's changes with its image. What must not be continued elsewhere is the journal, so the id goes
where the journal goes: with the folder (or volume) that holds both.
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

FILE: Final = "machine-id"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a writer runs whose part of history belongs to one machine."""

    machine_id: str
    take_over_from: str = ""
    """The other machine whose prefix this one shall continue; named by an operator, once."""

    def refusal(self, writer: str, other_id: str) -> str:
        """Why this machine must not go on where `other_id` last wrote; '' when it may.

        Two hosts with one node's name would each hold leases that the other does not know of.
        """
        if other_id in {"", self.machine_id, self.take_over_from}:
            return ""
        return (
            f"{writer} was last written by machine {other_id}, and this is {self.machine_id}: give this host another "
            f"node name, or, if that machine is gone for good, set take_over_from to {other_id}"
        )


def kept_machine_id(folder: Path) -> str:
    """The id in this folder; made, and synced to disk, when there is none."""
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        found = ""
    if found:
        return found
    made = secrets.token_hex(16)
    new = path.with_suffix(".new")
    with new.open("w", encoding="ascii") as file:
        file.write(made + "\n")
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    return made
