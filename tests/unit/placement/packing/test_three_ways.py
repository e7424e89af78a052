"""Few nodes are looked at one by one, more have an index, and that is compiled once someone asked for it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from kit.settings import SettingsError
from services.placement import main
from services.placement.packing import compiled
from services.placement.packing.index import SCANNED_GPUS_MAX, Packer
from services.placement.packing.policies import policy_named
from tests.architecture.sources import ROOT
from tests.unit.placement.packing.fleets import GPU, fleet_of, node, share

STORY = """
import sys
from tests.unit.placement.packing.fleets import GPU, node, packer_of, share
packer = packer_of("least-waste", **{f"n{i}": node(GPU) for i in range(int(sys.argv[1]))})
packer.observed(share(300))
assert packer.choose(share(300)).node == "n0"
print(sorted({"numpy", "numba"} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    ("nodes", "loaded"), [(2, "[]"), (SCANNED_GPUS_MAX, "[]"), (SCANNED_GPUS_MAX + 1, "['numpy']")]
)
def test_small_fleets_load_neither_numpy_nor_numba(nodes: int, loaded: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", STORY, str(nodes)], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert (loaded, "") == (ran.stdout.strip(), ran.stderr)


def test_a_fleet_that_grows_and_shrinks_over_the_border_is_seen_whole_on_both_sides() -> None:
    packer = Packer(fleet_of(a=node(GPU)), policy_named("first-fit"))
    for i in range(SCANNED_GPUS_MAX):
        packer.fleet.add_node(f"b{i:02}", node(GPU))
    packer.fleet.take("a", [0], [900])
    assert "b00" == getattr(packer.choose(share(200)), "node", None)

    packer.fleet.remove_node("b00")
    packer.fleet.give("a", [0], [900])
    assert "a" == getattr(packer.choose(share(200)), "node", None)

    packer.fleet.add_node("b00", node(GPU))
    packer.fleet.take("a", [0], [900])
    assert "b00" == getattr(packer.choose(share(200)), "node", None)


def test_classes_beyond_the_remembered_ones_are_rated_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.placement.packing.scores.CLASSES_MAX", 2)
    packer = Packer(fleet_of(a=node(GPU), b=node(GPU)), policy_named("first-fit"), is_compiled=False)

    for _ in range(2):
        for units in (100, 200, 300):
            assert "a" == getattr(packer.choose(share(units)), "node", None)
    packer.fleet.take("a", [0], [1000])
    assert "b" == getattr(packer.choose(share(100)), "node", None)


def test_without_numba_the_setting_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(compiled, "_prepared", None)

    with pytest.raises(SettingsError, match=r"sublet\[compiled\]"):
        main.prepare_compiled()


def test_where_no_machine_code_can_be_kept_it_is_compiled_all_the_same() -> None:
    kept: list[bool] = []

    def njit(function: object = None, *, cache: bool = False) -> object:
        kept.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return function or (lambda inner: inner)

    assert compiled.compiled_function(SimpleNamespace(njit=njit), main.prepare_compiled) is main.prepare_compiled
    assert [True, False] == kept
