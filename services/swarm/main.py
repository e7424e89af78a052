"""``python -m services sim --seed 123``: one seed's run, or several; a failure is made small and printed."""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Final

from services.swarm.plan import Plan, draw_plan
from services.swarm.run import Outcome, carry_out
from services.swarm.shrink import replay_line, shrink

EXAMPLES: Final = """examples:
  python -m services sim --seed 7                  an hour of seed 7
  python -m services sim --seed 7 --plan           what happens in it, as numbered steps
  python -m services sim --seed 7 --only 12,40     only these steps
  python -m services sim --seed 0 --seeds 100      a hundred seeds, until one fails"""


def numbers(text: str) -> frozenset[int]:
    return frozenset() if text == "none" else frozenset(int(part) for part in text.split(","))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m services sim", epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--seed", type=int, required=True, help="draws everything that happens")
    made.add_argument("--seeds", type=int, default=1, help="so many, from --seed on")
    made.add_argument("--seconds", type=float, default=3600.0, help="simulated, before everything is healed")
    made.add_argument("--only", type=numbers, help="numbers of the steps to take, with commas; 'none' for none")
    made.add_argument("--without", type=numbers, help="numbers of the steps to leave out, with commas")
    made.add_argument("--plan", action="store_true", help="print the plan and do not run it")
    made.add_argument("--no-shrink", action="store_true", help="a failure is printed as it is")
    return made


def plan_of(options: argparse.Namespace, seed: int) -> Plan:
    plan = draw_plan(seed, lasts_s=options.seconds)
    if options.only is not None:
        plan = plan.only(options.only)
    return plan if options.without is None else plan.without(options.without)


def main(arguments: Sequence[str]) -> int:
    """0 when nothing was broken, 1 when something was, 2 when the command cannot be understood."""
    options = parser().parse_args(arguments)
    if options.seconds <= 0 or options.seeds < 1:
        sys.stderr.write("error: --seconds must be above 0, and --seeds 1 at least\n")
        return 2
    sys.stderr.write("simulated, in virtual time\n")
    for seed in range(options.seed, options.seed + options.seeds):
        plan = plan_of(options, seed)
        if options.plan:
            sys.stdout.write(plan.text() + "\n")
            continue
        begun_s = time.monotonic()
        outcome = carry_out(plan)
        sys.stdout.write(_line(outcome, took_s=time.monotonic() - begun_s) + "\n")
        if outcome.failure is not None:
            _tell(outcome, is_shrunk=not options.no_shrink)
            return 1
    return 0


def _line(outcome: Outcome, *, took_s: float) -> str:
    asked = ", ".join(f"{count} {how}" for how, count in outcome.asked.most_common())
    faults = sum(1 for step in outcome.plan.steps if step.is_fault)
    return (
        f"seed {outcome.plan.seed}: {'FAILED' if outcome.failure else 'ok'} in {took_s:.1f} s, {faults} faults, "
        f"{outcome.delivered_count} deliveries, {outcome.wake_count} wakes, requests: {asked or 'none'}; "
        f"converged in {outcome.converged_s:.0f} s, trace {outcome.trace_hash[:16]}"
    )


def _tell(outcome: Outcome, *, is_shrunk: bool) -> None:
    assert outcome.failure is not None
    if is_shrunk and outcome.plan.steps:
        sys.stderr.write("making it small\n")
        sys.stdout.write(shrink(outcome).text() + "\n")
        return
    failure = outcome.failure
    sys.stdout.write(f"t={failure.at_s:.2f} {failure.message}\nreplay: {replay_line(outcome.plan)}\n")
