"""What is read of the kernel's files, and that a file's pages can be wished for."""

import os
from pathlib import Path

from schemas.units import MiB
from services.broker import numa


def test_nodes_with_memory_are_found_and_a_host_without_the_folder_has_one(tmp_path: Path) -> None:
    for number, total in ((0, 1024), (1, 0), (3, 2048)):
        (tmp_path / f"node{number}").mkdir()
        (tmp_path / f"node{number}" / "meminfo").write_text(f"Node {number} MemTotal:   {total} kB\n")

    assert (0, 3) == numa.nodes(tmp_path)
    assert (0,) == numa.nodes(tmp_path / "none")


def test_a_gpus_node_is_found_by_either_form_of_its_bus_id(tmp_path: Path) -> None:
    (tmp_path / "0000:65:00.0").mkdir()
    (tmp_path / "0000:65:00.0" / "numa_node").write_text("1\n")
    (tmp_path / "0000:66:00.0").mkdir()
    (tmp_path / "0000:66:00.0" / "numa_node").write_text("-1\n")

    assert 1 == numa.node_of_pci("00000000:65:00.0", tmp_path)
    assert 1 == numa.node_of_pci("0000:65:00.0", tmp_path)
    assert 0 == numa.node_of_pci("0000:66:00.0", tmp_path)
    assert 0 == numa.node_of_pci("0000:67:00.0", tmp_path)


def test_a_wish_for_a_node_leaves_the_file_usable(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "block", os.O_RDWR | os.O_CREAT)
    try:
        os.ftruncate(descriptor, 2 * MiB)
        numa.place(descriptor, size_bytes=2 * MiB, numa_index=0)
        os.pwrite(descriptor, b"content", 4096)
        assert b"content" == os.pread(descriptor, 7, 4096)
    finally:
        os.close(descriptor)
