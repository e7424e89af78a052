"""``python -m benchmarks NAME``: run one benchmark."""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Final

BENCHMARKS: Final = {
    "agent": "the node agent is killed again and again under load: how soon it has taken everything up, what is lost",
    "bus": "the bus beside nats-py alone: speed, and what it keeps when its server is killed",
    "broker": "parks and wakes of a 63 GB image through the memory broker: the link's part, and all the rest",
    "engine-model": "the engine model, in virtual time, against published figures that it was not fitted on",
    "mover": "how fast models leave a GPU and come back, by phase, for every swap driver",
    "serve": "a trace of many models through the whole stack on few GPUs, also with a service killed on the way",
    "placement": "how much of a cluster each policy allocates on the openb lists, and what a decision costs",
    "guard": "isolation on the software GPU: greedy processes against each grade, and memory given back",
    "planted": "faults planted in services and shells: how many seeds the checks need to notice each",
    "power-cut": "the power goes again and again while facts are written: what was acknowledged must be there",
    "scale": "placement on 500 nodes with 4,000 GPUs over a real server, beside KAI's published figures",
    "sim": "the simulator: its speed, equal traces, and thousands of seeds under faults without a violation",
    "swap": "many models on few GPUs in virtual time: what each swap policy adds to a request, beside a clairvoyant",
    "soak": "thousands of parks and wakes with kills and failing driver calls: nothing leaks, every content is right",
}
"""{name: what it measures}. The module of the same name (`-` as `_`) has ``main(arguments) -> exit status``."""


def usage() -> str:
    lines = ["usage: python -m benchmarks NAME [OPTIONS]     (NAME --help tells the options)", "", "benchmarks:"]
    lines += [f"  {name:<13} {summary}" for name, summary in BENCHMARKS.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in BENCHMARKS:
        near = difflib.get_close_matches(name, BENCHMARKS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there is: {', '.join(BENCHMARKS)}"
        print(f"error: there is no benchmark '{name}'; {hint}", file=sys.stderr)
        return 2
    try:
        status: int = importlib.import_module(f"benchmarks.{name.replace('-', '_')}").main(rest)
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
