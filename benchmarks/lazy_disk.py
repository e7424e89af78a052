"""A disk that forgets what was not synced: what a power cut leaves, as a model. `benchmarks.lazy_mount` mounts it.

Every change lives in a volatile layer first. `sync_file` keeps a file's bytes and length, `sync_folder` keeps what was
made, renamed and removed in that folder; `cut` throws away the rest. A file is known by a number that is never used
again, so that a new file cannot inherit the bytes of one that was removed.

Two rules for names, as file systems differ:

- ``strict``: a name is kept by syncing its folder only. All that POSIX promises.
- ``ordered``: syncing any file or folder keeps every change of names before it, as the journals of ext4 and XFS do.
"""

import errno
import random
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

ROOT: Final = 1
PAGE_BYTES: Final = 4096

Names = Literal["strict", "ordered"]
Change = Mapping[tuple[int, str], int | None]
"""{(folder, name): the file that is there then}; all of it is kept or none: a rename is one change."""


@dataclass(slots=True)
class Node:
    """A file or a folder: as programs see it, and as the disk would have it after a cut."""

    number: int
    mode: int
    data: bytearray = field(default_factory=bytearray)
    kept: bytearray = field(default_factory=bytearray)
    dirty: list[tuple[int, int]] = field(default_factory=list)
    """[start, end) of what was written since the last sync."""
    cut_to: int | None = None
    """The least length since the last sync; what lay beyond it reads as zeros."""
    names: dict[str, int] = field(default_factory=dict)
    kept_names: dict[str, int] = field(default_factory=dict)
    time_ns: int = 0

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)


def failure(number: int) -> OSError:
    return OSError(number, errno.errorcode[number])


class LazyDisk:
    """Not thread-safe: the mount takes turns. Raises `OSError` as the system calls do."""

    def __init__(self, *, names: Names = "strict", capacity_bytes: int | None = None) -> None:
        self.rule = names
        self.capacity_bytes = capacity_bytes
        self.sync_count = 0
        self._nodes = {ROOT: Node(ROOT, stat.S_IFDIR | 0o755)}
        self._last_number = ROOT
        self._changes: list[Change] = []
        self._used_bytes = 0

    def node(self, number: int) -> Node:
        try:
            return self._nodes[number]
        except KeyError:
            raise failure(errno.ESTALE) from None

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    # ---- names ---------------------------------------------------------------------------------------------------

    def find(self, folder: int, name: str) -> Node:
        number = self.node(folder).names.get(name)
        if number is None:
            raise failure(errno.ENOENT)
        return self.node(number)

    def make(self, folder: int, name: str, mode: int) -> Node:
        """A new file or folder, by the type in `mode`."""
        if name in self.node(folder).names:
            raise failure(errno.EEXIST)
        self._last_number += 1
        made = Node(self._last_number, mode)
        self._nodes[made.number] = made
        self._change({(folder, name): made.number})
        return made

    def remove(self, folder: int, name: str, *, is_folder: bool) -> None:
        node = self.find(folder, name)
        if node.is_folder != is_folder:
            raise failure(errno.EISDIR if node.is_folder else errno.ENOTDIR)
        if node.names:
            raise failure(errno.ENOTEMPTY)
        self._change({(folder, name): None})

    def rename(self, folder: int, name: str, new_folder: int, new_name: str, *, may_replace: bool = True) -> None:
        moved = self.find(folder, name)
        present = self.node(new_folder).names.get(new_name)
        if present == moved.number:
            return
        if present is not None:
            if not may_replace:
                raise failure(errno.EEXIST)
            if self.node(present).names:
                raise failure(errno.ENOTEMPTY)
        self._change({(folder, name): None, (new_folder, new_name): moved.number})

    def _change(self, change: Change) -> None:
        for (folder, name), number in change.items():
            names = self.node(folder).names
            names.pop(name, None)
            if number is not None:
                names[name] = number
        self._changes.append(change)

    def _keep(self, change: Change) -> None:
        for (folder, name), number in change.items():
            kept = self.node(folder).kept_names
            kept.pop(name, None)
            if number is not None:
                kept[name] = number

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def read(self, number: int, offset: int, size: int) -> bytes:
        return bytes(self.node(number).data[offset : offset + size])

    def write(self, number: int, offset: int, data: bytes | memoryview) -> int:
        node = self.node(number)
        end = offset + len(data)
        grown = max(0, end - len(node.data))
        if self.capacity_bytes is not None and self._used_bytes + grown > self.capacity_bytes:
            raise failure(errno.ENOSPC)
        self._used_bytes += grown
        if offset > len(node.data):
            node.data.extend(bytes(offset - len(node.data)))
        node.data[offset:end] = data
        if node.dirty and node.dirty[-1][1] == offset:
            node.dirty[-1] = (node.dirty[-1][0], end)
        else:
            node.dirty.append((offset, end))
        return len(data)

    def truncate(self, number: int, size: int) -> None:
        node = self.node(number)
        self._used_bytes += size - len(node.data)
        if size < len(node.data):
            node.cut_to = size if node.cut_to is None else min(node.cut_to, size)
            del node.data[size:]
        else:
            node.data.extend(bytes(size - len(node.data)))

    # ---- what lasts ----------------------------------------------------------------------------------------------

    def sync_file(self, number: int) -> None:
        node = self.node(number)
        self.sync_count += 1
        if node.cut_to is not None:
            del node.kept[node.cut_to :]
        _fit(node.kept, len(node.data))
        for start, wrote_to in node.dirty:
            end = min(wrote_to, len(node.data))
            node.kept[start:end] = node.data[start:end]
        node.dirty.clear()
        node.cut_to = None
        if self.rule == "ordered":
            self._keep_all()

    def sync_folder(self, number: int) -> None:
        self.sync_count += 1
        if self.rule == "ordered":
            return self._keep_all()
        later = []
        for change in self._changes:
            if any(folder == number for folder, _ in change):
                self._keep(change)
            else:
                later.append(change)
        self._changes = later
        return None

    def _keep_all(self) -> None:
        for change in self._changes:
            self._keep(change)
        self._changes.clear()

    def cut(self, torn: random.Random | None = None) -> None:
        """The power goes and comes back.

        Nothing unsynced is left, or with `torn` a part of it: some pages, and the first few changes of names, as a disk
        and its journal may have got to them by chance.
        """
        if torn is not None:
            for change in self._changes[: torn.randint(0, len(self._changes))]:
                self._keep(change)
            for node in self._nodes.values():
                _tear(node, torn)
        self._changes.clear()
        reached = dict(self._reached(ROOT))
        self._nodes = reached
        for node in reached.values():
            node.data = bytearray(node.kept)
            node.dirty.clear()
            node.cut_to = None
            node.kept_names = {name: number for name, number in node.kept_names.items() if number in reached}
            node.names = dict(node.kept_names)
        self._used_bytes = sum(len(node.data) for node in reached.values())

    def _reached(self, number: int) -> Iterator[tuple[int, Node]]:
        node = self._nodes[number]
        yield number, node
        for child in node.kept_names.values():
            if child in self._nodes:
                yield from self._reached(child)

    def forget(self, number: int) -> None:
        """No program has it open any more. If it has no name either, its bytes are free."""
        node = self._nodes.get(number)
        if node is not None and not node.is_folder and not self._is_named(number):
            self._used_bytes -= len(node.data)
            node.data = bytearray()
            node.dirty.clear()

    def _is_named(self, number: int) -> bool:
        return any(number in node.names.values() for node in self._nodes.values() if node.is_folder)


def _fit(data: bytearray, size: int) -> None:
    """Cut or lengthened with zeros."""
    del data[size:]
    data.extend(bytes(size - len(data)))


def _tear(node: Node, torn: random.Random) -> None:
    """Some pages of what was written since the last sync reach the disk; a gap between them reads as zeros."""
    for start, end in node.dirty:
        for page in range(start // PAGE_BYTES, -(-end // PAGE_BYTES)):
            first, last = max(start, page * PAGE_BYTES), min(end, (page + 1) * PAGE_BYTES, len(node.data))
            if first < last and torn.random() < 0.5:
                if len(node.kept) < last:
                    _fit(node.kept, last)
                node.kept[first:last] = node.data[first:last]
