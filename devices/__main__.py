"""``python -m devices probe``: try an allocation that should be refused; what happened is the last line of stdout."""

import argparse
import json
import sys
from collections.abc import Sequence

from devices.probe import try_allocations


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it could be tried, whatever came of it."""
    parser = argparse.ArgumentParser(prog="python -m devices", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    probe = commands.add_parser("probe", help="one allocation that should do, then one that should be refused")
    probe.add_argument("--gpu", required=True, metavar="UUID", help="the GPU, as NVML prints it")
    probe.add_argument("--within", required=True, type=int, metavar="BYTES", help="should do; 0 leaves it out")
    probe.add_argument("--beyond", required=True, type=int, metavar="BYTES", help="should be refused, as a whole")
    options = parser.parse_args(arguments)
    print(json.dumps(try_allocations(options.gpu, within_bytes=options.within, beyond_bytes=options.beyond)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
