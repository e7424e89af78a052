"""Whose a process is."""

from pathlib import Path

from services.nodeagent.processes import tree_of


def test_an_engine_is_its_process_and_all_below_it(tmp_path: Path) -> None:
    """Names may hold brackets and spaces; that of a worker often does."""
    for pid, name, parent in ((7, "vllm", 1), (8, "EngineCore (0) S 1", 7), (9, "worker", 8), (10, "another", 1)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} {pid} {pid} 0 -1\n")
    (tmp_path / "11").mkdir()  # It ended while somebody looked.

    assert {7, 8, 9} == tree_of(7, proc=tmp_path)
    assert {99} == tree_of(99, proc=tmp_path)
    assert not tree_of(0, proc=tmp_path)
