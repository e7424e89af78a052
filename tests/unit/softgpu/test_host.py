"""The Python side: building, creating, switches, the command line."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import softgpu
from tests.unit.softgpu.machines import Machine, MakeMachine

pytestmark = pytest.mark.processes

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


@pytest.mark.parametrize("profile", sorted(softgpu.profiles()))
def test_every_cost_names_its_source(profile: str) -> None:
    costs = softgpu.profiles()[profile].costs

    guide = (Path(softgpu.__file__).parent.parent / "docs" / "softgpu.md").read_text(encoding="utf-8")
    assert [call for call, cost in costs.items() if not cost.source or cost.source not in guide] == []


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
        ("limit", "team-a", "0", "--soft", "64MiB", "--hard", "128MiB"),
        ("fault", "cuMemCreate", "--code", "CUDA_ERROR_OUT_OF_MEMORY"),
        ("fault", "cuMemAlloc", "--after", "3", "--times", "-1", "--delay", "250ms"),
        ("mps", "on"),
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
    assert re.search(rf"{child.pid} +python.* team-a +0.10 GiB +running", text)
    assert re.search(r"cuMemAlloc +3 +always +250 ms longer", text)
    assert re.search(r"team-a +0 +0.06 GiB +0.12 GiB +0.10 GiB +above soft", text)
    assert "LOST" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("limit", "a", "0", "--soft", "2GiB", "--hard", "1GiB"), "the soft limit (2.00 GiB) is above the hard one"),
        (("limit", "a", "7"), "no device 7 (there are 1)"),
        (("limit", "/no/such", "0"), "cannot set a limit on /no/such"),
        (("bandwidth", "0", "fast", "1GB"), "'fast' is no size"),
        (("fault", "cuMemCreate", "--delay", "soon"), "'soon' is no duration"),
        (("fault", "cuModuleLoad"), "softgpu does not model cuModuleLoad"),
        (("fault", "cuMemCreate", "--corrupt"), "a fault of the kind corrupt can be set for cuMemcpy"),
        (("fault",), "name the function"),
        (("fail", "1"), "process 1 does not use this host"),
        (("xid", "0", "31", "--strike"), "needs a process: name its pid"),
        (("xid", "0", "31", "--pid", "1"), "process 1 does not use this host"),
        (("lose", "3"), "no device 3"),
        (("dance",), "invalid choice"),
    ],
)
def test_bad_input_is_told_in_one_sentence(machine: MakeMachine, arguments: tuple[str, ...], sentence: str) -> None:
    answered = command_line(machine(), *arguments)

    assert answered.returncode in (1, 2)
    assert sentence in answered.stderr
    assert len(answered.stderr.splitlines()) == 1


def test_a_switch_answers_with_the_status_as_json(machine: MakeMachine) -> None:
    answered = command_line(machine(), "lose", "0", "--json")

    assert json.loads(answered.stdout)["devices"][0]["is_lost"] is True


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
