"""Where a replica can take turns with others: on the node whose GPUs are promised least, as `overcommit` allows.

Until something grows, what is promised on a GPU only becomes more. So the nodes lie in a heap by what was promised when
they were last looked at, which is never too much: the first one that is still as the heap says is the least promised.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from services.placement.demands import Demand
from services.placement.overcommit import Account, over_use_bytes
from services.placement.packing.fleet import PARTS, Ask, NodeRoom, Place, unsuited

if TYPE_CHECKING:
    from services.placement.state import ClusterState


@dataclass(frozen=True, slots=True)
class Turn:
    """A GPU that could be shared."""

    promised_parts: int
    """Of the GPU, with the newcomer."""
    gpu: int
    units: int
    account: Account


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """One question."""

    state: "ClusterState"
    demand: Demand
    ask: Ask
    now_s: float
    deployment_id: str = ""
    without_nodes: frozenset[str] = frozenset()
    without_gpus: frozenset[tuple[str, int]] = frozenset()

    def place(self) -> Place | None:
        """Of the node whose GPUs would be promised least, ties by name. None where nobody can take turns with it."""
        if self.without_nodes or self.without_gpus:
            return self._scanned()
        rooms = self.state.index.rooms
        heap = rooms.turn_heap(self.demand)
        if heap is None:
            heap = list(self._bounds())
            heapify(heap)
            rooms.keep_turn_heap(self.demand, heap)
        return self._first_of(heap)

    def _first_of(self, heap: list[tuple[int, str]]) -> Place | None:
        """Changes the heap to what is known now. O(log nodes), but for those whose use is in the way."""
        set_aside: list[tuple[int, str]] = []
        found = None
        while heap and found is None:
            bound, name = heappop(heap)
            turns = self._turns_on(self.state.index.rooms.fleet.nodes[name])
            exact = self._promised(turns)
            if exact is None:
                continue
            if exact > bound:
                heappush(heap, (exact, name))
                continue
            set_aside.append((exact, name))
            found = self._place_on(name, turns)
        for entry in set_aside:
            heappush(heap, entry)
        return found

    def _scanned(self) -> Place | None:
        """Without a heap, where some nodes or GPUs are out of the question. O(nodes x GPUs)."""
        nodes = self.state.index.rooms.fleet.nodes
        for _, name in sorted(self._bounds()):
            found = self._place_on(name, self._turns_on(nodes[name]))
            if found is not None:
                return found
        return None

    def _bounds(self) -> Iterator[tuple[int, str]]:
        for room in self.state.index.rooms.fleet:
            promised = self._promised(self._turns_on(room))
            if promised is not None:
                yield promised, room.name

    def _promised(self, turns: list[Turn]) -> int | None:
        """On the fullest of the GPUs that it would take; None where there are too few."""
        count = self.ask.gpu_count
        return turns[count - 1].promised_parts if len(turns) >= count else None

    def _turns_on(self, room: NodeRoom) -> list[Turn]:
        """Its GPUs that would do but for their use, the least promised ones first."""
        state, demand, rooms = self.state, self.demand, self.state.index.rooms
        if unsuited(room, self.ask, self.without_nodes) or rooms.park_left[room.name] < demand.weights_bytes:
            return []
        turns: list[Turn] = []
        for gpu, account in enumerate(rooms.accounts[room.name]):
            units = self.ask.units_on(room.shape.gpus[gpu])
            if units is None or not 0 < account.allocatable_bytes >= units or (room.name, gpu) in self.without_gpus:
                continue
            residue_bytes = min(state.settings.residue_bytes, units) if demand.is_parkable else 0
            if account.short_with(units, residue_bytes, is_parkable=demand.is_parkable) <= 0:
                promised = account.allocatable_bytes - account.left_bytes(units)
                turns.append(Turn(promised * PARTS // account.allocatable_bytes, gpu, units, account))
        turns.sort(key=lambda turn: (turn.promised_parts, turn.gpu))
        return turns

    def _place_on(self, node: str, turns: list[Turn]) -> Place | None:
        """The least promised GPUs of this node whose use leaves room."""
        chosen: list[Turn] = []
        for turn in turns:
            if self._use_allows(node, turn):
                chosen.append(turn)
            if len(chosen) == self.ask.gpu_count:
                chosen.sort(key=lambda turn: turn.gpu)
                return Place(node, tuple(t.gpu for t in chosen), tuple(t.units for t in chosen))
        return None

    def _use_allows(self, node: str, turn: Turn) -> bool:
        """The third bound, where requests exceed the GPU."""
        if turn.account.left_bytes(turn.units) >= 0:
            return True
        over_bytes = over_use_bytes(
            self.state,
            node,
            turn.gpu,
            turn.units,
            is_parkable=self.demand.is_parkable,
            now_s=self.now_s,
            deployment_id=self.deployment_id,
        )
        return over_bytes <= 0
