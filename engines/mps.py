"""What MPS does to an engine that we ship, as its environment says it: a client shares, and may have a ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engines.model.sharing import Sharing, SharingMode

if TYPE_CHECKING:
    from collections.abc import Mapping

PIPE_VARIABLE = "CUDA_MPS_PIPE_DIRECTORY"
PERCENTAGE_VARIABLE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"


def sharing_from(environment: Mapping[str, str], *, mode: SharingMode | None, switch_s: float) -> Sharing:
    """How this engine shares its GPU; `mode` when it was told so, else by the environment.

    The ceiling is the part of the GPU's processors that it may use at a time. What is no number between 0 and 100 is no
    ceiling, as with the real driver.
    """
    chosen: SharingMode = mode or ("mps" if environment.get(PIPE_VARIABLE) else "time-sliced")
    return Sharing(mode=chosen, switch_s=switch_s, sm_fraction=_ceiling(environment) if chosen == "mps" else 1.0)


def _ceiling(environment: Mapping[str, str]) -> float:
    try:
        percent = float(environment.get(PERCENTAGE_VARIABLE, ""))
    except ValueError:
        return 1.0
    return percent / 100 if 0 < percent <= 100 else 1.0
