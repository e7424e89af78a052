"""`make up`: the whole of Sublet on this host until Ctrl-C."""

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import anyio

from kit.supervisor import EventKind, Interrupted, NotReady, ProcessEvent
from services.local.settings import StackSettings
from services.local.stack import LocalStack, running
from services.local.state import AlreadyRunning, StackError, StateFolder, read_json

GATEWAY_PORT: Final = 8080
STATE_DIR: Final = Path(".sublet")
TiB: Final = 1024**4


class Reporter:
    """Says what happens, a line at a time."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._is_up = False
        self._died: dict[str, tuple[float, ProcessEvent]] = {}
        """Those that are not back yet: when and how each ended first."""

    def __call__(self, event: ProcessEvent) -> None:
        now_s = time.monotonic()
        match event.kind:
            case EventKind.READY if not self._is_up:
                self.say(f"  {event.name:<11} ready {now_s - self._began_s:6.1f} s")
            case EventKind.READY if event.name in self._died:
                died_s, death = self._died.pop(event.name)
                ending = _ending(death.exit_code)
                self.say(
                    f"  {event.name} (pid {death.pid}) {ending}; restarted as pid {event.pid}, {now_s - died_s:.1f} s"
                )
            case EventKind.DIED if event.name in self._died:
                again = "no more" if event.next_start_s is None else f"again in {event.next_start_s:g} s"
                self.say(
                    f"  {event.name} does not come back: it {_ending(event.exit_code)}; next try {again}; see its log"
                )
            case EventKind.DIED:
                self._died[event.name] = (now_s, event)
            case _:
                return

    def up(self) -> None:
        self._is_up = True

    @staticmethod
    def say(line: str) -> None:
        print(line, flush=True)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def client_command() -> str:
    """How to call the client from here, to be copied."""
    if shutil.which("sublet"):
        return "sublet"
    beside = Path(sys.executable).parent / "sublet"
    return _shown(beside) if beside.exists() else f"{_shown(Path(sys.executable))} -m sublet"


def banner(stack: LocalStack, *, is_known: bool) -> str:
    """Addresses, what it runs on, what survives a stop, and one next step."""
    is_software = bool(stack.settings.gpu_count) and stack.label == "software GPU"
    gpus = (
        f"{stack.settings.gpu_count} x H100 80GB   software GPU - timings are not real hardware"
        if is_software
        else "the GPUs of this host"
    )
    lines = [
        "",
        "  Sublet · development mode",
        "",
        f"  Gateway    {stack.gateway_url}/v1   OpenAI-compatible",
        f"  Events     {stack.nats_url}",
        f"  GPUs       {gpus}",
    ]
    if is_software:
        host_tib = stack.settings.phantom_host_bytes / TiB
        lines += [
            f"  Host       {host_tib:g} TiB for parked models   phantom: it takes no memory",
            f"  Cold start {stack.settings.cold_start_s:g} s   a setting of the software engines, not a measurement",
        ]
    lines += [
        f"  State      {_shown(stack.folder.path)}   models, keys and history survive a stop; --fresh starts over",
        f"  Logs       {_shown(stack.folder.logs)}/",
        f"  Key        {stack.api_key}   also in {_shown(stack.context_path)}",
        "",
        f"  Next:  {client_command()} {'ps' if is_known else 'apply -f examples/three-models.yaml'}",
        "",
        "  Ctrl-C stops everything.",
        "",
    ]
    return "\n".join(lines)


def _shown(path: Path) -> str:
    return f"./{path.relative_to(Path.cwd())}" if path.is_relative_to(Path.cwd()) else str(path)


async def _run(settings: StackSettings) -> int:
    reporter = Reporter()
    is_known = StateFolder(settings.state_dir.resolve()).context.exists()
    reporter.say("starting Sublet on this host")
    async with running(settings, on_event=reporter) as stack:
        reporter.up()
        reporter.say(banner(stack, is_known=is_known))
        try:
            await anyio.sleep_forever()
        finally:
            reporter.say("\nstopping")
    reporter.say(f"stopped; kept in {_shown(stack.folder.path)}: deployments, keys, history, checkpoints of training")
    return 0 if stack.signal_received == signal.SIGINT else 128 + (stack.signal_received or 0)


def _already_running(state_dir: Path) -> str:
    folder = StateFolder(state_dir.resolve())
    context, processes = read_json(folder.context), read_json(folder.processes)
    lines = [
        f"already running (pid {processes.get('supervisor', 'unknown')}), which restarts by itself whatever dies:",
        f"  Gateway    {context.get('gateway_url')}/v1",
        f"  Events     {context.get('nats_url')}",
        f"  State      {_shown(folder.path)}",
        f"Next:  {client_command()} ps",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m services up",
        description="Every service, embedded NATS, and software GPUs where there are none.",
    )
    parser.add_argument(
        "--port", type=int, default=GATEWAY_PORT, help="of the gateway; 0: a free one (default: %(default)s)"
    )
    parser.add_argument("--state", type=Path, default=STATE_DIR, help="folder that is kept (default: %(default)s)")
    parser.add_argument("--gpus", type=int, default=2, help="software GPUs, 1 to 16 (default: %(default)s)")
    parser.add_argument(
        "--cold-start-s", type=float, default=10.0, help="of software engines, a setting (default: %(default)s)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget deployments, keys and history first")
    options = parser.parse_args(arguments)
    if not 1 <= options.gpus <= 16:
        parser.error("--gpus must be 1 to 16")
    settings = StackSettings(
        state_dir=options.state, gateway_port=options.port, gpu_count=options.gpus, cold_start_s=options.cold_start_s
    )
    try:
        if options.fresh:
            folder = StateFolder(options.state.resolve())
            with folder.locked():
                folder.clear()
        return anyio.run(_run, settings, backend_options={"use_uvloop": True})
    except AlreadyRunning:
        print(_already_running(options.state))
        return 0
    except Interrupted as interrupted:
        print(f"stopped: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal_number
    except (StackError, NotReady) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
