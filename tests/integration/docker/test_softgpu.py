"""Containers with pid namespaces of their own share one software GPU host, by a mounted directory."""

import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import softgpu
from tests.fixtures import docker_engine

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
pytestmark = [
    pytest.mark.docker,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        "docker" not in os.environ.get("SUBLET_TESTS_REQUIRE", "").split(","), reason="`make compose-test` runs these"
    ),
]

# Words over the exported functions; what a program says is a line of JSON, and `input()` waits for the test.
PRELUDE = """
import ctypes as c, json, os, exported as e
MIB = 1 << 20
def say(value): print(json.dumps(value), flush=True)
def begin():
    e.call("cuInit", 0)
    for index in (1, 0):
        e.call("cuCtxSetCurrent", e.ask("cuDevicePrimaryCtxRetain", c.c_void_p, index))
def allocate(size, gives=0):
    address = c.c_uint64(); e.call("cuMemAlloc_v2", c.byref(address), size, gives=gives); return address.value
def free_and_total():
    free, total = c.c_size_t(), c.c_size_t(); e.call("cuMemGetInfo_v2", c.byref(free), c.byref(total))
    return [free.value // MIB, total.value // MIB]
"""
HOLD = "begin(); address = allocate({mib} * MIB); e.call('cuMemsetD8_v2', address, 77, 5000); say('up'); input()\n"


class Container:
    """A program in a container of its own, which exchanges lines with the test."""

    def __init__(self, host: softgpu.Host, image: str, program: str, *arguments: str) -> None:
        self.name = f"softgpu-test-{uuid.uuid4().hex[:8]}"
        libraries = softgpu.build()
        mounts = {host.state_dir: "/softgpu", libraries: "/libraries", ROOT / "tests" / "unit" / "softgpu": "/words"}
        command = ["docker", "run", "--rm", "-i", "--name", self.name, "--network", "none"]
        for source, target in mounts.items():
            command += ["-v", f"{source}:{target}"]
        for setting in ("SOFTGPU_DIR=/softgpu", "LD_LIBRARY_PATH=/libraries", "PYTHONPATH=/words"):
            command += ["-e", setting]
        command += [*arguments, "-e", "PYTHONDONTWRITEBYTECODE=1", image, "python", "-c", PRELUDE + program]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the container ended with {self.process.wait()}"
        return json.loads(line)

    def ask(self) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        return self.hear()

    def pid(self) -> int:
        """Of its first process, as the host sees it."""
        return int(docker("inspect", "--format", "{{.State.Pid}}", self.name))

    def kill(self) -> None:
        subprocess.run(["docker", "kill", "-s", "KILL", self.name], capture_output=True, check=False, timeout=60)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        self.process.wait(timeout=60)


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


Start = Callable[..., Container]


@pytest.fixture(scope="module")
def image() -> str:
    return docker_engine.ensure_base_images().get("PYTHON_IMAGE", "python:3.12-slim-bookworm")


@pytest.fixture
def host() -> Iterator[softgpu.Host]:
    state_dir = Path("/dev/shm") / f"softgpu-test-{uuid.uuid4().hex[:12]}"
    made = softgpu.Host(state_dir, gpus=2, profile="test-1", total_bytes=256 * MIB, context_bytes=4 * MIB).create()
    yield made
    made.remove()


@pytest.fixture
def start(host: softgpu.Host, image: str) -> Iterator[Start]:
    started: list[Container] = []

    def run(program: str, *arguments: str) -> Container:
        started.append(Container(host, image, program, *arguments))
        return started[-1]

    yield run
    for container in started:
        container.kill()


def used_mib(host: softgpu.Host) -> int:
    return host.status()["devices"][0]["used_bytes"] // MIB


def test_capacity_is_one_for_all_containers(host: softgpu.Host, start: Start) -> None:
    holder = start(HOLD.format(mib=200))
    holder.hear()

    other = start("begin(); allocate(100 * MIB, gives=2); say(free_and_total())")

    assert other.hear() == [48, 256]
    assert used_mib(host) in (204, 208)  # the other may have ended already


def test_a_killed_container_leaves_nothing(host: softgpu.Host, start: Start) -> None:
    holder = start(HOLD.format(mib=100))
    holder.hear()
    assert used_mib(host) == 104

    holder.kill()

    assert used_mib(host) == 0
    assert host.check(is_quiet=True) == []


def test_the_host_sees_the_processes_of_containers_by_its_own_pids(host: softgpu.Host, start: Start) -> None:
    list_own = """
begin(); allocate(10 * MIB); e.call("nvmlInit_v2"); gpu, count, rows = c.c_void_p(), c.c_uint(8), (c.c_ulonglong * 24)()
e.call("nvmlDeviceGetHandleByIndex_v2", 0, c.byref(gpu))
e.call("nvmlDeviceGetComputeRunningProcesses_v3", gpu, c.byref(count), rows)
say([[rows[3 * i] & 0xffffffff for i in range(count.value)], os.getpid()]); input()"""
    first, second = start(HOLD.format(mib=20)), start(list_own)
    first.hear()

    listed, own = second.hear()

    assert own == 1, "the container has a pid namespace of its own"
    assert listed in ([own], [own, own]) or set(listed) == {own}, "it can name itself only"
    seen = {process["pid"]: process["used_bytes"] for process in host.status()["devices"][0]["processes"]}
    assert seen == {first.pid(): 24 * MIB, second.pid(): 14 * MIB}


def test_a_declared_group_is_limited_in_a_container(host: softgpu.Host, start: Start) -> None:
    host.set_limit("team-a", device=0, soft_bytes=0, hard_bytes=64 * MIB)

    limited = start(
        "begin(); say(free_and_total()); allocate(61 * MIB, gives=2); allocate(60 * MIB); say('fits'); input()",
        "-e",
        "SOFTGPU_GROUP=team-a",
    )

    assert limited.hear() == [60, 64]
    assert limited.hear() == "fits"
    assert host.status()["groups"][0]["limits"][0]["used_bytes"] == 64 * MIB


def cgroup_of(pid: int) -> Path:
    """The directory of its cgroup v2."""
    lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    return Path("/sys/fs/cgroup") / next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))


def test_a_limit_on_the_container_s_own_cgroup_holds(host: softgpu.Host, start: Start) -> None:
    if docker("info", "--format", "{{.CgroupVersion}}") != "2":
        pytest.skip("this engine gives its containers no cgroup v2 of their own")
    limited = start("say('up'); input(); begin(); say(free_and_total()); allocate(61 * MIB, gives=2); say('refused')")
    limited.hear()

    host.set_limit(str(cgroup_of(limited.pid())), device=0, soft_bytes=0, hard_bytes=64 * MIB)

    assert limited.ask() == [60, 64]
    assert limited.hear() == "refused"


def test_an_agent_checkpoints_a_process_in_another_container(host: softgpu.Host, start: Start) -> None:
    program = HOLD.format(mib=50) + "say(set(e.read(address, 5000)) == {77}); input()"
    holder = start(program)
    holder.hear()
    agent = start(
        f"""
begin(); pid = {holder.pid()}
e.call("cuCheckpointProcessLock", pid, None); e.call("cuCheckpointProcessCheckpoint", pid, None); say('away'); input()
e.call("cuCheckpointProcessRestore", pid, None); e.call("cuCheckpointProcessUnlock", pid, None)
say('back'); input()""",
        "--pid",
        "host",
    )

    assert agent.hear() == "away"
    away_mib = used_mib(host)
    assert agent.ask() == "back"

    assert away_mib == 4, "only the agent's own context is left"
    assert used_mib(host) == 58
    assert holder.ask() is True
    assert host.check() == []
