"""A process that takes all the device memory that it can get, and one that wants only what it is guaranteed.

``python -m benchmarks.guard_greedy take --gpu UUID --piece-bytes N``: takes pieces for ever, trying again every 0.5 ms
after a refusal; where its environment names a memory broker, from there and from the driver in turns. It begins at the
first SIGUSR2. SIGUSR1: it gives all back and rests; SIGUSR2: it goes on.

``python -m benchmarks.guard_greedy own --gpu UUID --piece-bytes N --rounds R``: takes one piece R times, as soon as it
can and within 50 ms, and gives it back, from SIGUSR2 on; the last line of its output is what came of it.

``python -m benchmarks.guard_greedy hold --gpu UUID --piece-bytes N``: takes one piece and keeps it.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Final, Protocol

from devices.api import ClientEvicted, DeviceError, DeviceSettings, Region
from devices.cuda import CudaDevice
from engines.store.connection import StoreError, settings_from
from engines.store.memory import GpuStore

AGAIN_S: Final = 0.0005
OWN_WITHIN_S: Final = 0.05
OWN_PAUSE_S: Final = 0.005


class Source(Protocol):
    """Where memory comes from."""

    def take(self) -> bool:
        """One piece more; false when it was refused."""

    def give_all_back(self) -> None: ...


class Driver:
    def __init__(self, device: CudaDevice, *, piece_bytes: int) -> None:
        self._device = device
        self._piece_bytes = piece_bytes
        self._pieces: list[Region] = []

    def take(self) -> bool:
        try:
            self._pieces.append(self._device.allocate(self._piece_bytes))
        except ClientEvicted:
            raise
        except DeviceError:
            return False
        return True

    def give_all_back(self) -> None:
        while self._pieces:
            self._device.free(self._pieces.pop())


class Broker:
    def __init__(self, device: CudaDevice, store: GpuStore, *, piece_bytes: int) -> None:
        self._device = device
        self._store = store
        self._piece_bytes = piece_bytes
        self._pieces: dict[str, Region] = {}
        self._count = 0

    def take(self) -> bool:
        region = self._device.reserve(self._piece_bytes)
        self._count += 1
        name = f"piece-{self._count}"
        try:
            self._store.take(region, name)
        except (StoreError, DeviceError):
            self._device.release_addresses(region)
            return False
        self._pieces[name] = region
        return True

    def give_all_back(self) -> None:
        while self._pieces:
            name, region = self._pieces.popitem()
            self._store.give_back(region, name)
            self._device.release_addresses(region)


def opened(gpu_uuid: str, piece_bytes: int) -> list[Source]:
    """All that this process may try, the memory broker first."""
    device = CudaDevice(gpu_uuid, settings=DeviceSettings(chunk_bytes=piece_bytes))
    sources: list[Source] = []
    broker = settings_from(os.environ)
    if broker is not None:
        sources.append(Broker(device, GpuStore(device, broker), piece_bytes=piece_bytes))
    return [*sources, Driver(device, piece_bytes=piece_bytes)]


class Wish:
    """What signals have asked for."""

    def __init__(self) -> None:
        self.is_resting = True
        signal.signal(signal.SIGUSR1, lambda *_: self._set(is_resting=True))
        signal.signal(signal.SIGUSR2, lambda *_: self._set(is_resting=False))

    def _set(self, *, is_resting: bool) -> None:
        self.is_resting = is_resting


def take(gpu_uuid: str, piece_bytes: int) -> None:
    wish = Wish()
    sources = opened(gpu_uuid, piece_bytes)
    print("up", flush=True)
    while True:
        if wish.is_resting:
            for source in sources:
                source.give_all_back()
            time.sleep(AGAIN_S)
        else:
            answers = [source.take() for source in sources]
            if not any(answers):
                time.sleep(AGAIN_S)


def own(gpu_uuid: str, piece_bytes: int, round_count: int) -> None:
    """Of what it is guaranteed; from the broker where there is one."""
    served_count, worst_s = 0, 0.0
    wish = Wish()
    try:
        source = opened(gpu_uuid, piece_bytes)[0]
    except DeviceError as error:
        print(json.dumps({"served_count": 0, "worst_s": None, "why": str(error)}), flush=True)
        return
    print("up", flush=True)
    while wish.is_resting:
        time.sleep(AGAIN_S)
    for _ in range(round_count):
        began_s = time.perf_counter()
        is_served = source.take()
        while not is_served and time.perf_counter() - began_s < OWN_WITHIN_S:
            time.sleep(AGAIN_S)
            is_served = source.take()
        if is_served:
            served_count += 1
            worst_s = max(worst_s, time.perf_counter() - began_s)
        source.give_all_back()
        time.sleep(OWN_PAUSE_S)
    print(json.dumps({"served_count": served_count, "worst_s": worst_s if served_count else None}), flush=True)


def hold(gpu_uuid: str, piece_bytes: int) -> None:
    for source in opened(gpu_uuid, piece_bytes)[:1]:
        source.take()
    print("up", flush=True)
    signal.pause()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard_greedy", description=__doc__)
    parser.add_argument("what", choices=["take", "own", "hold"])
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--piece-bytes", required=True, type=int)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args(arguments)
    if options.what == "own":
        own(options.gpu, options.piece_bytes, options.rounds)
    elif options.what == "hold":
        hold(options.gpu, options.piece_bytes)
    else:
        take(options.gpu, options.piece_bytes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
