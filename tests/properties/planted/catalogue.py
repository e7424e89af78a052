"""All planted faults, and the seeds that are known to find them."""

from typing import Final

from tests.properties.planted import alone_bugs, core_bugs, shell_bugs
from tests.properties.planted.bug import Bug

BUGS: Final[tuple[Bug, ...]] = (*core_bugs.BUGS, *alone_bugs.BUGS, *shell_bugs.BUGS)
SOUND: Final[tuple[Bug, ...]] = (core_bugs.SOUND, alone_bugs.SOUND, shell_bugs.SOUND)
"""Nothing planted: what the same seeds find here is a real fault, or a check that cries wolf."""
KNOWN_SEEDS: Final[dict[str, int]] = {}
