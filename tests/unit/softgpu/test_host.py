"""The Python side: building, creating, switches, the command line."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import softgpu
from tests.unit.softgpu.machines import Machine, MakeMachine

MiB = 1 << 20


def command_line(one: Machine, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**one.environment(), "PYTHONPATH": str(Path(softgpu.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-m", "softgpu", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_uuids_follow_from_seed_and_index(tmp_path: Path) -> None:
    first = softgpu.Host(tmp_path / "a", gpus=2, seed="x").uuids()
    second = softgpu.Host(tmp_path / "b", gpus=3, seed="x", profile="l4-24").uuids()

    assert first == second[:2]
    assert len(set(second)) == 3
    assert softgpu.Host(tmp_path / "a", gpus=1).uuids() != first[:1]


def test_a_host_is_created_once_and_adopted_after(machine: MakeMachine) -> None:
    one = machine(gpus=2)
    child = one.start("context(); address = ok(cu.cuMemAlloc(100 * MiB)); say('up'); wait()")
    child.hear()

    one.host.create()

    assert one.used_bytes() == 100 * MiB


def test_other_settings_are_refused_rather_than_ignored(machine: MakeMachine) -> None:
    one = machine()
    with pytest.raises(softgpu.HostError, match="other settings"):
        softgpu.Host(one.host.state_dir, gpus=4).create()


def test_many_creators_make_one_host(machine: MakeMachine) -> None:
    one = machine()
    one.host.remove()

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: one.host.create().uuids(), range(8)))

    assert set(made) == {one.host.uuids()}


def test_an_unknown_profile_is_told_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(softgpu.HostError, match="h100-80"):
        softgpu.Host(tmp_path, gpus=1, profile="h100")


@pytest.mark.parametrize("profile", sorted(softgpu.profiles()))
def test_every_profile_makes_a_host(machine: MakeMachine, profile: str) -> None:
    one = machine(profile=profile, total_bytes=None)

    assert one.host.status()["devices"][0]["name"] == softgpu.profiles()[profile].name


def test_a_missing_compiler_is_told_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTGPU_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("CC", "no-such-compiler")

    with pytest.raises(
        softgpu.BuildError, match=r"no-such-compiler is not installed: install both .* and try again\.$"
    ):
        softgpu.build()


def test_many_builders_build_once(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "SOFTGPU_BUILD": str(tmp_path / "build"),
        "PYTHONPATH": str(Path(softgpu.__file__).parent.parent),
    }
    program = "import softgpu; print(softgpu.build())"
    builders = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]

    assert [builder.wait(timeout=120) for builder in builders] == [0, 0, 0]
    assert (tmp_path / "build" / "libcuda.so.1").exists()


def test_a_fault_lets_some_calls_pass_and_some_fail(machine: MakeMachine) -> None:
    one = machine()
    one.host.set_fault("cuMemCreate", after=1, times=2, code="CUDA_ERROR_OUT_OF_MEMORY")
    one.host.set_fault("cuMemAlloc", times=-1, code="CUDA_ERROR_ECC_UNCORRECTABLE")

    created, allocated = one.run("""
context(); say([error(create(2 * MiB)) for _ in range(4)], [error(cu.cuMemAlloc(MiB)) for _ in range(2)])""")

    refused = "CUDA_ERROR_OUT_OF_MEMORY"
    assert created == ["CUDA_SUCCESS", refused, refused, "CUDA_SUCCESS"]
    assert allocated == ["CUDA_ERROR_ECC_UNCORRECTABLE"] * 2
    one.host.clear_faults()
    assert one.run("context(); say(error(cu.cuMemAlloc(MiB)))") == "CUDA_SUCCESS"


def test_an_nvml_function_can_fail_too(machine: MakeMachine) -> None:
    one = machine()
    one.host.set_fault("nvmlDeviceGetMemoryInfo", code=999)

    assert one.run("""
handle = gpu()
try: nv.nvmlDeviceGetMemoryInfo(handle)
except nv.NVMLError_Unknown: say('failed', nv.nvmlDeviceGetMemoryInfo(handle).total // MiB)""") == ["failed", 256]


def test_a_code_that_does_not_exist_is_refused(machine: MakeMachine) -> None:
    with pytest.raises(softgpu.HostError, match="CUDA_ERROR_NONSENSE"):
        machine().host.set_fault("cuMemCreate", code="CUDA_ERROR_NONSENSE")


def test_the_command_line_shows_and_switches(machine: MakeMachine) -> None:
    one = machine(gpus=2)
    child = one.start("context(); address = ok(cu.cuMemAlloc(100 * MiB)); say('up'); wait()", group="team-a")
    child.hear()

    steps = [
        ("limit", "team-a", "0", "64MiB", "128MiB"),
        ("fault", "cuMemCreate", "0", "1", "CUDA_ERROR_OUT_OF_MEMORY"),
        ("bandwidth", "1", "53GB", "26.5GB"),
        ("lose", "1"),
        ("xid", "0", "79"),
        ("utilization", "0", "80", "40"),
    ]
    assert [command_line(one, *step).stderr for step in steps] == [""] * len(steps)
    status = json.loads(command_line(one, "status", "--json").stdout)
    text = command_line(one, "status").stdout

    assert status["groups"][0]["limits"][0]["hard_bytes"] == 128 * MiB
    assert status["devices"][1]["d2h_bytes_per_s"] == 26_500_000_000
    assert status["devices"][1]["is_lost"] is True
    assert f"pid {child.pid}" in text
    assert "group team-a" in text


def test_the_command_line_tells_that_there_is_no_host(machine: MakeMachine) -> None:
    one = machine()
    one.host.remove()

    answered = command_line(one, "status")

    assert answered.returncode == 1
    assert "no host at" in answered.stderr


def test_a_process_can_load_a_host_without_any_environment(machine: MakeMachine) -> None:
    one = machine()
    environment = {name: value for name, value in one.environment().items() if not name.startswith(("LD_", "SOFTGPU_"))}
    program = f"""
import sys; sys.path.insert(0, {str(Path(softgpu.__file__).parent.parent)!r})
import pathlib, softgpu; softgpu.Host(pathlib.Path({str(one.host.state_dir)!r}), gpus=1).load()
from words import *
context(); say(free_and_total()[1])"""
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )

    assert json.loads(finished.stdout) == 256
