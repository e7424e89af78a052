"""Both engines as processes: arguments, start, health, signals, and what they cost."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import softgpu
from tests.unit.engines.running import (
    PATIENCE_S,
    REPOSITORY,
    Engine,
    MiB,
    simulated,
    software_host,
    training,
)

SIMULATED = (
    "simulated",
    "--model",
    "m",
    "--weights-bytes",
    "1000",
    "--memory-bytes",
    "2000",
    "--gpu",
    "G",
    "--port",
    "0",
)


@pytest.fixture(scope="module")
def host() -> Iterator[softgpu.Host]:
    with software_host(phantom=True) as host:
        yield host


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engines", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def test_without_arguments_it_says_which_engines_there_are() -> None:
    finished = run()

    assert finished.returncode == 0
    assert "simulated" in finished.stdout
    assert "training" in finished.stdout


@pytest.mark.parametrize("name", ["simulated", "training"])
def test_help_lists_the_options(name: str) -> None:
    finished = run(name, "--help")

    assert finished.returncode == 0
    assert "--memory-bytes N" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("vllm",), "There is no engine 'vllm': choose simulated or training."),
        (("simulated",), "The following arguments are required: --model"),
        ((*SIMULATED, "--weights-bytes", "many"), "'many' is not a number of bytes above zero"),
        ((*SIMULATED, "--port", "70000"), "'70000' is not a port"),
        ((*SIMULATED, "--time-scale", "0"), "'0' is not a number above zero"),
        ((*SIMULATED, "--cold-start-s", "-1"), "'-1' is not a number of seconds"),
        ((*SIMULATED, "--profile", "h900"), "invalid choice: 'h900'"),
        ((*SIMULATED, "--colour"), "Unrecognized arguments: --colour"),
    ],
)
def test_a_wrong_argument_gets_one_sentence(arguments: tuple[str, ...], part: str) -> None:
    finished = run(*arguments)

    assert finished.returncode == 2
    assert part in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_an_unknown_gpu_fails_with_a_clear_line(host: softgpu.Host) -> None:
    with simulated(host, "--gpu", "GPU-00000000-0000-0000-0000-000000000000") as engine:
        assert engine.wait() == 1
        assert engine.wait_for("GPU not usable")["gpu"].startswith("GPU-0000")


def test_a_port_in_use_fails_with_a_clear_line(host: softgpu.Host) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        simulated(host, "--port", str(taken.getsockname()[1])) as engine,
    ):
        assert engine.wait() == 1
        assert "address already in use" in engine.wait_for("cannot listen")["reason"]


def test_while_loading_health_is_503_and_requests_are_refused(host: softgpu.Host) -> None:
    with simulated(host, cold_start_s=60) as engine:
        assert engine.get("/health").status == 503
        assert engine.get("/sublet/state").json["state"] == "loading"
        assert engine.complete().error["code"] == "model_loading"
        assert engine.post("/sleep").error["code"] == "model_loading"
        assert engine.post("/wake_up").error["code"] == "model_loading"
        assert engine.wait_for("cold start (simulated)")["cold_start_s"] == 60

        asked_s = time.monotonic()
        assert engine.terminate() == 0
        assert time.monotonic() - asked_s < 30, "it does not wait for its cold start"


def test_sigterm_ends_a_busy_engine_at_once_and_answers_its_requests(host: softgpu.Host) -> None:
    with simulated(host, time_scale=1).ready() as engine:
        connection = engine.open_stream("long", max_tokens=20_000)
        response = connection.getresponse()
        asked_s = time.monotonic()
        assert engine.terminate() == 0
        assert time.monotonic() - asked_s < 30, "its answer would take minutes"
        assert b'"code":"shutting_down"' in response.read()
        connection.close()


def test_it_ends_with_its_parent(host: softgpu.Host) -> None:
    """The parent starts an engine, says its pid and is killed; the engine's end shows as end of its output."""
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen(sys.argv[1:], stdout=1)\n"
        'print(\'{"message": "pid", "pid": %d}\' % child.pid, flush=True)\n'
        "child.wait()\n"
    )
    engine = [sys.executable, "-m", "engines", *SIMULATED, "--gpu", host.uuids()[0], "--cold-start-s", "60"]
    environment = {**os.environ, **host.environment()}
    parent = subprocess.Popen(
        [sys.executable, "-c", script, *engine], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    messages: list[str] = []
    with parent.stdout as output:
        for line in output:
            messages.append(json.loads(line)["message"])
            if "listening" in messages:
                parent.kill()
                break
        rest = output.read().decode()
    assert parent.wait(PATIENCE_S) != 0
    assert '"reason":"parent ended"' in rest
    assert '"message":"stopped"' in rest


def test_it_outlives_the_thread_that_started_it(host: softgpu.Host) -> None:
    """Worker threads end when they have been idle; the kernel's signal must not be taken for the parent's end."""
    started: list[Engine] = []
    starter = threading.Thread(target=lambda: started.append(simulated(host).ready()))
    starter.start()
    starter.join()
    with started[0] as engine:
        assert engine.complete().status == 200
        assert engine.terminate() == 0


def test_a_log_that_nobody_reads_any_more_does_not_stop_it_nor_its_end(host: softgpu.Host) -> None:
    command = [sys.executable, "-m", "engines", *SIMULATED, "--gpu", host.uuids()[0], "--cold-start-s", "60"]
    environment = {**os.environ, **host.environment()}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout as output:
        output.readline()
    process.terminate()
    with process.stderr as complaints:
        assert complaints.read() == b""
    assert process.wait(PATIENCE_S) == 0


def test_a_client_that_hangs_up_is_no_error(host: softgpu.Host) -> None:
    with simulated(host).ready() as engine:
        for _ in range(50):
            engine.open_stream("x", max_tokens=5000).close()
        engine.until(lambda state: state["in_flight"] == 0)
        assert engine.terminate() == 0
        assert engine.complaint() == ""
        assert [line for line in engine.lines if line["level"] != "info"] == []


@pytest.mark.parametrize("kind", ["simulated", "training"])
def test_an_idle_engine_is_light(host: softgpu.Host, tmp_path: Path, kind: str) -> None:
    """About fifty of them run on one small machine."""
    engine: Engine = simulated(host) if kind == "simulated" else training(host, tmp_path)
    with engine.ready():
        engine.get("/metrics")
        assert engine.memory_bytes() < 80 * MiB
        assert engine.thread_count() <= 8


def test_an_idle_engine_does_no_work(host: softgpu.Host) -> None:
    """Between two looks, 0.3 s apart, it uses no more than a tick of processor time, once its start is over."""

    def ticks() -> int:
        fields = Path(f"/proc/{engine.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    with simulated(host).ready() as engine:
        used: list[int] = []
        while len(used) < 10 and min(used, default=2) > 1:
            before = ticks()
            assert select_nothing(0.3)
            used.append(ticks() - before)
        assert min(used) <= 1, used


def select_nothing(wait_s: float) -> bool:
    """Let so much time pass; the test above is about exactly that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        silent.settimeout(wait_s)
        try:
            silent.recv(1)
        except TimeoutError:
            return True
    return False
