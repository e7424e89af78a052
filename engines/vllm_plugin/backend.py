"""vLLM's interface of sleep-mode backends, over `WeightKeeper`. Imported by vLLM's factory when it is chosen.

Written against vLLM 0.33.0. Weights are kept here; everything else (KV cache, graph memory, runtime state) goes the way
of vLLM's own backend. docs/memory-broker.md says what was checked and what was not.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.device_allocator import cumem, get_mem_allocator_instance
from vllm.device_allocator.sleep_mode_backend import CuMemBackend

from devices.borrowed import BorrowingDevice, gpu_uuid_of
from engines.backing import BrokerBacking
from engines.store.connection import settings_from
from engines.vllm_plugin.checksums import read_checksum, torch_checksum
from engines.vllm_plugin.keeper import WeightKeeper

WEIGHTS = "weights"
# What vLLM's own backend keeps beside weights, in pinned memory of its own.
KEPT_BY_VLLM = ("runtime", "cudagraph")
WEIGHTS_KEPT_LEVEL = 1


class StoreBackend(CuMemBackend):  # type: ignore[misc]  # vLLM is not there where types are checked.
    """Weights in the memory broker. One in each worker process, for its one GPU."""

    def __init__(self) -> None:
        super().__init__()
        self._keeper: WeightKeeper | None = None

    @classmethod
    def is_supported(cls) -> bool:
        """Where the node agent gave this engine an account."""
        return settings_from(os.environ) is not None

    def suspend(self, level: int = WEIGHTS_KEPT_LEVEL) -> None:
        """What cannot be sealed is not let go: then this raises, and the engine is as before."""
        allocator = get_mem_allocator_instance()
        weights = _weights(allocator)
        if level == WEIGHTS_KEPT_LEVEL and weights:
            self._kept(allocator, weights).suspend(weights)
        elif self._keeper is not None:
            self._keeper.discard(weights)
        self._state = "SUSPENDED"
        allocator.sleep(offload_tags=KEPT_BY_VLLM)  # Asleep already, weights are passed over.

    def resume(self, tags: list[str] | None = None) -> None:
        self._state = "RESUMING"
        if self._keeper is not None and (tags is None or WEIGHTS in tags):
            self._keeper.resume(_weights(get_mem_allocator_instance()))
        super().resume(tags)

    def discard(self, tags: tuple[str, ...]) -> None:
        if self._keeper is not None and WEIGHTS in tags:
            self._keeper.discard(_weights(get_mem_allocator_instance()))
        super().discard(tags)

    def _kept(self, allocator: Any, weights: dict[int, Any]) -> WeightKeeper:
        if self._keeper is None:
            ordinal = int(next(iter(weights.values())).handle[0])
            settings = settings_from(os.environ)
            assert settings is not None, "not supported"
            device = BorrowingDevice(gpu_uuid_of(ordinal))
            self._keeper = keeper = WeightKeeper(
                device,
                BrokerBacking(device, settings),
                checksum=_checksum(device, ordinal),
                map_own=cumem.create_and_map,
                unmap_own=cumem.unmap_and_release,
            )
            _watch_frees(allocator, keeper)
        return self._keeper


def _weights(allocator: Any) -> dict[int, Any]:
    return {address: data for address, data in allocator.pointer_to_data.items() if data.tag == WEIGHTS}


def _checksum(device: BorrowingDevice, ordinal: int) -> Any:
    try:
        import torch
    except ImportError:
        return read_checksum(device)
    return torch_checksum(torch, ordinal)


def _watch_frees(allocator: Any, keeper: WeightKeeper) -> None:
    """The extension unmaps and releases what it frees: that has to be memory of its own."""
    free = allocator.python_free_callback

    def freed(address: int) -> Any:
        data = allocator.pointer_to_data.get(address)
        if data is not None:
            keeper.surrender(address, data)
        return free(address)

    allocator.python_free_callback = freed  # kept here, for the extension only borrows it
    cumem.init_module(allocator.python_malloc_callback, freed)
