"""`Packer`: the choice for one replica after another, over a fleet that changes."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from services.placement.packing.fleet import Ask, Fleet, Place
from services.placement.packing.policies import Policy
from services.placement.packing.reference import choose


class Packer:
    """Chooses nodes and GPUs in one fleet by one policy.

    `classes` says how often each workload class is asked for: some policies keep room for what is likely to come.
    """

    def __init__(self, fleet: Fleet, policy: Policy, *, classes: Mapping[Ask, int] | None = None) -> None:
        self.fleet = fleet
        self._uninformed = policy
        self._classes = dict(classes or {})
        self._informed: Policy | None = None
        self._informed_of = fleet.membership_version

    @property
    def policy(self) -> Policy:
        """As it knows the cluster now."""
        if self._informed is None or self._informed_of != self.fleet.membership_version:
            self._informed_of = self.fleet.membership_version
            self._informed = self._uninformed.informed(self.fleet, self._classes)
        return self._informed

    def observed(self, ask: Ask, count: int = 1) -> None:
        """So many more replicas of this class are wished for. Changes what the policy keeps room for."""
        self._classes[ask] = self._classes.get(ask, 0) + count
        self._informed = None

    def forgotten(self, ask: Ask, count: int = 1) -> None:
        """The opposite of `observed`."""
        left = self._classes.get(ask, 0) - count
        if left < 0:
            raise ValueError(f"forgotten more often than observed: {ask}")
        self._classes[ask] = left
        if not left:
            del self._classes[ask]
        self._informed = None

    def choose(self, ask: Ask, *, without_nodes: Collection[str] = (), gpu_spread: bool = False) -> Place | None:
        """Where one more replica goes, with room beside all that is promised; None where nothing has room."""
        return choose(self.fleet, self.policy, ask, without_nodes=without_nodes, gpu_spread=gpu_spread)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """What is taken and given inside is undone at the end."""
        self.fleet.begin_trial()
        try:
            yield
        finally:
            self.fleet.end_trial()
