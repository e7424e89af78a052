"""What enters other people's processes: the client, and nothing else of ours."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.architecture.sources import ROOT, listing

# A backend-only build: no download, no isolated environment.
BUILD = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"


def test_the_wheel_holds_the_client_only(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("sublet-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    found = [name for name in names if name.split("/")[0] != "sublet" and ".dist-info/" not in name]

    assert "sublet/__init__.py" in names
    assert not found, (
        'the wheel would put these generic names into other people\'s environments; keep `packages = ["sublet"]` in '
        "pyproject.toml:" + listing(found)
    )
