"""The fleet in numbers: what each node and each GPU has left. Kept up by folds, made anew after a restore."""

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schemas.placement import ReasonCode
from services.placement.demands import GRADE_RANKS, Demand, base_bytes
from services.placement.overcommit import Account
from services.placement.packing.fleet import Ask, Fleet, GpuShape, NodeShape, Place
from services.placement.packing.index import Packer
from services.placement.packing.policies import policy_named

if TYPE_CHECKING:
    from schemas.nodes import GpuOffer
    from services.placement.settings import PlacementSettings
    from services.placement.state import Claim, Node, Replica
    from services.placement.verdicts import Verdict


@dataclass(slots=True)
class _Held:
    """What a replica took, so that exactly that is given back."""

    node: str
    gpus: tuple[int, ...]
    units: tuple[int, ...]
    cpu_milli: int
    memory_bytes: int


@dataclass(slots=True)
class _Booked:
    """What was decided within a trial, with what it changed."""

    place: Place
    demand: Demand
    accounts: list[tuple[Account, tuple[int, int, int, int, int]]]


_Question = tuple[Demand, tuple[str, ...], frozenset[tuple[str, int]]]


class Rooms:
    """Numbers of all nodes. Between inputs they are what the facts say; within `trial` also what was just decided."""

    def __init__(self, settings: "PlacementSettings") -> None:
        self._settings = settings
        self.fleet = Fleet()
        self.gpu_uuids: dict[str, tuple[str, ...]] = {}
        """{node: its GPUs in the order of the fleet's shape}"""
        self.positions: dict[str, dict[str, int]] = {}
        """{node: {gpu_uuid: its place in that order}}"""
        self._offers: dict[str, list[GpuOffer]] = {}
        """{node: [offer by GPU]}"""
        self._taker_counts: dict[tuple[str, int], int] = {}
        """{(node, GPU): who holds or is to get a place there}, of MIG instances: one at a time"""
        self.accounts: dict[str, list[Account]] = {}
        """{node: [account by GPU]}"""
        self.park_left: dict[str, int] = {}
        """{node: host bytes left for weights of parked replicas}"""
        self.growth = 0
        """Raised whenever something that did not fit may fit now."""
        self._park_order: list[tuple[int, str]] = []
        self._held: dict[str, _Held] = {}
        self._packers: dict[str, Packer] = {}
        self._wishes: dict[str, tuple[Demand, int]] = {}
        """{deployment_id: (what each replica needs, how many there should be)}"""
        self._wished_counts: dict[Demand, int] = {}
        self._told_of = -1
        """The fleet's membership when packers were told of all wishes; from then on of each change."""
        self._asks: dict[Demand, Ask | None] = {}
        self._asks_of = -1
        self._quarantined: dict[str, float] = {}
        self._verdicts: dict[_Question, tuple[Verdict, float]] = {}
        """{question: (answer, until when it holds)}"""
        self._verdicts_of = -1
        self._turn_heaps: dict[Demand, list[tuple[int, str]]] = {}
        """{demand: what `turns` knows of all nodes}, since something grew last"""
        self._turn_heaps_of = -1
        self._booked: list[_Booked] | None = None
        """None outside of a trial."""

    # --- Nodes --------------------------------------------------------------------------------------------------------

    def set_node(self, node: "Node", replicas: Sequence["Replica"], claims: Sequence["Claim"]) -> None:
        """As it joined, or joined again with other GPUs, labels or strangers; with all that it has."""
        offers = sorted(
            (gpu for gpu in node.gpus.values() if base_bytes(gpu)), key=lambda gpu: (gpu.index, gpu.gpu_uuid)
        )
        shape = _shape_of(node, offers)
        known = self.fleet.nodes.get(node.name)
        uuids = tuple(gpu.gpu_uuid for gpu in offers)
        if known is None or known.shape != shape or self.gpu_uuids[node.name] != uuids:
            if known is not None:
                self.fleet.remove_node(node.name)
            self.fleet.add_node(node.name, shape)
            self.gpu_uuids[node.name] = uuids
            self.positions[node.name] = {uuid: position for position, uuid in enumerate(uuids)}
            self.accounts[node.name] = [Account(gpu.allocatable_bytes) for gpu in offers]
            self._offers[node.name] = offers
            self._taker_counts = {key: n for key, n in self._taker_counts.items() if key[0] != node.name}
            for replica in replicas:
                self._held.pop(replica.replica_id, None)
                if replica.holds_place:
                    self.hold(replica)
            for claim in claims:
                self.claim(claim)
        self._offers[node.name] = offers
        for position in range(len(offers)):
            self._set_left(node.name, position)
        parked = sum(replica.weights_bytes for replica in replicas if replica.is_parkable)
        self._set_park(node.name, node.host_budget_bytes - parked)
        self.set_open(node)

    def set_gpu(self, node: str, gpu: "GpuOffer") -> None:
        """Strangers on it, or its quarantine, changed."""
        position = self.positions.get(node, {}).get(gpu.gpu_uuid)
        if position is not None:
            self._offers[node][position] = gpu
            self._set_left(node, position)
            self.growth += 1

    def is_taken(self, node: str, position: int) -> bool:
        """Whether it is a MIG instance that has its one replica."""
        return self._taker_counts.get((node, position), 0) > 0

    def _set_left(self, node: str, position: int) -> None:
        """What there is for replicas; nothing new of one that is quarantined, or a MIG instance that is taken."""
        gpu = self._offers[node][position]
        is_closed = bool(gpu.quarantine_reason) or self.is_taken(node, position)
        left_bytes = 0 if is_closed else gpu.allocatable_bytes
        self.fleet.set_foreign(node, position, base_bytes(gpu) - left_bytes)
        self.accounts[node][position].allocatable_bytes = left_bytes

    def _take_whole(self, node: str, positions: Sequence[int], by: int) -> None:
        """Of those that are MIG instances."""
        for position in positions:
            if self._offers[node][position].is_mig:
                count = self._taker_counts.get((node, position), 0) + by
                self._taker_counts[node, position] = count
                if not count:
                    del self._taker_counts[node, position]
                self._set_left(node, position)

    def set_open(self, node: "Node") -> None:
        """It was lost, came back, or is in quarantine: call it when one of these changes."""
        self._quarantined.pop(node.name, None)
        if node.quarantine_until_s > 0:
            self._quarantined[node.name] = node.quarantine_until_s
        self.fleet.set_open(node.name, node.lost_at_s is None and not node.quarantine_until_s)
        self.growth += 1

    def open_until(self, now_s: float, nodes: "dict[str, Node]") -> None:
        """Open those whose quarantine is over."""
        for name in [name for name, until_s in self._quarantined.items() if until_s <= now_s]:
            del self._quarantined[name]
            self.fleet.set_open(name, nodes[name].lost_at_s is None)
            self.growth += 1

    # --- Replicas -----------------------------------------------------------------------------------------------------

    def hold(self, replica: "Replica") -> None:
        """It is promised its place."""
        positions = self.positions.get(replica.node)
        if positions is None:
            return
        known = [share for share in replica.shares if share.gpu_uuid in positions]
        held = _Held(
            replica.node,
            tuple(positions[share.gpu_uuid] for share in known),
            tuple(share.request_bytes for share in known),
            replica.cpu_millicores,
            replica.memory_bytes,
        )
        self._held[replica.replica_id] = held
        self.fleet.take(held.node, held.gpus, held.units, held.cpu_milli, held.memory_bytes)
        accounts = self.accounts[replica.node]
        for position, share in zip(held.gpus, known, strict=True):
            residue_bytes = replica.residue_on(share.gpu_uuid) if replica.is_parkable else 0
            accounts[position].add(share.request_bytes, residue_bytes, is_parkable=replica.is_parkable)
        self._take_whole(held.node, held.gpus, 1)

    def leave(self, replica: "Replica", on_gpu: "dict[str, dict[str, Replica]]") -> None:
        """Its place is free. `on_gpu`: who is promised a place, without it."""
        held = self._held.pop(replica.replica_id, None)
        if held is None:
            return
        self.fleet.give(held.node, held.gpus, held.units, held.cpu_milli, held.memory_bytes)
        self._take_whole(held.node, held.gpus, -1)
        for position in held.gpus:
            self.recount(held.node, self.gpu_uuids[held.node][position], on_gpu)
        self.growth += 1

    def recount(self, node: str, gpu_uuid: str, on_gpu: "dict[str, dict[str, Replica]]") -> None:
        """A residue was measured, or somebody left."""
        position = self.positions.get(node, {}).get(gpu_uuid)
        if position is None:
            return
        account = self.accounts[node][position]
        before = account.resting_bytes, account.largest_bytes
        account.recount(gpu_uuid, on_gpu.get(gpu_uuid, {}).values())
        # With smaller residues more may fit; so may with a larger one of the largest.
        self.growth += (account.resting_bytes, account.largest_bytes) != before

    def claim(self, claim: "Claim") -> None:
        """Keep its room from everybody, also before it is free."""
        self._claim(claim, 1)

    def unclaim(self, claim: "Claim") -> None:
        self._claim(claim, -1)
        self.growth += 1

    def _claim(self, claim: "Claim", sign: int) -> None:
        positions = self.positions.get(claim.node, {})
        for uuid, size in zip(claim.gpu_uuids, claim.request_bytes, strict=True):
            if uuid in positions:
                self.fleet.take(claim.node, (positions[uuid],), (sign * size,))
                self.accounts[claim.node][positions[uuid]].claimed_bytes += sign * size
                self._take_whole(claim.node, (positions[uuid],), sign)

    def park(self, node: str, weights_bytes: int) -> None:
        """Book host memory for parked weights (negative: give back)."""
        if node in self.park_left and weights_bytes:
            self._set_park(node, self.park_left[node] - weights_bytes)
            self.growth += weights_bytes < 0

    def without_park_memory(self, weights_bytes: int) -> list[str]:
        """Nodes that have no host memory for so many bytes of parked weights."""
        return [name for _, name in self._park_order[: bisect_left(self._park_order, (weights_bytes, ""))]]

    def _set_park(self, node: str, left_bytes: int) -> None:
        old = self.park_left.get(node)
        if old is not None:
            del self._park_order[bisect_left(self._park_order, (old, node))]
        self.park_left[node] = left_bytes
        insort(self._park_order, (left_bytes, node))

    # --- Questions ----------------------------------------------------------------------------------------------------

    def ask_of(self, demand: Demand) -> Ask | None:
        """In the packer's words; None when the fleet has no such GPU model."""
        if self._asks_of != self.fleet.membership_version:
            self._asks.clear()
            self._asks_of = self.fleet.membership_version
        if demand not in self._asks:
            self._asks[demand] = self._ask_of(demand)
        return self._asks[demand]

    def _ask_of(self, demand: Demand) -> Ask | None:
        # A process can use one MIG instance, so one that spans several GPUs can use none.
        without = {gpu.name for offers in self._offers.values() for gpu in offers if gpu.is_mig}
        without = without if demand.gpu_count > 1 else set()
        if not demand.gpu_models and not without:
            return demand.ask(frozenset())
        there = {gpu.model for room in self.fleet for gpu in room.shape.gpus} - without
        wanted = demand.gpu_models or ("",)
        fitting = frozenset(model for model in there if any(part in model.lower() for part in wanted))
        return demand.ask(fitting) if fitting else None

    def packer(self, *, spreads_nodes: bool) -> Packer:
        """Told of the deployments that there are: some policies keep room for what is likely to come."""
        name = "spread" if spreads_nodes else self._settings.policy
        if self._told_of != self.fleet.membership_version:
            self._told_of = self.fleet.membership_version
            classes = self._classes()
            for packer in self._packers.values():
                packer.told(classes)
        if name not in self._packers:
            self._packers[name] = Packer(self.fleet, policy_named(name), classes=self._classes())
        return self._packers[name]

    def wish(self, deployment_id: str, demand: Demand | None, replica_count: int) -> None:
        """So many replicas of this deployment there should be; none and no demand: it is gone."""
        new = None if demand is None else (demand, replica_count)
        old = self._wishes.get(deployment_id)
        if old == new:
            return
        if new is None:
            del self._wishes[deployment_id]
        else:
            self._wishes[deployment_id] = new
        for of, count in ((old, -1), (new, 1)):
            if of is not None:
                self._count_wishes(of[0], count * of[1])

    def _count_wishes(self, demand: Demand, change: int) -> None:
        count = self._wished_counts.get(demand, 0) + change
        self._wished_counts[demand] = count
        if not count:
            del self._wished_counts[demand]
        if self._told_of != self.fleet.membership_version:
            return  # They are told of everything when they are asked next.
        ask = self.ask_of(demand)
        if ask is None or not change:
            return
        for packer in self._packers.values():
            if change > 0:
                packer.observed(ask, change)
            else:
                packer.forgotten(ask, -change)

    def _classes(self) -> dict[Ask, int]:
        """How many replicas of each class there should be."""
        classes: dict[Ask, int] = {}
        for demand, count in self._wished_counts.items():
            ask = self.ask_of(demand)
            if ask is not None:
                classes[ask] = classes.get(ask, 0) + count
        return classes

    def verdict(
        self,
        demand: Demand,
        now_s: float,
        without_nodes: tuple[str, ...] = (),
        without_gpus: frozenset[tuple[str, int]] = frozenset(),
    ) -> "Verdict | None":
        """Why there is no room for this demand, where that was found out since something grew last."""
        if self._verdicts_of != self.growth:
            return None
        known = self._verdicts.get((demand, without_nodes, without_gpus))
        return known[0] if known is not None and now_s < known[1] else None

    def remember(
        self,
        demand: Demand,
        now_s: float,
        verdict: "Verdict",
        without_nodes: tuple[str, ...],
        without_gpus: frozenset[tuple[str, int]],
    ) -> None:
        """A cache: without it the same is found out again. What hangs on expected use holds for a while only."""
        if self._verdicts_of != self.growth:
            self._verdicts, self._verdicts_of = {}, self.growth
        hangs_on_use = any(c.code is ReasonCode.TURNS_TAKEN for c in verdict.constraints)
        until_s = now_s + self._settings.use_retry_s if hangs_on_use else math.inf
        self._verdicts[demand, without_nodes, without_gpus] = verdict, until_s

    def turn_heap(self, demand: Demand) -> list[tuple[int, str]] | None:
        """What was kept since something grew last."""
        return self._turn_heaps.get(demand) if self._turn_heaps_of == self.growth else None

    def keep_turn_heap(self, demand: Demand, heap: list[tuple[int, str]]) -> None:
        """A cache, as the verdicts are."""
        if self._turn_heaps_of != self.growth:
            self._turn_heaps, self._turn_heaps_of = {}, self.growth
        self._turn_heaps[demand] = heap

    # --- Several decisions in one input -------------------------------------------------------------------------------

    @contextmanager
    def trial(self, *, is_supposed: bool = False) -> Iterator[None]:
        """What is booked inside is undone at the end: the folds of the facts that were decided book it again.

        `is_supposed`: no fact will follow, so what was found not to fit inside may fit again; and whoever asks is told
        what is missing now, not when it was found out.
        """
        assert self._booked is None, "a trial within a trial"
        self._booked = []
        known = self._verdicts_of, dict(self._verdicts)
        if is_supposed:
            self._verdicts = {}
        try:
            yield
        finally:
            self._unbook(0)
            self._booked = None
            if is_supposed:
                self._verdicts_of, self._verdicts = known
                self._turn_heaps = {}

    @contextmanager
    def attempt(self) -> Iterator[list[bool]]:
        """Within a trial: what is booked inside stays only when `True` is put into the list."""
        assert self._booked is not None
        mark, known = len(self._booked), (self._verdicts_of, dict(self._verdicts))
        keeps: list[bool] = []
        yield keeps
        if not keeps:
            self._unbook(mark)
            self._verdicts_of, self._verdicts = known
            self._turn_heaps = {}

    def book(self, deployment_id: str, demand: Demand, place: Place) -> None:
        """Within a trial: a replica goes there."""
        assert self._booked is not None
        booked = _Booked(place, demand, [])
        self.fleet.take(place.node, place.gpu_indices, place.units, demand.cpu_millicores, demand.memory_bytes)
        accounts = self.accounts[place.node]
        for position, units in zip(place.gpu_indices, place.units, strict=True):
            account = accounts[position]
            booked.accounts.append((account, account.saved()))
            residue_bytes = min(self._settings.residue_bytes, units) if demand.is_parkable else 0
            account.add(units, residue_bytes, is_parkable=demand.is_parkable)
            if demand.is_parkable:
                account.tentative.append((deployment_id, units))
        self._take_whole(place.node, place.gpu_indices, 1)
        if demand.weights_bytes:
            self._set_park(place.node, self.park_left[place.node] - demand.weights_bytes)
        self._booked.append(booked)

    def _unbook(self, mark: int) -> None:
        assert self._booked is not None
        while len(self._booked) > mark:
            booked = self._booked.pop()
            place, demand = booked.place, booked.demand
            self.fleet.give(place.node, place.gpu_indices, place.units, demand.cpu_millicores, demand.memory_bytes)
            for account, saved in booked.accounts:
                account.restore(saved)
            self._take_whole(place.node, place.gpu_indices, -1)
            if demand.weights_bytes:
                self._set_park(place.node, self.park_left[place.node] + demand.weights_bytes)


def _shape_of(node: "Node", offers: Sequence["GpuOffer"]) -> NodeShape:
    """Portions are of capacity less the reserve; what strangers use is set beside it."""
    gpus = tuple(
        GpuShape(model=gpu.name, capacity_units=base_bytes(gpu), grade_rank=GRADE_RANKS[gpu.grade]) for gpu in offers
    )
    links: tuple[tuple[int, ...], ...] = ()
    if any(gpu.peer_bytes_per_s for gpu in offers):
        links = tuple(tuple(int(a.peer_bytes_per_s.get(b.gpu_uuid, 0.0)) for b in offers) for a in offers)
    return NodeShape(
        cpu_milli=node.cpu_millicores or 0,
        memory_bytes=node.memory_bytes or 0,
        gpus=gpus,
        labels=frozenset(f"{key}={value}" for key, value in node.labels.items()),
        links=links,
    )
