"""The kernels compiled by numba, where it is installed and wanted (docs/adr/0012)."""

import importlib.util
import sys
from types import FunctionType, ModuleType
from typing import Any

from services.placement.packing import kernels
from services.placement.packing.fleet import Ask, Fleet, GpuShape, NodeShape
from services.placement.packing.policies import FirstFit
from services.placement.packing.scores import ScoreIndex

_prepared: ModuleType | None = None


def prepared() -> Any | None:
    """A second copy of the module `kernels` whose functions are compiled; None before `prepare`, and without numba."""
    return _prepared


def prepare() -> bool:
    """Load numba and compile, once for each process; False without numba.

    It takes about half a second where machine code of an earlier run was kept, else about eight. It is kept beside the
    source, in the user's cache folder, or where ``NUMBA_CACHE_DIR`` says; where none of these can be written, nowhere.
    """
    global _prepared
    if _prepared is not None:
        return True
    try:
        import numba
    except ImportError:
        return False
    spec = importlib.util.spec_from_file_location(f"{kernels.__name__}_compiled", kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Machine code that was kept looks for it there.
    spec.loader.exec_module(module)
    # Functions find each other as globals of their own module when they are compiled: at their first call, below.
    for name, function in list(vars(module).items()):
        if isinstance(function, FunctionType):
            setattr(module, name, compiled_function(numba, function))
    _call_all(module)
    _prepared = module
    return True


def compiled_function(numba: Any, function: Any) -> Any:
    """By `numba`; machine code is kept where that is possible."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # numba's word for: nowhere to keep it
        return numba.njit(function)


def _call_all(module: ModuleType) -> None:
    """All that `ScoreIndex` calls, so that no decision has to wait for a compiler."""
    fleet = Fleet()
    gpu = GpuShape(model="", capacity_units=1)
    fleet.add_node("", NodeShape(cpu_milli=0, memory_bytes=0, gpus=(gpu,)))
    index = ScoreIndex(fleet, module)
    index.choose(FirstFit(), Ask(size_units=1), (), gpu_spread=False)
    index.nth_roomy(FirstFit(), Ask(size_units=1), (), 0)
