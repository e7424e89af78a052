"""All planted faults, and the seeds that are known to find them."""

from typing import Final

from tests.properties.planted import (
    alone_bugs,
    core_bugs,
    displacement_bugs,
    gang_bugs,
    gpu_bugs,
    share_bugs,
    shell_bugs,
    upkeep_bugs,
)
from tests.properties.planted.bug import Bug

BUGS: Final[tuple[Bug, ...]] = (
    *core_bugs.BUGS,
    *alone_bugs.BUGS,
    *gang_bugs.BUGS,
    *shell_bugs.BUGS,
    *upkeep_bugs.BUGS,
    *displacement_bugs.BUGS,
    *gpu_bugs.BUGS,
    *share_bugs.BUGS,
)
SOUND: Final[tuple[Bug, ...]] = (
    core_bugs.SOUND,
    alone_bugs.SOUND,
    gang_bugs.SOUND,
    shell_bugs.SOUND,
    upkeep_bugs.SOUND,
    displacement_bugs.SOUND,
    gpu_bugs.SOUND,
    share_bugs.SOUND,
)
"""Nothing planted: what the same seeds find here is a real fault, or a check that cries wolf."""
KNOWN_SEEDS: Final[dict[str, int]] = {
    "a grant that shrinks before its proof": 3,
    "a ladder that never ends": 20,
    "room that is not kept": 1,
    "a chain that stops at nonsense": 11,
    "a fold in stream order": 1,
    "a gang that starts before its commit": 1,
    "a lost node that still takes new replicas": 1,
    "a move that does not wait for its replacement": 4,
    "a park that is told before it has happened": 1,
    "a placement that answers twice": 5,
    "a placement that drops the minimum grade": 1,
    "a placement that keeps silent": 6,
    "a placement that takes its own deafness for losses": 1,
    "a quarantine that is only told": 1,
    "a reader that follows any chain": 1,
    "a return that ends both copies": 1,
    "a return that leaves both copies": 1,
    "a swapper that lets training push others aside": 1,
    "a swapper that neither repeats an order nor gives it up": 1,
    "a swapper whose clock stops at a restart": 1,
    "a wake that waits for bytes that nobody gives": 3,
    "a writer that goes on after a conflict": 8,
    "an account that forgets the reserve": 1,
    "an agent that forgets a held gang when it returns": 23,
    "an agent that forgets to end a held gang": 3,
    "an agent that forgets what it had begun": 17,
    "an agent that obeys late orders": 471,
    "an agent that starts anew instead of adopting": 16,
    "an inbox cursor one behind": 1,
    "facts after the cursor never handled": 2,
}
"""The first one; 0 for all that are not named here."""
