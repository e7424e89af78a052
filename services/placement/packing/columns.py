"""How nodes, asks and a policy lie in flat arrays of whole numbers, for the kernels.

Flat, because compiled code counts references to each array that it touches, and calls cost by the number of arrays.
Numbers from here are part of the machine code that numba keeps, which it compares with the time of `kernels.py` alone:
who changes one here without a change there removes ``__pycache__``.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

# ---- a node: one row; rows are in the order of names ----
CPU: Final = 0
"""Milli-CPU left."""
MEMORY: Final = 1
"""Bytes left."""
OPEN: Final = 2
LABELS: Final = 3
"""Number of the node's set of labels."""
GPU_COUNT: Final = 4
VALUE: Final = 5
"""By the policy's potential, as the node is."""
CHANGED: Final = 6
"""When it changed last, counted in changes."""
GPUS: Final = 7
"""From here on three for each GPU: the number of its shape; units free; parts of it free, none where overcommitted."""
KIND: Final = 0
FREE: Final = 1
PART: Final = 2
GPU_WIDTH: Final = 3

# ---- an ask ----
ASK_GPUS: Final = 0
ASK_CPU: Final = 1
ASK_MEMORY: Final = 2
ASK_SPREAD: Final = 3
ASK_LABELS: Final = 4
"""Where in it stands, for each set of labels, whether that will do."""
ASK_NEEDS: Final = 5
"""From here on two for each kind of GPU: the units that it takes, -1 for never; the same in parts of it."""

# ---- rules: a head, in which `..._AT` says where a table begins ----
FORMULA: Final = 0
GPU_ORDER: Final = 1
HOST_ORDER: Final = 2
GPU_BY_STEP: Final = 3
SINGLE_WEIGHT: Final = 4
"""Of all typical classes of one GPU, and of those without."""
CAPACITY_AT: Final = 5
"""[kind] units."""
STEPS_AT: Final = 6
STEP_COUNT: Final = 7
CPU_STEPS_AT: Final = 8
CPU_STEP_COUNT: Final = 9
NEEDS_AT: Final = 10
"""[kind, i] units that typical classes of one GPU need, ascending, filled up with what no GPU has."""
NEED_COUNT: Final = 11
FIT_WEIGHTS_AT: Final = 12
"""[kind, CPU steps reached, needs met] weight of the typical classes of one GPU that fit."""
SET_COUNT: Final = 13
"""Groups of typical classes of several GPUs that need the same of each."""
SET_NEEDS_AT: Final = 14
"""[group, kind] units; -1: never."""
SET_FIT_WEIGHTS_AT: Final = 15
"""[group, CPU steps reached, GPUs that fit (`SET_WIDTH`)] weight of the classes that have room."""
SET_WEIGHTS_AT: Final = 18
HOLES_AT: Final = 19
"""[kind, thousandths free of a GPU] what such a GPU is worth."""
SHORTAGE_COUNT: Final = 20
SHORTAGES_AT: Final = 21
"""Two for each: parts of a GPU that a core feeds; weight."""
KIND_COUNT: Final = 22
HEAD_LENGTH: Final = 23
SET_WIDTH: Final = 63

# ---- formulas and orders ----
FIRST_FIT: Final = 0
BEST_FIT: Final = 1
SPREAD: Final = 2
DOT_PRODUCT: Final = 3
POTENTIAL: Final = 4

BY_NAME: Final = 0
FEWEST_GPUS_FIRST: Final = 1
MOST_GPUS_FIRST: Final = 2
ORDER_SPAN: Final = 64
"""More than a node has GPUs: a node's GPUs are a set of bits."""
