"""One writer per decision: what a former life of a writer has sent is stored once or refused, never twice."""

import pytest

from kit.simulation import Faults
from services.simulated import SimulatedSystem
from services.swarm.plan import inference


@pytest.mark.parametrize("seed", range(12))
def test_appends_that_outlive_their_writer_are_stored_once_or_refused(seed: int) -> None:
    """On a slow network a writer may be back before its last append arrives."""
    system = SimulatedSystem(seed=seed, faults=Faults(latency_s=0.2, ack_lost_fraction=0.2))
    system.deploy([inference(f"m{number}", weights_gb=10, portion=0.2) for number in range(4)])
    writers = list(system.simulation.members)
    for number in range(60):
        system.simulation.crash(writers[number % len(writers)], down_s=0.05 * (number % 7))
        system.run_for(0.4)
    system.simulation.faults = Faults()
    system.run_for(30.0)

    stored_ids = [stored.id for stored in system.simulation.stream]
    assert sorted(set(stored_ids)) == sorted(stored_ids)
    assert {0} == {m.processor.skipped_count for m in system.simulation.members.values() if m.processor is not None}
    system.check()
