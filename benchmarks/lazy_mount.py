"""`benchmarks.lazy_disk` as a real folder: a file system in a process of its own, over the kernel's FUSE protocol.

No library: the protocol is a read and a write on ``/dev/fuse`` (linux/fuse.h), and mounting it is one system call.
Needs Linux, root and /dev/fuse; `why_not` says what is missing. Whatever the caller killed before `cut` has written
its last; whoever else still has a file open gets an error from then on.

Not there, as nobody here needs it: links, extended attributes, preallocation, shared memory maps.
"""

import ctypes
import errno
import functools
import os
import random
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from benchmarks.lazy_disk import LazyDisk, Names, Node, failure

DEVICE: Final = Path("/dev/fuse")
WRITE_BYTES_MAX: Final = 1 << 20
CACHE_S: Final = 3600
"""The kernel makes every change itself, so what it remembers is right until the cut, which ends the mount."""

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")
_MNT_FORCE, _MNT_DETACH = 1, 2
_INIT_FLAGS = (1 << 5) | (1 << 22)  # FUSE_BIG_WRITES, FUSE_MAX_PAGES
_SET_MODE, _SET_SIZE = 1, 8
_RENAME_NOREPLACE = 1
_SILENT = {2, 36, 42}  # FORGET, INTERRUPT, BATCH_FORGET: no answer is expected.


@functools.cache
def why_not() -> str | None:
    """Why it cannot be mounted here, or None: found by trying."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root, to mount a file system"
    if not DEVICE.exists():
        return "needs /dev/fuse (modprobe fuse; a container: --device /dev/fuse --cap-add SYS_ADMIN)"
    try:
        with tempfile.TemporaryDirectory(prefix="sublet-mount-") as folder, LazyMount(Path(folder) / "disk"):
            return None
    except OSError as error:
        return f"needs to mount a file system (a container: --device /dev/fuse --cap-add SYS_ADMIN): {error}"


# ---- the caller's side ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LazyMount:
    """The folder at `path`, while entered."""

    path: Path
    names: Names = "strict"
    capacity_bytes: int | None = None
    _process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.lazy_mount", str(self.path), self.names]
        command.append(str(self.capacity_bytes or 0))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[1],
            start_new_session=True,  # Ctrl-C must not end the disk before its users.
        )
        try:
            self._told("mounted")
        except OSError:
            self._process.communicate()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        assert self._process is not None
        self._process.communicate(timeout=30)

    def cut(self, *, torn_seed: int | None = None) -> None:
        """Back, mounted again, with what was synced, and with `torn_seed` a random part of the rest."""
        self._ask("cut" if torn_seed is None else f"cut {torn_seed}")

    def sync_count(self) -> int:
        return int(self._ask("syncs"))

    def limit(self, capacity_bytes: int | None) -> None:
        """How much it can hold from now on; None: anything."""
        self._ask(f"limit {capacity_bytes or 0}")

    def used_bytes(self) -> int:
        return int(self._ask("used"))

    def _ask(self, command: str) -> str:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._told("ok")

    def _told(self, wanted: str) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        first, _, rest = self._process.stdout.readline().strip().partition(" ")
        if first != wanted:
            raise OSError(f"the lazy disk at {self.path} failed: {first} {rest}".rstrip())
        return rest


# ---- the process ----------------------------------------------------------------------------------------------------


class Server:
    """Answers the kernel."""

    def __init__(self, disk: LazyDisk, path: Path) -> None:
        self._disk = disk
        self._path = path
        self._lock = threading.Lock()
        self._fd = -1
        self._thread: threading.Thread | None = None
        self._operations: dict[int, Callable[[int, memoryview], bytes]] = {
            1: self._lookup, 2: self._forget, 3: self._getattr, 4: self._setattr, 8: self._mknod, 9: self._mkdir,
            10: self._unlink, 11: self._rmdir, 12: self._rename, 14: self._open, 15: self._read, 16: self._write,
            17: self._statfs, 18: self._nothing, 20: self._fsync, 25: self._nothing, 26: self._init,
            27: self._open, 28: self._readdir, 29: self._nothing, 30: self._fsyncdir, 35: self._create,
            38: self._nothing, 42: self._forget_many, 45: self._rename2,
        }  # fmt: skip

    def mount(self) -> None:
        self._fd = os.open(DEVICE, os.O_RDWR)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        _system_call("mount", b"lazy", os.fsencode(self._path), b"fuse", 0, options.encode())
        self._thread = threading.Thread(target=self._serve, args=(self._fd,), daemon=True)
        self._thread.start()

    def unmount(self) -> None:
        """At once: whoever waits for the disk gets an error."""
        _system_call("umount2", os.fsencode(self._path), _MNT_FORCE | _MNT_DETACH)
        assert self._thread is not None
        self._thread.join(10)
        os.close(self._fd)

    def cut(self, torn_seed: int | None) -> None:
        with self._lock:
            self._disk.cut(None if torn_seed is None else random.Random(torn_seed))
            frozen = self._operations
            self._operations = {}
        self.unmount()
        self._operations = frozen
        self.mount()

    def _serve(self, fd: int) -> None:
        while True:
            try:
                request = os.read(fd, WRITE_BYTES_MAX + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                    continue
                return  # Unmounted.
            _, operation, unique, node, *_ = _IN.unpack_from(request)
            try:
                with self._lock:
                    handle = self._operations.get(operation)
                    if handle is None:
                        raise failure(errno.ENOSYS if self._operations else errno.EIO)
                    answer, error_number = handle(node, memoryview(request)[_IN.size :]), 0
            except OSError as error:
                answer, error_number = b"", error.errno or errno.EIO
            if operation in _SILENT:
                continue
            try:
                os.write(fd, _OUT.pack(_OUT.size + len(answer), -error_number, unique) + answer)
            except OSError as error:
                if error.errno != errno.ENOENT:  # The question was withdrawn.
                    return

    # ---- operations: (node, arguments) -> answer ------------------------------------------------------------------

    def _init(self, _node: int, _arguments: memoryview) -> bytes:
        pages = WRITE_BYTES_MAX // 4096
        return struct.pack("<4I2H2I2H8I", 7, 31, 1 << 17, _INIT_FLAGS, 16, 12, WRITE_BYTES_MAX, 1, pages, *([0] * 9))

    def _nothing(self, _node: int, _arguments: memoryview) -> bytes:
        return b""

    def _lookup(self, node: int, arguments: memoryview) -> bytes:
        return _entry(self._disk.find(node, _names(arguments)[0]))

    def _forget(self, node: int, _arguments: memoryview) -> bytes:
        self._disk.forget(node)
        return b""

    def _forget_many(self, _node: int, arguments: memoryview) -> bytes:
        (count,) = struct.unpack_from("<I", arguments)
        for node, _ in struct.iter_unpack("<2Q", arguments[8 : 8 + 16 * count]):
            self._disk.forget(node)
        return b""

    def _getattr(self, node: int, _arguments: memoryview) -> bytes:
        return _attributes_out(self._disk.node(node))

    def _setattr(self, node: int, arguments: memoryview) -> bytes:
        valid, _, _, size = struct.unpack_from("<2I2Q", arguments)
        found = self._disk.node(node)
        if valid & _SET_SIZE:
            self._disk.truncate(node, size)
        if valid & _SET_MODE:
            (mode,) = struct.unpack_from("<I", arguments, 68)
            found.mode = stat.S_IFMT(found.mode) | stat.S_IMODE(mode)
        return _attributes_out(found)

    def _mknod(self, node: int, arguments: memoryview) -> bytes:
        (mode,) = struct.unpack_from("<I", arguments)
        if not stat.S_ISREG(mode):
            raise failure(errno.EPERM)
        return _entry(self._disk.make(node, _names(arguments[16:])[0], mode))

    def _mkdir(self, node: int, arguments: memoryview) -> bytes:
        (mode,) = struct.unpack_from("<I", arguments)
        return _entry(self._disk.make(node, _names(arguments[8:])[0], stat.S_IFDIR | stat.S_IMODE(mode)))

    def _unlink(self, node: int, arguments: memoryview) -> bytes:
        self._disk.remove(node, _names(arguments)[0], is_folder=False)
        return b""

    def _rmdir(self, node: int, arguments: memoryview) -> bytes:
        self._disk.remove(node, _names(arguments)[0], is_folder=True)
        return b""

    def _rename(self, node: int, arguments: memoryview) -> bytes:
        (new_folder,) = struct.unpack_from("<Q", arguments)
        name, new_name = _names(arguments[8:])
        self._disk.rename(node, name, new_folder, new_name)
        return b""

    def _rename2(self, node: int, arguments: memoryview) -> bytes:
        new_folder, flags = struct.unpack_from("<QI", arguments)
        if flags & ~_RENAME_NOREPLACE:
            raise failure(errno.EINVAL)
        name, new_name = _names(arguments[16:])
        self._disk.rename(node, name, new_folder, new_name, may_replace=not flags)
        return b""

    def _open(self, node: int, _arguments: memoryview) -> bytes:
        self._disk.node(node)
        return _OPENED

    def _create(self, node: int, arguments: memoryview) -> bytes:
        _, mode = struct.unpack_from("<2I", arguments)
        made = self._disk.make(node, _names(arguments[16:])[0], stat.S_IFREG | stat.S_IMODE(mode))
        return _entry(made) + _OPENED

    def _read(self, node: int, arguments: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", arguments)
        return self._disk.read(node, offset, size)

    def _write(self, node: int, arguments: memoryview) -> bytes:
        _, offset, size, _, _, flags = struct.unpack_from("<2Q2IQI", arguments)
        written = self._disk.write(node, offset, arguments[40 : 40 + size])
        self._disk.node(node).time_ns = time.time_ns()
        if flags & os.O_DSYNC:  # O_SYNC contains it.
            self._disk.sync_file(node)
        return struct.pack("<2I", written, 0)

    def _statfs(self, _node: int, _arguments: memoryview) -> bytes:
        capacity = self._disk.capacity_bytes or 1 << 40
        free = max(0, capacity - self._disk.used_bytes) // 4096
        return struct.pack("<5Q4I24x", capacity // 4096, free, free, 1 << 20, 1 << 20, 4096, 255, 4096, 0)

    def _fsync(self, node: int, _arguments: memoryview) -> bytes:
        self._disk.sync_file(node)
        return b""

    def _fsyncdir(self, node: int, _arguments: memoryview) -> bytes:
        self._disk.sync_folder(node)
        return b""

    def _readdir(self, node: int, arguments: memoryview) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", arguments)
        listed = [(".", node), ("..", node), *self._disk.node(node).names.items()]
        answer = b""
        for position, (name, number) in enumerate(listed[offset:], start=offset + 1):
            raw = name.encode()
            kind = stat.S_IFMT(self._disk.node(number).mode) >> 12
            record = struct.pack("<2Q2I", number, position, len(raw), kind) + raw
            record += bytes(-len(record) % 8)
            if len(answer) + len(record) > size:
                break
            answer += record
        return answer


_OPENED: Final = struct.pack("<Q2I", 0, 0, 0)


def _names(arguments: memoryview) -> list[str]:
    return [os.fsdecode(raw) for raw in bytes(arguments).split(b"\0")[:-1]]


def _attributes(node: Node) -> bytes:
    size = len(node.data)
    seconds, nanoseconds = divmod(node.time_ns, 10**9)
    times = [seconds] * 3 + [nanoseconds] * 3
    return _ATTR.pack(node.number, size, -(-size // 512), *times, node.mode, 1, 0, 0, 0, 4096, 0)


def _attributes_out(node: Node) -> bytes:
    return struct.pack("<Q2I", CACHE_S, 0, 0) + _attributes(node)


def _entry(node: Node) -> bytes:
    return struct.pack("<4Q2I", node.number, 0, CACHE_S, CACHE_S, 0, 0) + _attributes(node)


def _system_call(name: str, *arguments: bytes | int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main(arguments: list[str]) -> int:
    """Serves until its standard input ends: with its caller, that is."""
    path, names, capacity = Path(arguments[0]), arguments[1], int(arguments[2])
    disk = LazyDisk(names="strict" if names == "strict" else "ordered", capacity_bytes=capacity or None)
    server = Server(disk, path)
    try:
        server.mount()
    except OSError as error:
        print(f"error {error}", flush=True)
        return 1
    print("mounted", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["cut", *seed]:
                server.cut(int(seed[0]) if seed else None)
                print("ok", flush=True)
            case ["limit", size]:
                disk.capacity_bytes = int(size) or None
                print("ok", flush=True)
            case ["syncs"]:
                print(f"ok {disk.sync_count}", flush=True)
            case ["used"]:
                print(f"ok {disk.used_bytes}", flush=True)
            case _:
                print(f"error no such command: {line.strip()}", flush=True)
    server.unmount()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
