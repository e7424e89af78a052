"""The contracts of `[tool.importlinter]` hold, and would notice if they did not."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.sources import ROOT

TOOL = ROOT / "tools" / "import_contracts.py"


def checked(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), str(root)], capture_output=True, text=True, check=False)


def test_import_contracts_hold() -> None:
    result = checked(ROOT)

    assert result.returncode == 0, (
        "imports cross a border; each broken contract ends with what to do instead:\n" + result.stdout
    )


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("services/placement/core.py", "import time", "decisions do no I/O and read no clock"),
        ("services/placement/core.py", "import services.placement.scoring", "decisions do no I/O and read no clock"),
        ("services/placement/handlers.py", "import services.swapper.core", "services meet on the bus only"),
        ("services/placement/handlers.py", "import nats", "only the adapter knows NATS"),
        ("services/placement/handlers.py", "import softgpu", "only the development supervisor knows the software GPU"),
        ("services/placement/handlers.py", "import sublet", "deployables on top, vocabulary at the bottom"),
        ("services/placement/core.py", "import numpy", "only packing knows numpy and numba"),
        ("engines/model.py", "import pynvml", "only devices knows NVML and CUDA"),
        ("engines/model.py", "import schemas", "engines reach the hardware port only"),
        ("devices/api.py", "import schemas", "the hardware port imports nothing of ours"),
        ("kit/runner.py", "import devices", "deployables on top, vocabulary at the bottom"),
        ("sublet/client.py", "import schemas", "the client stands alone"),
    ],
)
def test_a_forbidden_import_breaks_its_contract(tmp_path: Path, file: str, line: str, contract: str) -> None:
    make_small_checkout(tmp_path)
    (tmp_path / file).write_text(line + "\n")

    result = checked(tmp_path)

    assert result.returncode == 1
    assert f"{contract} BROKEN" in result.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kit/bus_nats.py", "import nats"),
        ("devices/nvml.py", "import pynvml"),
        ("engines/model.py", "import devices.api"),
        ("services/local/__init__.py", "import softgpu"),
        ("services/placement/handlers.py", "import devices.nvml"),
        ("services/placement/packing/scores.py", "import numpy.typing"),
        ("services/placement/packing/compiled.py", "import numba"),
    ],
)
def test_an_allowed_import_breaks_none(tmp_path: Path, file: str, line: str) -> None:
    make_small_checkout(tmp_path)
    (tmp_path / file).write_text(line + "\n")

    result = checked(tmp_path)

    assert result.returncode == 0, result.stdout


def make_small_checkout(root: Path) -> None:
    """Our layout with empty modules, except for a helper of a core that reads the clock."""
    (root / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for package in (
        "sublet", "schemas", "kit", "devices", "softgpu", "engines", "services", "services/local",
        "services/placement", "services/placement/packing", "services/swapper",
    ):  # fmt: skip
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    for module in ("kit/bus_nats.py", "devices/nvml.py", "devices/api.py", "services/swapper/core.py"):
        (root / module).touch()
    (root / "services/placement/scoring.py").write_text("import random\n")
