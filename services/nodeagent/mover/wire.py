"""What the node agent and its checkpointer say to each other: one line of JSON each way, one connection a question."""

from msgspec import Struct


class Ask(Struct, frozen=True, kw_only=True, tag_field="ask", tag=lambda name: name):
    """The class's name is its ``ask``."""


class Supports(Ask, frozen=True):
    """Answered with `Supported`."""


class States(Ask, frozen=True):
    """Answered with `Told`."""

    image: str
    pids: tuple[int, ...]


class Prepare(Ask, frozen=True):
    """Host memory for what these processes hold now, pinned. Again: only what is missing. Answered with `Done`."""

    image: str
    pids: tuple[int, ...]


class Lock(Ask, frozen=True):
    """Answered with `Done`."""

    pid: int
    timeout_s: float


class Unlock(Ask, frozen=True):
    """Answered with `Done`."""

    pid: int


class Save(Ask, frozen=True):
    """Answered with `Moved`."""

    image: str
    pid: int


class Load(Ask, frozen=True):
    """Answered with `Moved`."""

    image: str
    pid: int


class Drop(Ask, frozen=True):
    """The engine is gone. Answered with `Done`."""

    image: str


class Supported(Struct, frozen=True, kw_only=True):
    is_supported: bool
    has_custom_storage: bool = False
    reason: str = ""


class Told(Struct, frozen=True, kw_only=True):
    """Pids without CUDA are left out."""

    states: dict[int, str]
    """{pid: a `CheckpointState`}"""
    away_bytes: dict[str, int]
    """{gpu_uuid: what those that are checkpointed will take there}"""
    free_bytes: dict[str, int]
    """{gpu_uuid: free there now}, of the same GPUs."""


class Moved(Struct, frozen=True, kw_only=True):
    size_bytes: int
    move_s: float


class Done(Struct, frozen=True, kw_only=True):
    done: bool = True


class Failed(Struct, frozen=True, kw_only=True):
    """The answer instead of any other. `error` is the name of a class of `devices.api`."""

    error: str
    reason: str


Question = Supports | States | Prepare | Lock | Unlock | Save | Load | Drop
