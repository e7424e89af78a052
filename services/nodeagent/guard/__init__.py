"""The guard: the strongest way to hold every replica to its grant, found by trying, told as a grade with its reason.

`enforcing.Guard` is all that the rest of the agent needs. Behind it: `api` (the one interface), a file for each backend
(`driver`, `broker`, `hardware`, `cooperative`), `proof` (the live allocation probe), `watchdog` (measures all the
time, whatever the backend), and `compute` (how processors are shared).
"""

from services.nodeagent.guard.api import NotEnforced, Share
from services.nodeagent.guard.enforcing import Guard

__all__ = ["Guard", "NotEnforced", "Share"]
