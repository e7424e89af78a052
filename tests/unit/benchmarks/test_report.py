"""Figures, bars, the table and the file."""

import json
from pathlib import Path

from benchmarks.report import WIDTH, Bar, Report, quantile, quantiles, shown


def report() -> Report:
    return Report(
        benchmark="serve",
        label="software GPU",
        commit="0123456789ab-dirty",
        figures={"sent_count": 12_345, "wake_s_p50": 0.25, "recovery_s": None, "residue_bytes_p50": 500 * 1024**2},
        bars=[
            Bar(name="resident_possible_without_residue", value=12_345_678, op="<=", bar=12_345_678),
            Bar(name="recovery_s", value=None, op="<=", bar=60),
        ],
        notes=["A sentence that is longer than a line of a terminal, so that it must be broken somewhere in it. " * 2],
    )


def test_what_was_not_measured_meets_no_bar() -> None:
    assert not Bar(name="failed_count", value=None, op="==", bar=0).is_met
    assert ["recovery_s"] == [bar.name for bar in report().missed]


def test_the_table_fits_a_terminal_and_names_what_it_was_measured_on() -> None:
    lines = report().table().splitlines()

    assert "serve · software GPU · commit 0123456789ab-dirty" == lines[0]
    assert [] == [line for line in lines if len(line) > WIDTH]


def test_the_file_has_the_standard_form(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    report().write(path)

    written = json.loads(path.read_text())

    assert ["benchmark", "commit", "label", "figures", "bars"] == list(written)
    assert {"name": "recovery_s", "value": None, "op": "<=", "bar": 60, "ok": False} == written["bars"][1]
    assert written["figures"]["recovery_s"] is None


def test_values_are_shown_with_the_unit_in_their_name() -> None:
    assert "1,828" == shown("sent_count", 1828)
    assert "0.558 s" == shown("wake_s_p50", 0.5578)
    assert "500.0 MiB" == shown("residue_bytes_p50", 500 * 1024**2)
    assert "not measured" == shown("recovery_s", None)


def test_a_quantile_is_a_value_that_was_seen() -> None:
    values = [float(value) for value in range(1, 101)]

    assert [50.0, 95.0, 99.0, 100.0] == [quantile(values, fraction) for fraction in (0.5, 0.95, 0.99, 1.0)]
    assert 7.0 == quantile([7.0], 0.5)


def test_quantiles_of_nothing_are_unknown_not_zero() -> None:
    assert {"wake_s_p50": None, "wake_s_p95": None} == quantiles("wake_s", [], (50, 95))
