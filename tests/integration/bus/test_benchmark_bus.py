"""``python -m benchmarks bus --quick`` measures all that it promises. Whether bars are met is not asked here."""

import json
from pathlib import Path

import pytest

from benchmarks import bus
from tests.fixtures.nats import binary

pytestmark = pytest.mark.nats

OURS = ("publish", "read", "append", "commit", "kills")


def test_every_section_of_one_server_measures_all_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    binary()
    out = tmp_path / "out.json"
    chosen = [option for name in OURS for option in ("--only", name)]

    assert bus.main(["--quick", "--json", str(out), *chosen]) == 0

    written = json.loads(out.read_text())
    assert [name for name, value in written["figures"].items() if value is None] == []
    wrong = ("kill_lost_count", "kill_stored_twice_count", "kill_unresolved_count", "kill_reader_faults_count")
    assert [name for name in wrong if written["figures"][name] != 0] == []
    assert {"publish_ratio", "read_ratio", "append_ratio_p50", "commit_facts_per_s", "kill_count"} <= {
        bar["name"] for bar in written["bars"]
    }
    assert "failed" not in capsys.readouterr().out.replace("kill_failed_calls_count", "")


@pytest.mark.parametrize("arguments", [["--only", "nothing"], ["--json", "/no/such/folder/out.json"], ["--loop", "x"]])
def test_what_is_asked_for_wrongly_is_one_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bus.main(arguments)

    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
