"""Golden transcripts: conversations with the simulated system, reviewed as a diff; `services/scenario.py` plays them.

`SUBLET_SNAPSHOTS=write pytest tests/simulation/test_transcripts.py` writes the answers anew.
"""

import os
from pathlib import Path

import pytest

from services.scenario import ScenarioError, main, replayed

SCENARIOS = Path(__file__).parent / "scenarios"
IS_WRITING = os.environ.get("SUBLET_SNAPSHOTS") == "write"


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.txt")), ids=lambda path: path.stem)
def test_the_system_still_says_what_was_reviewed(path: Path) -> None:
    written = path.read_text(encoding="utf-8")

    now = replayed(written)

    if IS_WRITING:
        path.write_text(now, encoding="utf-8")
        return
    assert written == now, "review the difference; SUBLET_SNAPSHOTS=write accepts it"


def test_a_command_that_is_none_is_named() -> None:
    with pytest.raises(ScenarioError, match="'dance' is no command; there are cluster, deploy"):
        replayed("cluster\ndance\n")


def test_a_scenario_that_cannot_be_played_gets_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.txt"
    path.write_text("deploy a portion=0.3\n")

    assert (2, 2) == (main([str(path)]), main([str(tmp_path / "missing.txt")]))
    assert ["begin with `cluster`", "No such file or directory"] == [
        line.rpartition(": ")[2] for line in capsys.readouterr().err.splitlines() if ": " in line
    ]
