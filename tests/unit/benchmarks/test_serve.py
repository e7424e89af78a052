"""What `serve` is asked, what it says of an outcome, and one small real run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serve
from benchmarks.__main__ import main
from benchmarks.clients import Clients, Sent
from benchmarks.faults import Kill, lost_with_gateway
from benchmarks.history import Counts, History
from benchmarks.serve import Outcome
from benchmarks.trace import Planned
from kit.bus_memory import MemoryBus, MemoryServer

ROOT = Path(__file__).resolve().parents[3]
HEADER = "t_s,model,input_tokens,output_tokens\n"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int | str | None, str]:
    try:
        status: int | str | None = main(arguments)
    except SystemExit as ended:
        status = ended.code
    return status, capsys.readouterr().err


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    rows = [f"{second},m{second % 3},20,8" for second in range(60)]
    path.write_text(HEADER + "\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serv"], "error: there is no benchmark 'serv'; did you mean 'serve'?"),
        (["serve"], "error: the following arguments are required: --trace"),
        (["serve", "--trace", "none.csv"], "error: the trace none.csv cannot be read: No such file"),
        (["serve", "--trace", "{trace}", "--models", "4"], "error: the trace has 3 models, and 4 were asked for"),
        (["serve", "--trace", "{trace}", "--models", "0"], "argument --models: '0' is no whole number from 1 on"),
        (["serve", "--trace", "{trace}", "--speed", "fast"], "argument --speed: 'fast' is no positive number"),
        (["serve", "--trace", "{trace}", "--kill", "holder"], "argument --kill: invalid choice: 'holder'"),
        (["serve", "--trace", "{trace}", "--models", "3"], "has no request in that time"),
        (
            ["serve", "--trace", "{trace}", "--models", "3", "--start", "0", "--json", "nowhere/out.json"],
            "nowhere/out.json cannot be written: there is no folder",
        ),
    ],
)
def test_what_is_asked_for_wrongly_is_one_sentence_before_anything_starts(
    capsys: pytest.CaptureFixture[str], trace: Path, arguments: list[str], sentence: str
) -> None:
    status, told = error_of(capsys, *(argument.format(trace=trace) for argument in arguments))

    assert 2 == status
    assert sentence in told
    assert 1 == told.count("\n")


# ---- figures --------------------------------------------------------------------------------------------------------


def request(*, sent_s: float, end_s: float = 1.0, failure: str = "", is_cut: bool = False) -> Sent:
    return Sent(
        planned=Planned(due_s=sent_s, model="m", input_tokens=1, output_tokens=1),
        sent_s=sent_s,
        end_s=end_s,
        first_token_s=None if failure else 0.5,
        held_s=None if failure else 0.25,
        token_count=1,
        failure=failure,
        is_cut=is_cut,
    )


def outcome(*requests: Sent, killed: Kill | None = None, pids_after: Mapping[str, int] | None = None) -> Outcome:
    clients = Clients(gateway_url="", api_key="")
    clients.requests.extend(requests)
    clients.failures.update(sent.failure for sent in requests if sent.failure)
    return Outcome(
        deploy_s=1.0,
        clients=clients,
        counts=Counts(wakes_s=[0.5] * 41, park_count=40),
        run_s=10.0,
        killed=killed,
        pids_before={"a": 1, "b": 2},
        pids_after=dict({"a": 1, "b": 2} if pids_after is None else pids_after),
        equal_writers=["autoscaler", "nodeagent", "placement", "swapper"],
        history=History(MemoryBus(MemoryServer())),
    )


def figures_of(made: Outcome) -> dict[str, Any]:
    return serve._figures(made, 2)


def test_an_engine_that_is_another_process_or_none_afterwards_was_restarted() -> None:
    figures = figures_of(outcome(request(sent_s=0.0), pids_after={"a": 7}))

    assert 2 == figures["engine_restart_count"]


def test_a_request_on_its_way_through_a_killed_gateway_is_counted_apart_from_failures() -> None:
    killed = Kill(name="gateway", at_s=60.0, gone_s=60.05, recovery_s=1.5)
    requests = [
        request(sent_s=59.5, end_s=60.01, failure="cut (X)", is_cut=True),
        request(sent_s=60.02, end_s=60.04, failure="cut (X)", is_cut=True),
        request(sent_s=61.0, end_s=62.0, failure="cut (X)", is_cut=True),
        request(sent_s=59.0, end_s=60.5, failure="deadline_exceeded"),
        request(sent_s=1.0, end_s=2.0),
    ]

    figures = figures_of(outcome(*requests, killed=killed))

    assert (2, 2, 1) == (figures["failed_count"], figures["lost_with_gateway_count"], figures["answered_count"])


@pytest.mark.parametrize("killed", [None, Kill(name="swapper", at_s=60.0, gone_s=60.05, recovery_s=1.5)])
def test_no_cut_is_excused_when_no_gateway_was_killed(killed: Kill | None) -> None:
    assert [] == lost_with_gateway([request(sent_s=59.5, end_s=61.0, failure="cut (X)", is_cut=True)], killed)


def test_latencies_are_those_of_answered_requests() -> None:
    figures = figures_of(outcome(request(sent_s=0.0), request(sent_s=0.0, failure="deadline_exceeded")))

    assert (0.25, 0.5) == (figures["added_latency_s_p99"], figures["first_token_s_p99"])


# ---- a small run ----------------------------------------------------------------------------------------------------


def started(trace: Path, *more: str) -> "subprocess.Popen[str]":
    arguments = ["--models", "3", "--gpus", "1", "--start", "0", "--every", "1", "--speed", "10", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "serve", "--trace", str(trace), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(folder: Path) -> list[str]:
    """Command lines or environments that name the stack's own folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if os.fsencode(folder) in told and int(process.name) != os.getpid():
            found.append(told.replace(b"\0", b" ").decode(errors="replace")[:200])
    return found


@pytest.mark.nats
@pytest.mark.slow
def test_a_small_run_with_the_swapper_killed_loses_nothing_and_replays(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run = started(trace, "--minutes", "0.1", "--kill", "swapper", "--json", str(out), "--state", str(tmp_path / "s"))

    table, progress = run.communicate(timeout=250)

    assert 0 == run.returncode, progress
    figures = json.loads(out.read_text())["figures"]
    assert (60, 0, 0, 4) == tuple(
        figures[name] for name in ("sent_count", "failed_count", "engine_restart_count", "replay_equal_count")
    ), progress
    assert 0 < figures["recovery_s"] < 60
    assert figures["wake_count"] >= 3
    assert "failed_count" in table
    assert "deploying 3/3" in progress
    assert [] == processes_of(tmp_path / "s")


@pytest.mark.nats
@pytest.mark.slow
def test_an_interrupt_ends_the_run_and_leaves_nothing_running(trace: Path, tmp_path: Path) -> None:
    run = started(trace, "--minutes", "1", "--state", str(tmp_path / "s"))
    assert run.stderr is not None
    deadline_s = time.monotonic() + 120
    while "deploying" not in run.stderr.readline():
        assert time.monotonic() < deadline_s

    run.send_signal(signal.SIGINT)
    run.communicate(timeout=200)

    assert 130 == run.returncode
    assert [] == processes_of(tmp_path / "s")
