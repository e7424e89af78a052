"""The engine processes of one host: started behind a gate, watched, stopped until nothing is left of them."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import quote

import anyio
import anyio.abc
import anyio.to_thread

from kit.process import Child, free_port, spawn
from schemas.holders import EngineStart, EngineView
from services.holder import remains
from services.holder.cgroups import Cgroups, clear_limits, declared_group
from services.holder.refusals import Refused

# What an engine inherits from the holder: where programs and libraries are, and how the driver is set up on this
# host. Not the rest, which has our own settings and secrets in it.
_INHERITED_NAMES: Final = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV"}
)
_INHERITED_PREFIXES: Final = ("CUDA_", "NVIDIA_", "NCCL_", "HF_", "SOFTGPU_")

# A driver that hangs must not keep the holder from starting or ending.
_DRIVER_WAIT_S: Final = 5.0

ENGINES_MAX: Final = 256
"""Bound of the table; the software driver knows as many groups. A GPU holds a few tens of contexts at the most."""


@dataclass(slots=True, kw_only=True)
class Engine:
    """One start of one replica."""

    replica_id: str
    lease_epoch: int
    child: Child
    port: int
    gpu_uuids: tuple[str, ...]
    mark: str
    leaf: Path | None
    namespace: str
    log_path: Path
    gone: anyio.Event = field(default_factory=anyio.Event)
    """Set when nothing is left of it, its children included."""

    @property
    def is_alive(self) -> bool:
        return not self.gone.is_set()

    def view(self) -> EngineView:
        return EngineView(
            replica_id=self.replica_id,
            lease_epoch=self.lease_epoch,
            pid=self.child.pid,
            started_ticks=self.child.identity.started_ticks,
            port=self.port,
            is_gated=self.child.is_gated,
            is_alive=self.is_alive,
            exit_code=self.child.exit_code,
            gpu_uuids=self.gpu_uuids,
            namespace=self.namespace,
            log_path=str(self.log_path),
        )


class Engines:
    """Call it from the main thread's loop only: engines die with the thread that started them."""

    def __init__(
        self,
        *,
        state_dir: Path,
        cgroups: Cgroups,
        tasks: anyio.abc.TaskGroup,
        on_death: Callable[[str], None],
        inherited: Mapping[str, str] = os.environ,
    ) -> None:
        self._engines: dict[str, Engine] = {}
        self._state_dir = state_dir
        self._log_dir = state_dir / "logs"
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._cgroups = cgroups
        self._tasks = tasks
        self._on_death = on_death
        self._inherited = {
            name: value
            for name, value in inherited.items()
            if name in _INHERITED_NAMES or name.startswith(_INHERITED_PREFIXES)
        }
        self._is_ending = False

    async def end_remains(self) -> bool:
        """Before the first start: end what a former holder of this state folder left. False when that did not do.

        Cgroups whose limits could not be cleared stay, and are `leftover_namespaces`.
        """
        is_clear = await remains.end(remains.mark(self._state_dir), leaf=None)
        for leaf in self._cgroups.leaves().values():
            is_clear = await remains.end(remains.mark(self._state_dir), leaf=leaf) and is_clear
        return await self._clear_cgroups() and is_clear

    async def _clear_cgroups(self) -> bool:
        """Take limits and leaves away; false when the driver would not, or not in time."""
        is_clear = False
        with anyio.move_on_after(_DRIVER_WAIT_S):
            leaves = self._cgroups.leaves()
            is_clear = await anyio.to_thread.run_sync(clear_limits, leaves.values(), abandon_on_cancel=True)
            for replica_id in leaves if is_clear else ():
                self._cgroups.remove(replica_id)
        return is_clear

    def start(self, wish: EngineStart) -> EngineView:
        """The engine behind its gate, or what became of it when this epoch was started before."""
        known = self._engines.get(wish.replica_id)
        if known is not None and known.lease_epoch == wish.lease_epoch:
            return known.view()
        self._check_start(wish, known)
        port = wish.port or free_port(taken={engine.port for engine in self._engines.values() if engine.is_alive})
        log_path = self._log_dir / f"{quote(wish.replica_id, safe='')}.log"
        with log_path.open("a", encoding="utf-8") as log:
            log.write(f"sublet: replica {wish.replica_id}, lease epoch {wish.lease_epoch}, port {port}\n")
        child, leaf = self._spawn(wish, port=port, log_path=log_path)
        engine = Engine(
            replica_id=wish.replica_id, lease_epoch=wish.lease_epoch, child=child, port=port, gpu_uuids=wish.gpu_uuids,
            mark=remains.mark(self._state_dir, wish.replica_id), leaf=leaf,
            namespace=str(leaf or declared_group(wish.replica_id)), log_path=log_path,
        )  # fmt: skip
        self._engines[wish.replica_id] = engine
        self._tasks.start_soon(self._watch, engine)
        return engine.view()

    def _spawn(self, wish: EngineStart, *, port: int, log_path: Path) -> tuple[Child, Path | None]:
        """The program at its gate, in a cgroup leaf; where that cannot be had, in a declared group and no leaf.

        Never in both: the software driver shows a process the size of its innermost group, the declared one.
        """
        environment = self._environment(wish)
        if self._cgroups.parent is not None:
            child = _spawn_gated(wish, environment, port=port, log_path=log_path)
            if leaf := self._cgroups.place(wish.replica_id, child.pid):
                return child, leaf
            child.kill_group()
            self._tasks.start_soon(child.exited)
        declared = {"SOFTGPU_GROUP": declared_group(wish.replica_id)}
        return _spawn_gated(wish, environment | declared, port=port, log_path=log_path), None

    def _check_start(self, wish: EngineStart, known: Engine | None) -> None:
        if self._is_ending:
            raise Refused("the holder is ending and starts nothing more", status=503)
        if known is not None and known.is_alive:
            raise Refused(
                f"{wish.replica_id} runs with lease epoch {known.lease_epoch}; "
                f"stop it before it is started with epoch {wish.lease_epoch}"
            )
        if known is not None and wish.lease_epoch < known.lease_epoch:
            raise Refused(
                f"{wish.replica_id} had lease epoch {known.lease_epoch} already; {wish.lease_epoch} is out of date"
            )
        if known is None and len(self._engines) >= ENGINES_MAX:
            raise Refused(f"the holder keeps {ENGINES_MAX} engines already; forget dead ones first", status=503)
        if not wish.arguments:
            raise Refused(f"{wish.replica_id} has no program to start", status=400)

    def _environment(self, wish: EngineStart) -> dict[str, str]:
        environment = dict(self._inherited)
        if wish.gpu_uuids:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(wish.gpu_uuids)
        environment |= wish.environment
        environment.pop("SOFTGPU_GROUP", None)
        return environment | {remains.MARK: remains.mark(self._state_dir, wish.replica_id)}

    async def _watch(self, engine: Engine) -> None:
        await engine.child.exited()
        self._on_death(engine.replica_id)
        while not await remains.end(engine.mark, engine.leaf):
            pass  # It is not gone, and we say so (`is_alive`) until it is.
        engine.gone.set()

    def open_gate(self, replica_id: str, *, lease_epoch: int | None) -> EngineView:
        """Let it run. Idempotent."""
        engine = self._get(replica_id, lease_epoch=lease_epoch)
        if not engine.is_alive:
            raise Refused(f"{replica_id} ended with exit code {engine.child.exit_code}; it has no gate to open")
        engine.child.open_gate()
        return engine.view()

    async def stop(self, replica_id: str, *, lease_epoch: int | None, grace_s: float) -> EngineView:
        """Its view when nothing is left of it; shown alive when even SIGKILL did not end it in time. Idempotent."""
        engine = self._get(replica_id, lease_epoch=lease_epoch)
        with anyio.move_on_after(grace_s + remains.KILL_WAIT_S):
            await engine.child.stop(grace_s=grace_s)
            await engine.gone.wait()
        return engine.view()

    async def wait(self, replica_id: str, *, lease_epoch: int | None, timeout_s: float) -> EngineView:
        """Its view as soon as nothing is left of it, or after the time."""
        engine = self._get(replica_id, lease_epoch=lease_epoch)
        with anyio.move_on_after(timeout_s):
            await engine.gone.wait()
        return engine.view()

    def forget(self, replica_id: str, *, lease_epoch: int | None) -> None:
        """Drop a dead one and its cgroup; an unknown one's cgroup too. Clear the limits before. Idempotent."""
        engine = self._engines.get(replica_id)
        if engine is not None:
            engine = self._get(replica_id, lease_epoch=lease_epoch)
            if engine.is_alive:
                raise Refused(f"{replica_id} still runs; stop it before it is forgotten")
            del self._engines[replica_id]
        self._cgroups.remove(replica_id)

    def view(self, replica_id: str) -> EngineView:
        return self._get(replica_id, lease_epoch=None).view()

    def views(self) -> tuple[EngineView, ...]:
        """All, dead ones too, by replica."""
        return tuple(engine.view() for _, engine in sorted(self._engines.items()))

    def leftover_namespaces(self) -> dict[str, str]:
        """`{replica: cgroup}` of leaves without an engine of ours."""
        return {name: str(leaf) for name, leaf in self._cgroups.leaves().items() if name not in self._engines}

    def log_paths(self) -> Iterable[Path]:
        return tuple(engine.log_path for engine in self._engines.values())

    async def end(self, *, grace_s: float) -> None:
        """Stop all, at once, start nothing more, and leave no cgroup."""
        self._is_ending = True
        async with anyio.create_task_group() as tasks:
            for engine in self._engines.values():
                if engine.is_alive:
                    tasks.start_soon(self._stop_one, engine.replica_id, grace_s)
        if await self._clear_cgroups():
            self._cgroups.remove_all()

    async def _stop_one(self, replica_id: str, grace_s: float) -> None:
        await self.stop(replica_id, lease_epoch=None, grace_s=grace_s)

    def _get(self, replica_id: str, *, lease_epoch: int | None) -> Engine:
        engine = self._engines.get(replica_id)
        if engine is None:
            raise Refused(f"no engine of {replica_id} here", status=404)
        if lease_epoch is not None and lease_epoch != engine.lease_epoch:
            raise Refused(f"{replica_id} has lease epoch {engine.lease_epoch}, not {lease_epoch}")
        return engine


def _spawn_gated(wish: EngineStart, environment: Mapping[str, str], *, port: int, log_path: Path) -> Child:
    arguments = [argument.replace("{port}", str(port)) for argument in wish.arguments]
    environment = {name: value.replace("{port}", str(port)) for name, value in environment.items()}
    try:
        return spawn(arguments, environment=environment, log_path=log_path, is_gated=True)
    except (OSError, ValueError) as error:
        raise Refused(f"{wish.replica_id} cannot be started: {error}", status=503) from error
