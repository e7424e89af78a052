"""What a fresh host lacks is said in one sentence, before anything is made."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.architecture.sources import ROOT


def test_a_host_without_a_compiler_is_told_so_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "bootstrap.py", tmp_path / "tools")

    result = subprocess.run(
        [sys.executable, "tools/bootstrap.py"],
        cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert result.returncode == 1
    assert result.stderr.startswith("sublet: a C compiler is needed")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()


def test_make_alone_prints_its_targets() -> None:
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)

    for target in ("setup", "demo", "up", "test", "check", "bench", "soak", "compose-test"):
        assert f"make {target} " in result.stdout
