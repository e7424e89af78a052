"""More models than the GPUs hold at once: every one gets its lease and its first start, and then they take turns."""

from services.placement.state import ClusterState
from services.simulated import SimulatedSystem
from services.swarm.plan import inference


def test_models_whose_residues_fit_together_are_all_granted_while_the_gpus_are_full() -> None:
    """A lease without a process holds nothing: its first start waits for its share, as a wake does."""
    system = SimulatedSystem(seed=1)
    system.deploy([inference(f"m{number:02d}", weights_gb=14.5, portion=0.3) for number in range(56)])

    system.run_for(600.0)

    placement = system.state("placement")
    assert isinstance(placement, ClusterState), placement
    unplaced = {d.spec.name: d.problem for d in placement.deployments.values() if d.problem}
    assert {} == unplaced
    never_started = [r.replica_id for r in placement.replicas.values() if not r.endpoint]
    assert [] == never_started
    system.check()
