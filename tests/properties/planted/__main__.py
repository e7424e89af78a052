"""``python -m tests.properties.planted``: look for every planted fault and print the table."""

import argparse
import logging
import statistics
import sys

from tests.properties.planted.catalogue import BUGS, SOUND
from tests.properties.planted.search import search, table


def main() -> int:
    """The exit status: 0 when every fault was found and nothing where nothing is planted."""
    parser = argparse.ArgumentParser(prog="python -m tests.properties.planted", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="at most, for each fault")
    parser.add_argument("--sound", type=int, default=100, help="seeds that must find nothing where nothing is planted")
    parser.add_argument("--only", default="", help="faults with this in their name")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    found = []
    for bug in BUGS:
        if options.only in bug.name:
            found.append(search(bug, seeds_max=options.seeds))
            print(f"{bug.name}: {found[-1].seed_count} {found[-1].reason[:100]}", file=sys.stderr)
    print(table(found))
    counts = [f.seed_count for f in found if f.seed_count is not None]
    if counts:
        print(f"{len(counts)} of {len(found)} found; median {statistics.median(counts)} seeds, worst {max(counts)}")
    alarms = [f for f in (search(sound, seeds_max=options.sound) for sound in SOUND) if f.seed_count is not None]
    for alarm in alarms:
        print(f"false alarm at seed {alarm.seed_count}: {alarm.reason}")
    return 0 if len(counts) == len(found) and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
