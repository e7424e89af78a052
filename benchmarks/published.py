"""What others allocated on the openb lists, in percent of all GPUs, mean of ten seeds at 130 % of arrivals.

From the FGD artefact (hkust-adsl/kubernetes-scheduler-simulator @ 8f3d6417, `experiments/analysis/expected_results`).
"""

from typing import Final

_POLICIES: Final = ("random", "dot-product", "best-fit", "fgd")
_ROWS: Final = {
    "default": (87.47, 90.85, 93.08, 95.39),
    "cpu050": (91.24, 93.27, 93.79, 95.21),
    "cpu100": (89.11, 91.95, 93.44, 95.35),
    "cpu200": (83.77, 87.70, 92.40, 95.05),
    "cpu250": (80.42, 83.81, 91.45, 93.41),
    "gpushare40": (86.00, 89.56, 91.69, 94.15),
    "gpushare60": (83.65, 87.11, 89.36, 91.40),
    "gpushare80": (81.22, 84.49, 87.01, 89.30),
    "gpushare100": (79.44, 82.42, 85.01, 86.90),
    "gpuspec10": (87.43, 90.39, 93.30, 94.95),
    "gpuspec20": (87.24, 89.97, 93.30, 94.84),
    "gpuspec25": (86.94, 89.63, 93.23, 94.74),
    "gpuspec33": (86.46, 89.14, 93.09, 94.55),
    "multigpu20": (88.69, 92.06, 93.93, 95.65),
    "multigpu30": (89.27, 93.28, 94.72, 96.46),
    "multigpu40": (90.09, 94.19, 95.23, 96.99),
    "multigpu50": (90.27, 94.85, 95.74, 97.18),
}
PUBLISHED_PERCENT: Final = {pods: dict(zip(_POLICIES, row, strict=True)) for pods, row in _ROWS.items()}
"""{list: {policy: allocated percent}}"""

PROTOTYPE_PERCENT: Final = {
    "default": 95.9,
    "cpu050": 95.9,
    "cpu100": 95.9,
    "gpushare40": 94.5,
    "gpushare60": 91.8,
    "gpuspec10": 95.9,
    "gpuspec20": 95.9,
    "multigpu20": 96.4,
    "multigpu30": 96.9,
}
"""What our own first prototype reached, which the default policy must not fall behind."""

CEILING_PERCENT: Final = {
    "default": 96.45,
    "cpu050": 96.45,
    "cpu100": 96.45,
    "gpushare40": 95.12,
    "gpushare60": 93.08,
    "gpuspec10": 96.54,
    "gpuspec20": 96.67,
    "multigpu20": 96.93,
    "multigpu30": 97.30,
}
"""About what can be reached without refusing what has room: a linear program over classes and node shapes (patterns of
GPUs, CPU, memory, models) in which a class that asks for no more of anything than another is taken at least as often.
Approximate: fluid, no rounding of CPU by node; a single run may pass it."""
