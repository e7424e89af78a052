"""``python -m benchmarks broker``: parks and wakes of one large image through the memory broker, link and rest apart.

On the software GPU, whose link has the speed of the profile's and whose copies move nothing. The broker is the real
process; this one is the engine, with the client that engines have.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

import softgpu
from benchmarks.progress import Progress
from benchmarks.report import Bar, Report, Value, commit
from devices.api import Device, GiB, MiB, Region
from engines.store.connection import StoreSettings
from engines.store.memory import GpuStore
from schemas.brokers import AccountOpen, BrokerMessage, HostReserve

ROOT: Final = Path(__file__).resolve().parent.parent
LINK_BYTES_PER_S: Final = 53_000_000_000
"""Of the profile h100-80."""
IMAGE_BYTES: Final = 63_000_000_000 // (2 * MiB) * (2 * MiB)
OTHER_BYTES: Final = 12 * GiB
"""What another engine seals while this one wakes."""
HOLDS: Final = {"made": "lent-only", "pooled": "all"}
"""{name in the figures: the broker's setting `hold`}"""
_KEY: Final = "benchmark"
_START_S: Final = 30.0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks broker", description=__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="wakes of each kind (default 5)")
    add("--json", type=Path, metavar="OUT", help="write figures and bars there")
    add("--check", action="store_true", help="exit status 1 when a bar is missed")
    return parser


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0 when it ran, 1 when a bar is missed and asked for."""
    options = _parser().parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="broker-", dir="/dev/shm"))  # Where GPUs and arena lie.
    host = softgpu.Host(folder / "gpu", gpus=1, profile="h100-80", phantom=True).create()
    host.load()
    progress, figures = Progress(), dict[str, Value]()
    try:
        for name, hold in HOLDS.items():
            progress.say(f"broker: {options.rounds} wakes, memory {name}")
            with _broker(folder / name, host, hold=hold) as sockets:
                figures |= {f"{name}_{key}": value for key, value in _measured(host, sockets, options.rounds).items()}
    finally:
        host.remove()
        shutil.rmtree(folder, ignore_errors=True)
    report = Report(
        benchmark="broker", label="software GPU", commit=commit(), figures=figures, bars=_bars(figures),
        notes=[f"One image of {IMAGE_BYTES} bytes; at {LINK_BYTES_PER_S} bytes/s that is {_ideal_s():.3f} s."],
    )  # fmt: skip
    print(report.table())
    if options.json:
        report.write(options.json)
    return int(options.check and bool(report.missed))


def _ideal_s() -> float:
    return IMAGE_BYTES / LINK_BYTES_PER_S


def _bars(figures: Mapping[str, Value]) -> list[Bar]:
    bars = []
    for name in HOLDS:
        link, rest, wait = (figures[f"{name}_{key}"] for key in ("link_fraction", "rest_ms", "wait_behind_seal_ms"))
        bars.append(Bar(name=f"{name}: copy phase, part of the link", value=link, op=">=", bar=0.95))
        bars.append(Bar(name=f"{name}: wake beside its ideal copy, ms", value=rest, op="<=", bar=60))
        bars.append(Bar(name=f"{name}: wait behind a seal, ms", value=wait, op="<=", bar=25))
    return bars


@contextmanager
def _broker(folder: Path, host: softgpu.Host, *, hold: str) -> Iterator[Path]:
    """The folder of a running broker's sockets."""
    folder.mkdir()
    chosen = {
        "STATE_DIR": folder, "ARENA_DIR": folder / "arena", "HOLD": hold, "HOST_BUDGET_BYTES": 160 * GiB,
    }  # fmt: skip
    environment = {
        **os.environ, **host.environment(), **{f"SUBLET_BROKER_{name}": str(value) for name, value in chosen.items()}
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "services", "broker"], cwd=ROOT, env=environment)
    try:
        yield folder
    finally:
        process.terminate()
        process.wait()


def _tell(folder: Path, message: BrokerMessage) -> None:
    """As the node agent does; waits for a broker that starts."""
    ends_at_s = time.monotonic() + _START_S
    with socket.socket(socket.AF_UNIX) as control:
        while control.connect_ex(str(folder / "control.sock")):
            if time.monotonic() > ends_at_s:
                raise SystemExit("error: the broker does not start")
            time.sleep(0.05)
        control.sendall(msgspec.json.encode(message) + b"\n")
        answer = control.recv(65536)
    if answer.startswith(b'{"refused"'):
        raise SystemExit(f"error: {answer.decode()}")


def _store(folder: Path, device: Device, replica_id: str, size_bytes: int) -> GpuStore:
    gpu_uuid = device.gpu_uuid
    _tell(
        folder,
        AccountOpen(replica_id=replica_id, lease_epoch=1, tenant="a", key=_KEY, granted_bytes={gpu_uuid: size_bytes}),
    )
    _tell(folder, HostReserve(replica_id=replica_id, deployment_id=replica_id, size_bytes=size_bytes))
    settings = StoreSettings(socket_path=str(folder / "engines.sock"), replica_id=replica_id, lease_epoch=1, key=_KEY)
    return GpuStore(device, settings)


def _measured(host: softgpu.Host, folder: Path, round_count: int) -> dict[str, Value]:
    from devices.cuda import CudaDevice  # after the software driver was loaded

    device = CudaDevice(host.uuids()[0])
    store = _store(folder, device, "model", IMAGE_BYTES)
    region = device.reserve(IMAGE_BYTES)
    store.take(region, "weights")
    sealed = store.seal("weights", image_id="weights", generation=1, content_id="")
    parks, links, rests = [], [], []
    for _ in range(round_count):
        parks.append(_timed_park(store, region))
        woken = store.restore(region, "weights", image_id="weights", generation=1)
        links.append(woken.copied_bytes / LINK_BYTES_PER_S / woken.copy_s)
        rests.append(1000 * (woken.restore_s - _ideal_s()))
    _timed_park(store, region)
    wait_ms = _wait_behind_seal(device, folder, store, region)
    store.give_back(region, "weights")
    store.close()
    device.close()
    return {
        "seal_s": sealed.seal_s,
        "park_ms": 1000 * statistics.median(parks),
        "link_fraction": statistics.median(links),
        "rest_ms": statistics.median(rests),
        "rest_ms_max": max(rests),
        "wait_behind_seal_ms": wait_ms,
    }


def _timed_park(store: GpuStore, region: Region) -> float:
    started_s = time.perf_counter()
    store.give_back(region, "weights")
    return time.perf_counter() - started_s


def _wait_behind_seal(device: Device, folder: Path, store: GpuStore, region: Region) -> float:
    """Milliseconds that a wake waits for the link while another engine's seal has it."""
    other = _store(folder, device, "trainer", OTHER_BYTES)
    state = device.reserve(OTHER_BYTES)
    other.take(state, "state")
    seal = threading.Thread(
        target=lambda: other.seal("state", image_id="state", generation=1, content_id=""), name="seal"
    )
    seal.start()
    time.sleep(0.05)  # a quarter of the seal's time: it is on the link
    woken = store.restore(region, "weights", image_id="weights", generation=1)
    seal.join()
    other.give_back(state, "state")
    other.close()
    return 1000 * woken.wait_s
