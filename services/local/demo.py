"""`make demo`: three models and a training job on two software GPUs, real HTTP traffic, and a table at the end."""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import anyio

from kit.bus import BusError
from kit.supervisor import Interrupted, NotReady
from services.local.chats import Chats, RequestFailed
from services.local.settings import StackSettings
from services.local.stack import LocalStack, running
from services.local.state import StackError
from services.local.story import MODELS, RIVAL, TRAINING, TRAINING_SHARE, Measured, Story
from services.local.tenant import tenant_of
from services.local.up import Reporter

JSON_PATH: Final = Path("build/demo.json")
GPU_COUNT: Final = 2
COLD_START_S: Final = 10.0
"""A setting of the software engines; engines on real GPUs take minutes for these models."""
WHOLE_S: Final = 200.0
"""A demo that takes longer is stuck: it lasts about a minute."""
AFTER_PARK_FASTER_MIN: Final = 2.0
"""Times sooner than after a cold start of `COLD_START_S`. Low, because a busy host must not fail the demo."""


class _Stuck(Exception):
    """The demo did not end in time."""


@dataclass(slots=True)
class Progress:
    """Lines with the time since the start; knows the last one."""

    began_s: float
    last: str = ""

    def __call__(self, line: str) -> None:
        self.last = line
        print(f"  {time.monotonic() - self.began_s:5.1f} s  {line}", flush=True)


def report(measured: Measured, *, label: str, commit: str) -> dict[str, Any]:
    """The demo's figures in the form of a benchmark's."""
    figures: dict[str, float | int] = {
        "gpus_used_count": GPU_COUNT,
        "gpus_dedicated_count": len(MODELS) + 1,
        "cold_start_setting_s": COLD_START_S,
        "requests_count": measured.request_count,
        "requests_failed_count": measured.failed_count,
        "tokens_count": measured.token_count,
        "training_interruptions_count": measured.interruption_count,
        "training_restarts_count": measured.restart_count,
        "training_steps_count": measured.checkpoint_step_count,
        "training_steps_lost_count": measured.steps_lost,
    }
    for model in MODELS:
        for case, values in _cases(measured).items():
            figures[f"{_flat(model.name)}_{case}_first_token_s"] = round(values[model.name], 4)
    slowest = min(measured.cold_s[model.name] / measured.parked_s[model.name] for model in MODELS)
    figures["after_park_faster_than_cold_min_ratio"] = round(slowest, 2)
    bars = [
        _bar("requests_failed_count", measured.failed_count, "<=", 0),
        _bar("training_steps_lost_count", measured.steps_lost, "<=", 0),
        _bar("training_restarts_count", measured.restart_count, "<=", 0),
        _bar("training_interruptions_count", measured.interruption_count, ">=", 1),
        _bar("training_steps_in_checkpoint_count", measured.checkpoint_step_count, ">=", measured.step_count),
        _bar("after_park_faster_than_cold_min_ratio", round(slowest, 2), ">=", AFTER_PARK_FASTER_MIN),
    ]
    return {"benchmark": "demo", "commit": commit, "label": label, "figures": figures, "bars": bars}


def _cases(measured: Measured) -> dict[str, dict[str, float]]:
    return {"resident": measured.resident_s, "after_park": measured.parked_s, "cold_start": measured.cold_s}


def _flat(name: str) -> str:
    return name.replace("-", "_").replace(".", "_")


def _bar(name: str, value: float, op: str, bar: float) -> dict[str, Any]:
    return {"name": name, "value": value, "op": op, "bar": bar, "ok": value <= bar if op == "<=" else value >= bar}


def table(measured: Measured, *, label: str) -> str:
    """What the demo found, in 80 columns."""
    yields = (
        f"gave way {measured.interruption_count} times, {measured.steps_lost} of "
        f"{measured.checkpoint_step_count} steps lost"
    )
    requests = f"{measured.request_count}, {measured.failed_count} failed; {measured.token_count} tokens"
    lines = [
        "",
        f"  First token, seconds, as an HTTP client saw it ({label})",
        "",
        f"  {'MODEL':<14}{'SHARE':<14}{'GPU':<6}{'RESIDENT':>9}{'AFTER PARK':>12}{'COLD START *':>14}",
    ]
    for model in MODELS:
        name = model.name
        lines.append(
            f"  {name:<14}{f'{model.share:g} / {model.limit:g}':<14}{f'gpu{measured.gpu_index[name]}':<6}"
            f"{measured.resident_s[name]:>9.3f}{measured.parked_s[name]:>12.2f}{measured.cold_s[name]:>14.2f}"
        )
    lines += [
        f"  {TRAINING:<14}{TRAINING_SHARE:<14g}{f'gpu{measured.gpu_index[TRAINING]}':<6}{yields}",
        "",
        f"  GPUs used      {GPU_COUNT}   ({label})",
        f"  GPUs dedicated {len(MODELS) + 1}   one for each model and the training job",
        f"  Requests       {requests}   ({label})",
        "",
        "  Shares are request / limit of a GPU; what nobody claims goes to those below their limit.",
        f"  * Of a cold start, {COLD_START_S:g} s are a setting of the software engines.",
        f"  {RIVAL.name} comes back to a GPU that the training job has to leave first.",
        "  Timings are those of a software GPU, not of real hardware.",
        "",
    ]
    return "\n".join(lines)


async def _run(state_dir: Path, commit: str) -> dict[str, Any]:
    progress = Progress(began_s=time.monotonic())
    settings = StackSettings(
        state_dir=state_dir, gpu_count=GPU_COUNT, cold_start_s=COLD_START_S, uses_software_gpu=True
    )
    Reporter.say("Sublet demo: three models and a training job on two software GPUs; about a minute\n")
    found: dict[str, Any] = {}
    async with running(settings, on_event=Reporter()) as stack:
        progress(f"all services are ready; gateway at {stack.gateway_url}")
        with anyio.move_on_after(WHOLE_S) as scope:
            measured = await _story(stack, progress)
            found = report(measured, label=stack.label, commit=commit)
            print(table(measured, label=stack.label), flush=True)
        if scope.cancelled_caught:
            raise _Stuck(f"the demo was not finished after {WHOLE_S:g} s; the last that happened: {progress.last}")
    if not found:
        raise Interrupted(stack.signal_received or 2)
    return found


async def _story(stack: LocalStack, progress: Progress) -> Measured:
    settings = stack.settings
    checkpoints = stack.folder.service("nodeagent") / "checkpoints" / settings.tenant / TRAINING
    async with (
        Chats(stack.gateway_url, api_key=stack.api_key) as chats,
        tenant_of(stack.folder, nats_url=stack.nats_url, name=settings.tenant) as tenant,
    ):
        return await Story(tenant, chats, checkpoints=checkpoints, say=progress).tell()


def current_commit() -> str:
    """Of the checkout; 'unknown' outside one."""
    asked = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "unknown"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m services demo", description="Three models and a training job on two software GPUs; a table."
    )
    parser.add_argument("--json", type=Path, default=JSON_PATH, help="where figures go (default: %(default)s)")
    options = parser.parse_args(arguments)
    state_dir = Path(tempfile.mkdtemp(prefix="sublet-demo-"))
    try:
        found = anyio.run(_run, state_dir, current_commit(), backend_options={"use_uvloop": True})
    except Interrupted as interrupted:
        print(f"stopped: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal_number
    except (StackError, NotReady, RequestFailed, BusError, _Stuck) as error:
        print(f"error: {error}\nlogs are in {state_dir / 'logs'}", file=sys.stderr)
        return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"  figures: {options.json}\n\n  Next:  make up        the same, to use")
    missed = [bar for bar in found["bars"] if not bar["ok"]]
    for bar in missed:
        print(f"error: {bar['name']} is {bar['value']}, wanted {bar['op']} {bar['bar']}", file=sys.stderr)
    if missed:
        print(f"logs are in {state_dir / 'logs'}", file=sys.stderr)
        return 1
    shutil.rmtree(state_dir, ignore_errors=True)
    return 0
