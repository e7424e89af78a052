"""`Packer`: the choice for one replica after another, over a fleet that changes."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from services.placement.packing import reference
from services.placement.packing.fleet import Ask, Fleet, Place
from services.placement.packing.policies import Random
from services.placement.packing.rating import Policy, fits_on

if TYPE_CHECKING:
    from services.placement.packing.scores import ScoreIndex

RETOLD_PERCENT: Final = 50
"""A policy is told the counts of classes anew once they have moved by so much of what they were: then all nodes have to
be rated again. From 25 to 100 the clusters fill alike (docs/adr/0013)."""
SCANNED_GPUS_MAX: Final = 8
"""So few GPUs are looked at one by one: nothing to load, and as fast. From 16 on the index is faster, even plain."""


class Packer:
    """Chooses nodes and GPUs in one fleet by one policy.

    `classes` says how often each workload class is asked for: some policies keep room for what is likely to come.
    The answers are the same in all three ways of finding them: few nodes are looked at one by one, more have an index,
    and once `compiled.prepare` was called its loops are machine code. `is_compiled` asks for an index at any size.
    """

    def __init__(
        self,
        fleet: Fleet,
        policy: Policy,
        *,
        classes: Mapping[Ask, int] | None = None,
        is_compiled: bool | None = None,
    ) -> None:
        self.fleet = fleet
        self._uninformed = policy
        self._classes = dict(classes or {})
        self._informed: Policy | None = None
        self._informed_of = -1
        self._told_count = 0
        self._moved_count = 0
        self._is_compiled = is_compiled
        self._index: ScoreIndex | None = None
        self._draw = 0

    @property
    def policy(self) -> Policy:
        """As it knows the cluster now, and how often classes were asked for until not long ago (`RETOLD_PERCENT`)."""
        is_old = self._informed_of != self.fleet.membership_version
        if self._moved_count:
            is_old |= 100 * self._moved_count >= RETOLD_PERCENT * self._told_count
        if self._informed is None or is_old:
            self._informed_of = self.fleet.membership_version
            self._told_count, self._moved_count = sum(self._classes.values()), 0
            self._informed = self._uninformed.informed(self.fleet, self._classes)
        return self._informed

    def observed(self, ask: Ask, count: int = 1) -> None:
        """So many more replicas of this class are wished for. Changes what the policy keeps room for."""
        self._classes[ask] = self._classes.get(ask, 0) + count
        self._moved_count += count

    def forgotten(self, ask: Ask, count: int = 1) -> None:
        """The opposite of `observed`."""
        left = self._classes.get(ask, 0) - count
        if left < 0:
            raise ValueError(f"forgotten more often than observed: {ask}")
        self._classes[ask] = left
        if not left:
            del self._classes[ask]
        self._moved_count += count

    def told(self, classes: Mapping[Ask, int]) -> None:
        """These are the counts of all classes now."""
        self._classes = dict(classes)
        self._informed = None

    def warm(self, asks: Iterable[Ask]) -> None:
        """Rate all nodes for these classes now, so that their first decision does not have to."""
        for ask in asks:
            self.choose(ask)

    def choose(self, ask: Ask, *, without_nodes: Collection[str] = (), gpu_spread: bool = False) -> Place | None:
        """Where one more replica goes, with room beside all that is promised; None where nothing has room."""
        policy = self.policy
        draw = self._draw
        if isinstance(policy, Random):
            self._draw += 1
        index = self._scores()
        if index is None:
            return reference.choose(
                self.fleet, policy, ask, without_nodes=without_nodes, gpu_spread=gpu_spread, draw=draw
            )
        if isinstance(policy, Random):
            return self._drawn(index, policy, ask, without_nodes, draw, gpu_spread=gpu_spread)
        found = index.choose(policy, ask, without_nodes, gpu_spread=gpu_spread)
        if found is None:
            return None
        node, gpus = found
        room = self.fleet.nodes[node]
        if len(gpus) > 1 and room.shape.links:
            return reference.place_of(room, fits_on(room, ask), tuple(gpus))
        return Place(node, tuple(gpus), index.units(ask, node, gpus))

    @contextmanager
    def trial(self) -> Iterator[None]:
        """What is taken and given inside is undone at the end."""
        self.fleet.begin_trial()
        try:
            yield
        finally:
            self.fleet.end_trial()

    def _drawn(
        self,
        index: "ScoreIndex",
        policy: Random,
        ask: Ask,
        without_nodes: Collection[str],
        draw: int,
        *,
        gpu_spread: bool,
    ) -> Place | None:
        count, _ = index.nth_roomy(policy, ask, without_nodes, 0)
        if not count:
            return None
        _, node = index.nth_roomy(policy, ask, without_nodes, policy.drawn(draw, count))
        room = self.fleet.nodes[node]
        return reference.drawn_place(policy, room, ask, fits_on(room, ask), draw, gpu_spread=gpu_spread)

    def _scores(self) -> "ScoreIndex | None":
        """The index in the form that the fleet's size asks for; None: look at the few nodes one by one."""
        if self._is_compiled is None and max(self.fleet.gpu_count, len(self.fleet.names)) <= SCANNED_GPUS_MAX:
            return None
        # Here, so that small fleets never load numpy.
        from services.placement.packing import compiled, kernels
        from services.placement.packing.scores import ScoreIndex

        if self._is_compiled and not compiled.prepare():
            raise RuntimeError("numba is not installed: pip install 'sublet[compiled]', or leave the index uncompiled")
        used = (None if self._is_compiled is False else compiled.prepared()) or kernels
        if self._index is None or self._index.kernels is not used:
            self._index = ScoreIndex(self.fleet, used)
        return self._index
