"""``python -m services NAME``: run one service; ``up`` and ``demo`` run all of them on this host."""

import difflib
import sys
from collections.abc import Sequence

from services.registry import BY_NAME, SERVICES

STACKS = ("up", "demo")


def usage() -> str:
    lines = ["usage: python -m services NAME [OPTIONS]", "", "services:"]
    lines += [f"  {entry.name:<11} {entry.summary}" for entry in SERVICES]
    lines += [
        "",
        "stacks on this host:",
        "  up          every service, embedded NATS, software GPUs where there are none",
    ]
    lines += ["  demo        the same with models and traffic; ends with a table"]
    lines += ["", "without GPUs, processes or time passing:"]
    lines += ["  sim FILE    a scenario in virtual time, for example tests/simulation/scenarios/*.txt"]
    lines += ["  sim --seed N   whatever this seed draws: fleet, traffic, operators, faults (sim --seed N --help)"]
    lines += ["", "installations in containers:"]
    lines += ["  setup STEP  what must be there before they run: files, streams, key"]
    lines += ["  trim        take away the start of history that is in every service's snapshots"]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name = arguments[0]
    if name == "setup":
        from services.provision.main import main as run_setup

        return run_setup(arguments[1:])
    if name == "trim":
        from services.provision.trim import main as trim

        return trim(arguments[1:])
    if name == "sim":
        if any(argument.startswith("--seed") for argument in arguments):
            from services.swarm.main import main as run_seeds

            return run_seeds(arguments[1:])
        from services.scenario import main as play

        return play(list(arguments[1:]))
    if name in STACKS:
        from services.local.main import main as run_stack

        return run_stack(arguments)
    entry = BY_NAME.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, [*BY_NAME, *STACKS, "setup", "sim", "trim"], n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        print(f"error: there is no service '{name}'{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    from kit.serving import run_main

    return run_main(entry.load_main())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
