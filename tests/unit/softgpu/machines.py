"""Software hosts and the processes that tests start on them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import softgpu

HERE = Path(__file__).resolve().parent


class Child:
    """A process that uses the host: it runs a program over `words.py` and exchanges lines with the test."""

    def __init__(self, program: str, environment: dict[str, str], descriptors: tuple[int, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from words import *\n" + program],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=descriptors,
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def hear(self) -> Any:
        """What it said next."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the child ended with {self.process.wait()}"
        return json.loads(line)

    def tell(self, text: object = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{text}\n")
        self.process.stdin.flush()

    def ask(self, text: object = "") -> Any:
        self.tell(text)
        return self.hear()

    def kill(self) -> None:
        """SIGKILL: nothing of its own tidies up."""
        self.process.kill()
        self.close()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                pipe.close()
        self.process.wait(timeout=60)


class Machine:
    """One software GPU host and the processes that a test starts on it."""

    def __init__(self, host: softgpu.Host) -> None:
        self.host = host.create()
        self.is_damaged = False  # on purpose, so that its state is not checked at the end
        self._children: list[Child] = []

    def environment(self, group: str | None = None) -> dict[str, str]:
        return {**os.environ, **self.host.environment(group=group), "PYTHONPATH": str(HERE)}

    def start(
        self, program: str, *, group: str | None = None, descriptors: tuple[int, ...] = (), **extra: str
    ) -> Child:
        child = Child(program, {**self.environment(group), **extra}, descriptors)
        self._children.append(child)
        return child

    def run(self, program: str, *, group: str | None = None) -> Any:
        """Runs a program to its end; what it said last."""
        command = [sys.executable, "-c", "from words import *\n" + program]
        finished = subprocess.run(
            command, env=self.environment(group), capture_output=True, text=True, timeout=200, check=False
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return json.loads(finished.stdout.splitlines()[-1]) if finished.stdout else None

    def findings(self) -> list[str]:
        """What is wrong with its shared state, unless the test damaged or removed it."""
        is_there = (self.host.state_dir / "state").exists()
        return self.host.check() if is_there and not self.is_damaged else []

    def used_bytes(self, index: int = 0) -> int:
        return self.host.status()["devices"][index]["used_bytes"]

    def chunk_files(self) -> list[str]:
        return [path.name for path in self.host.state_dir.glob("c*")]

    def close(self) -> None:
        for child in self._children:
            if child.process.poll() is None:
                child.kill()
            child.close()
        self.host.remove()


def quickest(measure: Callable[[], Sequence[float]], limits: Sequence[float], *, tries_max: int = 30) -> list[float]:
    """The shortest of each time over several measurements, until all are below their limits.

    What the code costs shows in the shortest, what busy neighbours did in the others. None is ever too short by that.
    """
    best = list(measure())
    for _ in range(tries_max - 1):
        if all(time < limit for time, limit in zip(best, limits, strict=True)):
            break
        best = [min(pair) for pair in zip(best, measure(), strict=True)]
    return best


class MakeMachine(Protocol):
    """The fixture `machine`: 256 MiB, free of charge, one GPU, unless the test says otherwise."""

    def __call__(self, **settings: Any) -> Machine: ...
