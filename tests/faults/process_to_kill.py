"""A process with the real shell of the toy service on a real NATS server, which kills itself at one point.

``python -m tests.faults.process_to_kill URL FOLDER STEP KIND`` (STEP "never": it lives on).
"""

import os
import signal
import sys
from pathlib import Path

import anyio

from kit.bus_nats import NatsBus
from kit.outcomes import Effect, Input
from kit.runner import Runner
from kit.steps import Step
from tests.faults.mortal import SILENT, kind_of
from tests.unit.kit.toy import Work, WorkDone, toy


async def main(url: str, folder: Path, step: str, kind: str) -> None:
    async def perform(effect: Effect, traceparent: str) -> Input:
        assert isinstance(effect, Work)
        with (folder / "performed").open("a") as file:
            file.write(effect.model + "\n")
        return WorkDone(model=effect.model)

    async def at_step(passed: Step, what: object) -> None:
        if passed == step and kind_of(what) == kind:
            os.kill(os.getpid(), signal.SIGKILL)

    async with NatsBus(url, name="toy") as bus:
        runner = Runner(
            toy(),
            None,
            bus,
            writer="autoscaler",
            instance=f"process-{os.getpid()}",
            tracer=SILENT,
            perform=perform,
            at_step=at_step,
        )
        await runner.run()


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4])
