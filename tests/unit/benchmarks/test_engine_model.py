"""The comparison of the engine model with published figures, its fit and its page."""

import json
from pathlib import Path

import pytest

from benchmarks import engine_article, engine_fit, engine_model, engine_sharing
from benchmarks.engine_page import fingerprint
from benchmarks.engine_rows import Row

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("family", engine_fit.FAMILIES)
def test_the_shipped_parameters_are_those_of_the_fit(family: str) -> None:
    """So nothing was adjusted by hand, or to another table."""
    gpu = engine_fit.known_gpu(family)
    shipped = {name: getattr(gpu, name) for name in engine_fit.PARAMETERS}

    assert shipped == pytest.approx(engine_fit.fitted(family), rel=0.01)


def test_the_fit_reproduces_its_own_figures() -> None:
    errors = sorted(abs(error) for _, _, error in engine_fit.residuals())

    assert errors[len(errors) // 2] < 0.05


def test_no_figure_of_a_comparison_is_in_the_fit() -> None:
    fitted = {round(1000 * row.measured_s, 2) for row in engine_fit.fit_set().rows}
    inter_token = {seen[2] for points in engine_sharing.SHARED_SEEN.values() for seen in points.values()}

    assert not fitted & inter_token
    assert engine_sharing.SHARED_MODEL not in {row.model for row in engine_fit.fit_set().rows}


def test_no_first_token_of_a_comparison_is_in_the_fit_of_a_requests_time() -> None:
    fitted = {round(1000 * row.measured_s, 2) for row in engine_fit.fit_set().first_tokens}
    compared = {
        round(row.measured, 2) for family in engine_model.FAMILIES for row in family.rows(0.01) if row.unit == "ms"
    }

    assert not fitted & compared
    assert engine_sharing.SHARED_MODEL not in {row.model for row in engine_fit.fit_set().first_tokens}


@pytest.mark.parametrize("family", engine_fit.FAMILIES)
def test_a_requests_time_outside_the_engine_is_within_what_was_seen(family: str) -> None:
    seen_s = [
        engine_fit.outside_s(row) for row in engine_fit.fit_set().first_tokens if row.gpu in engine_fit.FAMILIES[family]
    ]

    assert min(seen_s) <= engine_fit.fitted_request_s(family) <= max(seen_s)


def test_a_swaps_own_time_is_less_than_the_published_whole() -> None:
    assert 0 < engine_article.runtime_s() < engine_article.SWAPPED_S[1]


def test_every_family_names_its_source_and_where_it_is_wrong() -> None:
    names = [family.name for family in engine_model.FAMILIES]

    assert len(set(names)) == len(names)
    assert all(family.source and family.is_wrong_because for family in engine_model.FAMILIES)


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "engine-model.md").read_text(encoding="utf-8")

    assert f"made from {fingerprint()} " in page, "stale: python -m benchmarks engine-model --docs"


def test_an_error_is_relative_and_signed() -> None:
    assert Row(what="x", unit="s", measured=2.0, modelled=1.5).error == -0.25


def test_a_quick_run_writes_all_families_as_figures_and_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"

    assert engine_model.main(["--quick", "--json", str(out)]) == 0
    written = json.loads(out.read_text(encoding="utf-8"))
    met = {bar["name"]: bar["ok"] for bar in written["bars"]}
    assert written["label"] == "simulated"
    groups = {family.group for family in engine_model.FAMILIES}
    assert len(met) == len(groups) + sum(family.is_judged for family in engine_model.FAMILIES)
    assert met["family_article_median_error_percent"]
    assert met["family_sharing_median_error_percent"]
    # The families that the model is good at; those that it is not are told on the page.
    assert met["sharing_kept_median_error_percent"]
    assert met["sharing_throughput_median_error_percent"]
    assert met["sharing_inter_token_median_error_percent"]
    assert "not fitted" not in capsys.readouterr().err


def test_a_page_of_a_quick_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_model.main(["--quick", "--docs"]) == 2
    assert "leave --quick out" in capsys.readouterr().err


def test_a_wrong_folder_is_said_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_model.main(["--json", str(tmp_path / "none" / "out.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
