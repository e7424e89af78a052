"""Engines as containers of the host's Docker engine. They outlive the agent, which finds them again by their labels."""

import contextlib
import json
import logging
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import quote

import aiodocker
import aiohttp
import anyio
import anyio.to_thread
from aiodocker.containers import DockerContainer
from anyio.abc import TaskGroup

from kit.process import identity_of
from schemas.holders import EngineView
from services.nodeagent.runtimes.api import RuntimeProblem, StartRefused
from services.nodeagent.runtimes.container import (
    NODE_LABEL,
    REPLICA_LABEL,
    ContainerStart,
    configuration,
    container_name,
    is_gate,
    view_of,
)
from services.nodeagent.runtimes.container_logs import LogFile
from services.nodeagent.runtimes.leaf import leaf_of
from services.nodeagent.runtimes.pulling import PullProgress, credentials, whole_name

NOT_FOUND: Final = 404
CONFLICT: Final = 409
REFUSED: Final = 500
CANNOT_CONNECT: Final = 900
"""aiodocker's, for a socket where nobody listens."""
QUICK_S: Final = 60.0
"""For everything that does not wait on purpose; a container with many mounts and GPUs takes seconds to start."""
GATE_S: Final = 20.0
GATE_POLL_S: Final = 0.05
MADE: Final = ".made"
LAST_WORDS_S: Final = 5.0
TOLD_EVERY_S: Final = 2.0
"""Lines about a download, in the engine's log."""
ENDED_MAX: Final = 1024
"""Ended starts that are remembered, so that one which is still on its way begins nothing after its end."""

log = logging.getLogger("nodeagent")


@dataclass(slots=True, kw_only=True)
class _Beginning:
    """A start on its way: its image may take an hour to arrive."""

    view: EngineView
    scope: anyio.CancelScope
    ended: anyio.Event = field(default_factory=anyio.Event)


class _Client(aiodocker.Docker):
    """Closes the connection of an answer that is not read to its end, such as a download that is given up."""

    @contextlib.asynccontextmanager
    async def _query(self, *arguments: Any, **options: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        async with super()._query(*arguments, **options) as response:
            try:
                yield response
            finally:
                if not response.content.at_eof():
                    response.close()


class Containers:
    """All containers of one node's agent. Begins to speak to Docker when it is first asked something."""

    def __init__(
        self,
        url: str,
        *,
        node: str,
        state_dir: Path,
        tasks: TaskGroup,
        log_bytes_max: int,
        pull_deadline_s: float,
        docker_config: Path,
    ) -> None:
        self._url = url
        self._node = node
        self._folder = state_dir / "containers"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tasks = tasks
        self._log_bytes_max = log_bytes_max
        self._pull_deadline_s = pull_deadline_s
        self._docker_config = docker_config
        self._client: aiodocker.Docker | None = None
        self._beginnings: dict[str, _Beginning] = {}
        self._ended: deque[tuple[str, int]] = deque(maxlen=ENDED_MAX)
        self._copying: dict[str, anyio.Event] = {}
        """{container: set when all its words are in its file}; those that are being copied."""
        self._copied: set[str] = set()
        """Ended containers whose words are all in their files."""
        self._open: set[str] = set()
        """Containers whose gate is known to be open."""

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    # --- As of any runtime -------------------------------------------------------------------------------------------

    async def start(self, wish: ContainerStart) -> EngineView:
        """The container behind its gate, or what became of it when this epoch was started before.

        Raises `StartRefused` when its image cannot be had or Docker cannot make it.
        """
        if (wish.replica_id, wish.lease_epoch) in self._ended:
            raise StartRefused("its lease ended while it was being started")
        with anyio.CancelScope() as scope:
            beginning = _Beginning(view=self._beginning_view(wish), scope=scope)
            self._beginnings[wish.replica_id] = beginning
            try:
                return await self._started(wish)
            finally:
                beginning.ended.set()
                self._beginnings.pop(wish.replica_id, None)
        raise StartRefused("its lease ended while it was being started")

    async def engine(self, replica_id: str) -> EngineView | None:
        beginning = self._beginnings.get(replica_id)
        if beginning is not None:
            return beginning.view
        container = await self._find(replica_id)
        return None if container is None else await self._view(container)

    async def open_gate(self, replica_id: str, *, lease_epoch: int) -> EngineView:
        container, view = await self._get(replica_id, lease_epoch)
        with anyio.move_on_after(GATE_S):
            while view.is_alive and view.is_gated:
                async with self._asked():
                    stream = container.attach(stdin=True)
                    await stream.write_in(b"\n")
                    await anyio.sleep(GATE_POLL_S)
                    await stream.close()
                view = await self._view(container)
            return view
        raise RuntimeProblem(f"the gate of {replica_id} is still shut after {GATE_S:.0f} s")

    async def stop(self, replica_id: str, *, lease_epoch: int, grace_s: float) -> None:
        self._ended.append((replica_id, lease_epoch))
        beginning = self._beginnings.get(replica_id)
        if beginning is not None and beginning.view.lease_epoch == lease_epoch:
            beginning.scope.cancel()
            await beginning.ended.wait()
        container = await self._find(replica_id)
        if container is None or (await self._view(container)).lease_epoch != lease_epoch:
            return
        async with self._asked():
            await container.stop(t=math.ceil(grace_s))
            await container.show()
        if container["State"]["Running"]:
            raise RuntimeProblem(f"the container of {replica_id} still runs after its kill")
        await self._last_words(container)

    async def wait_for_exit(self, replica_id: str, *, lease_epoch: int, timeout_s: float) -> EngineView:
        container, view = await self._get(replica_id, lease_epoch)
        if not view.is_alive:
            return view
        with anyio.move_on_after(timeout_s):
            async with self._asked():
                await container.wait()
            await self._last_words(container)
        return (await self._get(replica_id, lease_epoch))[1]

    async def forget(self, replica_id: str, *, lease_epoch: int) -> None:
        container = await self._find(replica_id)
        if container is not None and (await self._view(container)).lease_epoch == lease_epoch:
            await self._last_words(container)
            self._open.discard(container.id)
            self._copied.discard(container.id)
            async with self._asked():
                await container.delete(force=True, v=True)
        self._mark(replica_id).unlink(missing_ok=True)

    async def views(self) -> tuple[EngineView, ...]:
        """All of this node, dead ones too, by replica. Docker is asked only where one was made here.

        Raises `RuntimeProblem` when it does not answer: that is not `none`.
        """
        if not await anyio.to_thread.run_sync(lambda: any(self._folder.glob(f"*{MADE}"))):
            return ()
        async with self._asked() as docker:
            found = await docker.containers.list(all=True, filters=_filters({NODE_LABEL: self._node}))
        views = [await self._view(container) for container in found]
        return tuple(sorted(views, key=lambda view: view.replica_id))

    # --- Starts ------------------------------------------------------------------------------------------------------

    async def _started(self, wish: ContainerStart) -> EngineView:
        known = await self._find(wish.replica_id)
        if known is not None:
            view = await self._view(known)
            if view.lease_epoch == wish.lease_epoch:
                await self._run(known)
                return await self._view(known)
            raise RuntimeProblem(f"{wish.replica_id} has a container of lease epoch {view.lease_epoch} still")
        words = self._log_file(wish.replica_id)
        words.write(f"sublet: replica {wish.replica_id}, lease epoch {wish.lease_epoch}, image {wish.image}\n")
        try:
            image = await self._image(wish.image, words)
            await self._network(wish.network)
            self._mark(wish.replica_id).touch()
            async with self._asked() as docker:
                container = await docker.containers.create(
                    configuration(wish, image=image), name=container_name(self._node, wish.replica_id)
                )
            await self._run(container)
        except RuntimeProblem as problem:
            words.write(f"sublet: {problem}\n")
            raise StartRefused(str(problem)) from problem
        return await self._view(container)

    async def _run(self, container: DockerContainer) -> None:
        """Started if it was only made; a gate is shut until somebody opens it."""
        async with self._asked():
            await container.show()
            if container["State"]["Status"] == "created":
                await container.start()

    async def _image(self, name: str, words: LogFile) -> dict[str, Any]:
        """What Docker knows of the image, which is pulled where it is not here."""
        async with self._asked() as docker:
            try:
                return await docker.images.inspect(name)
            except aiodocker.DockerError as error:
                if error.status != NOT_FOUND:
                    raise
        try:
            await self._pull(name, words)
        except RuntimeProblem as problem:
            raise RuntimeProblem(f"the image {name} cannot be had: {problem}", status=problem.status) from problem
        async with self._asked() as docker:
            return await docker.images.inspect(name)

    async def _pull(self, name: str, words: LogFile) -> None:
        progress, told_at_s = PullProgress(image=name), 0.0
        login = await anyio.to_thread.run_sync(self._login, name)
        words.write(f"sublet: pulling {name}\n")
        try:
            with anyio.fail_after(self._pull_deadline_s):
                async with self._asked() as docker:
                    arriving = docker.images.pull(whole_name(name), stream=True, auth=login)
                    async with contextlib.aclosing(cast("AsyncGenerator[dict[str, Any]]", arriving)) as lines:
                        async for line in lines:
                            progress.add(line)
                            if time.monotonic() - told_at_s >= TOLD_EVERY_S:
                                told_at_s = time.monotonic()
                                words.write(progress.told() + "\n")
        except TimeoutError:
            raise RuntimeProblem(f"it was not here after {self._pull_deadline_s:.0f} s") from None
        words.write(progress.told() + ", done\n")

    def _login(self, image: str) -> dict[str, str] | None:
        try:
            return credentials(json.loads(self._docker_config.read_text(encoding="utf-8")), image)
        except (OSError, ValueError):
            return None

    async def _network(self, name: str) -> None:
        """A bridge on which containers cannot reach each other: engines answer whoever comes."""
        if name in ("", "bridge", "host", "none"):
            return
        async with self._asked() as docker:
            if any(network["Name"] == name for network in await docker.networks.list(filters={"name": name})):
                return
            with contextlib.suppress(aiodocker.DockerError):  # Another start made it.
                await docker.networks.create(
                    {
                        "Name": name,
                        "Driver": "bridge",
                        "CheckDuplicate": True,
                        "Options": {"com.docker.network.bridge.enable_icc": "false"},
                    }
                )

    # --- What is there -----------------------------------------------------------------------------------------------

    async def _find(self, replica_id: str) -> DockerContainer | None:
        """Its container, whatever its epoch. Where no Docker answers there is none, unless one was made here."""
        labels = {NODE_LABEL: self._node, REPLICA_LABEL: replica_id}
        try:
            async with self._asked() as docker:
                found = await docker.containers.list(all=True, filters=_filters(labels))
        except RuntimeProblem as problem:
            if problem.status == 0 and not self._mark(replica_id).exists():
                return None
            raise
        return found[0] if found else None

    async def _get(self, replica_id: str, lease_epoch: int) -> tuple[DockerContainer, EngineView]:
        container = await self._find(replica_id)
        if container is None:
            raise RuntimeProblem(f"Docker knows no container of {replica_id}", status=NOT_FOUND)
        view = await self._view(container)
        if view.lease_epoch != lease_epoch:
            raise RuntimeProblem(f"{replica_id} has lease epoch {view.lease_epoch}", status=CONFLICT)
        return container, view

    async def _view(self, container: DockerContainer) -> EngineView:
        async with self._asked():
            shown = await container.show()
            is_gated = await self._is_gated(container, shown)
        pid, labels = shown["State"]["Pid"], shown["Config"]["Labels"]
        leaf = await anyio.to_thread.run_sync(lambda: leaf_of(pid, container_id=container.id)) if pid else ""
        identity = identity_of(pid) if pid else None
        words = self._log_file(labels[REPLICA_LABEL])
        if shown["State"]["Status"] != "created" and container.id not in self._copied | self._copying.keys():
            self._copying[container.id] = anyio.Event()
            self._tasks.start_soon(self._copy_words, container, words)
        return view_of(
            shown,
            is_gated=is_gated,
            namespace=leaf,
            started_ticks=identity.started_ticks if identity else 0,
            log_path=str(words.path),
        )

    async def _is_gated(self, container: DockerContainer, shown: Mapping[str, Any]) -> bool:
        """By the words of its first process, so that a returning agent sees it too. A gate never shuts again."""
        if not shown["State"]["Running"]:
            return bool(shown["State"]["Status"] == "created")
        if container.id in self._open:
            return False
        try:
            told = await container.top()
        except aiodocker.DockerError:
            return False  # It ended while it was looked at.
        words, pids = told["Titles"].index("CMD"), told["Titles"].index("PID")
        first = [row[words] for row in told["Processes"] if int(row[pids]) == shown["State"]["Pid"]]
        seen = first or [row[words] for row in told["Processes"]]
        is_shut = not seen or any(is_gate([row]) for row in seen)
        if is_shut:
            return True
        self._open.add(container.id)
        return False

    async def _copy_words(self, container: DockerContainer, words: LogFile) -> None:
        """Until it ends. After a restart of the agent: from what was written last."""
        try:
            async with self._asked():
                since = f"{words.written_at_s():.3f}"
                said = container.log(stdout=True, stderr=True, follow=True, since=since)
                # Closed here and now, not whenever: it holds a connection.
                async with contextlib.aclosing(cast("AsyncGenerator[str]", said)) as pieces:
                    async for piece in pieces:
                        words.write(piece)
                await container.show()
            if not container["State"]["Running"]:
                self._copied.add(container.id)
        except RuntimeProblem as problem:
            log.warning("container log lost", extra={"reason": str(problem), "log_path": str(words.path)})
        finally:
            self._copying.pop(container.id).set()

    async def _last_words(self, container: DockerContainer) -> None:
        """Wait until what it said at its end, which tells why, is in its file."""
        copying = self._copying.get(container.id)
        if copying is not None:
            with anyio.move_on_after(LAST_WORDS_S):
                await copying.wait()

    def _log_file(self, replica_id: str) -> LogFile:
        return LogFile(self._folder / f"{quote(replica_id, safe='')}.log", bytes_max=self._log_bytes_max)

    def _mark(self, replica_id: str) -> Path:
        """There while a container of this replica may exist."""
        return self._folder / f"{quote(replica_id, safe='')}{MADE}"

    def _beginning_view(self, wish: ContainerStart) -> EngineView:
        return EngineView(
            replica_id=wish.replica_id,
            lease_epoch=wish.lease_epoch,
            pid=0,
            started_ticks=0,
            port=0,
            is_gated=True,
            is_alive=True,
            exit_code=None,
            gpu_uuids=wish.gpu_uuids,
            namespace="",
            log_path=str(self._log_file(wish.replica_id).path),
        )

    @contextlib.asynccontextmanager
    async def _asked(self) -> AsyncIterator[aiodocker.Docker]:
        """The client; what goes wrong with it comes as `RuntimeProblem`, of status 0 when nobody answered."""
        try:
            if self._client is None:
                self._client = _Client(url=self._url, timeout=aiohttp.ClientTimeout(total=QUICK_S, connect=QUICK_S))
            yield self._client
        except aiodocker.DockerError as error:
            if error.status == CANNOT_CONNECT:
                raise RuntimeProblem(f"Docker does not answer: {error.message}") from error
            # Not its own status: 404 and 409 say something about a replica here.
            raise RuntimeProblem(f"Docker refused: {error.message}", status=REFUSED) from error
        except (aiohttp.ClientError, OSError) as error:
            raise RuntimeProblem(f"Docker does not answer ({type(error).__name__})") from error


def _filters(labels: Mapping[str, str]) -> str:
    return json.dumps({"label": [f"{name}={value}" for name, value in labels.items()]})
