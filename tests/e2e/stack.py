"""`python -m services up` as a child process, and what a test needs to look at it from outside."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import anyio
import openai

from kit.bus import CaughtUp, Stream
from kit.bus_nats import NatsBus
from kit.nats_access import ADMINISTRATOR, read_seed
from kit.process import ProcessIdentity, identity_of, is_alive
from schemas.catalogue import UnreadableMessage, decode
from schemas.messages import Fact
from services.local.parts import PARTS
from services.local.state import StateFolder, read_json
from sublet.context import Context, load
from sublet.errors import SubletError
from sublet.sync import SyncClient, connect_sync

ROOT = Path(__file__).resolve().parents[2]
# Bounds for a host that does much else at once: a stack that works needs a tenth of them.
START_S = 120.0
BACK_S = 60.0
COLD_START_S = 0.2


@dataclass
class RunningStack:
    """One stack and its supervisor."""

    folder: StateFolder
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, state_dir: Path) -> Self:
        """Returns when it says that all is up."""
        state_dir.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "services", "up", "--state", str(state_dir), "--port", "0",
                   "--cold-start-s", str(COLD_START_S)]  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SUBLET_")}
        environment["SUBLET_NODEAGENT_DEMAND_S"] = "0"  # Engines have next to nothing to do here, and shall grow.
        with output_of(state_dir).open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT,
                env={**environment, "PYTHONPATH": str(ROOT)}, start_new_session=True,
            )  # fmt: skip
        stack = cls(StateFolder(state_dir.resolve()), process)
        try:
            eventually(stack._is_up, "up is not up", timeout_s=START_S)
        except BaseException:
            stack.stop()
            raise
        return stack

    def _is_up(self) -> bool:
        said = output_of(self.folder.path).read_text()
        assert self.process.poll() is None, said
        return "Ctrl-C stops everything" in said

    def stop(self) -> int:
        """Ctrl-C; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(BACK_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    # ---- clients ---------------------------------------------------------------------------------------------------

    @property
    def context(self) -> Context:
        return load(environ={}, path=self.folder.context)

    @property
    def nats_url(self) -> str:
        return self.context.nats_url

    @contextlib.contextmanager
    def client(self) -> Iterator[SyncClient]:
        with connect_sync(self.context) as client:
            yield client

    def openai(self, *, api_key: str | None = None, timeout_s: float = 60.0) -> openai.OpenAI:
        context = self.context
        return openai.OpenAI(
            base_url=f"{context.gateway_url}/v1", api_key=api_key or context.api_key, max_retries=0, timeout=timeout_s
        )

    def state_of(self, model: str) -> str:
        with self.client() as client:
            view = client.deployment(model)
        return view.replicas[0].state if view is not None and view.replicas else ""

    def facts(self) -> list[Fact]:
        """All of history that this build can read, in its order."""
        return anyio.run(self._facts)

    async def _facts(self) -> list[Fact]:
        seed, found = read_seed(self.folder.keys, ADMINISTRATOR), []
        async with NatsBus(self.nats_url, seed, ADMINISTRATOR) as bus:
            async for item in bus.read(Stream.HISTORY, ["sublet.fact.>"], after_seq=0):
                if isinstance(item, CaughtUp):
                    break
                with contextlib.suppress(UnreadableMessage):  # Other tests publish such.
                    fact = decode(item.body)
                    assert isinstance(fact, Fact), fact
                    found.append(fact)
        return found

    # ---- processes -------------------------------------------------------------------------------------------------

    @property
    def pids(self) -> dict[str, int]:
        """Of the parts that run now."""
        pids: dict[str, Any] = read_json(self.folder.processes)
        return {name: pid for name, pid in pids.items() if name != "supervisor"}

    def engines(self) -> set[int]:
        """Processes of engines: children of the holder that are marked as such, but for those that only prove a grade.

        A child that is forked and not yet anything has no mark of its own.
        """
        marks = {pid: _variable(pid, "SUBLET_ENGINE") for pid in self._holders_children()}
        return {pid for pid, mark in marks.items() if mark and "#guard-probe." not in mark}

    def brokers(self) -> set[int]:
        """The holder's memory broker; none while it is being started again."""
        return {pid for pid in self._holders_children() if b"services\0broker" in _command(pid)}

    def _holders_children(self) -> set[int]:
        return {pid for pid, parent in parents().items() if parent == self.pids["holder"]}

    def everybody(self) -> set[ProcessIdentity]:
        """Every process of the stack, engines and the supervisor included."""
        family, found = parents(), {self.process.pid}
        while more := {pid for pid, parent in family.items() if parent in found} - found:
            found |= more
        return {identity for pid in found if (identity := identity_of(pid)) is not None}

    def kill(self, name: str) -> int:
        """SIGKILL; the pid that it had."""
        pid = self.pids[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    def wait_back(self, name: str, *, was: int) -> None:
        """Returns when it runs again and is ready."""
        eventually(lambda: self.pids.get(name, was) != was, f"{name} was not restarted", timeout_s=BACK_S)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Returns when all parts run, commands are answered and the gateway could wake a model."""
        eventually(lambda: set(PARTS) <= set(self.pids) and self._answers(), "not ready again", timeout_s=BACK_S)
        eventually(lambda: len(self.brokers()) == 1, "no memory broker", timeout_s=BACK_S)

    def wait_only(self, *models: str) -> None:
        """Returns when these are resident and no other is there: what a test that failed has left is taken away."""
        with self.client() as client:
            views = {view.deployment.name: view for view in client.deployments().deployments}
            for name in views.keys() - set(models):
                with contextlib.suppress(SubletError):  # It is going already.
                    client.retire(name)
            for name in models:
                if any(replica.state == "parked" for replica in views[name].replicas):
                    client.wake(name)
            eventually(lambda: self._states(client) == {name: {"resident"} for name in models}, "not as it was")
        eventually(lambda: len(self.engines()) == len(models), "engines are there that nobody wants")

    @staticmethod
    def _states(client: SyncClient) -> dict[str, set[str]]:
        """Of each model's replicas, but for those that are over."""
        views = client.deployments().deployments
        return {view.deployment.name: {replica.state for replica in view.replicas} - {"failed"} for view in views}

    def _answers(self) -> bool:
        ports = read_json(self.folder.path / "ports.json")
        return all(
            answers(f"http://127.0.0.1:{ports[name]}/readyz") for name in PARTS if name not in ("nats", "holder")
        )


@dataclass
class Load:
    """Chats to one model, one after another, in a thread, for the length of the block."""

    client: openai.OpenAI
    model: str
    answered_count: int = 0
    problems: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        eventually(lambda: self.answered_count > 0 or bool(self.problems), "no chat was answered")
        return self

    def __exit__(self, *_exc: object) -> None:
        before_count = self.answered_count
        eventually(lambda: self.answered_count > before_count or bool(self.problems), "chats stopped")
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.is_set():
            began_s = time.monotonic()
            try:
                chat(self.client, self.model)
                self.answered_count += 1
            except openai.OpenAIError as error:
                self.problems.append(f"{type(error).__name__}: {error}")
                self._over.wait(0.05)
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            self._over.wait(0.01)


def output_of(state_dir: Path) -> Path:
    """What `up` printed."""
    return state_dir.parent / f"{state_dir.name}.out"


def chat(client: openai.OpenAI, model: str, *, tokens_max: int = 4) -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=tokens_max
    )
    return answer.choices[0].message.content or ""


def parents() -> dict[int, int]:
    """{pid: parent} of every process that can be seen."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return found


def survivors(identities: set[ProcessIdentity]) -> set[int]:
    return {identity.pid for identity in identities if is_alive(identity)}


def answers(url: str) -> bool:
    """Whether it says 2xx now."""
    import urllib.request

    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return bool(200 <= response.status < 300)
    except OSError:
        return False


def eventually(holds: Callable[[], bool], otherwise: str, *, timeout_s: float = 60.0) -> None:
    """Returns as soon as it holds; fails with the sentence when it does not in time."""
    ends_at_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < ends_at_s, f"{otherwise} within {timeout_s:g} s"
        time.sleep(0.05)


def read_records(path: Path) -> list[dict[str, Any]]:
    """A log of JSON lines; other lines are left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def _variable(pid: int, name: str) -> str:
    """Of its environment; empty when it is gone or has none of that name."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return next((entry.partition("=")[2] for entry in entries if entry.startswith(f"{name}=")), "")


def _command(pid: int) -> bytes:
    """Its arguments, with a zero byte after each; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
