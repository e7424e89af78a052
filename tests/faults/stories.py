"""A story that makes every service pass every step with every kind of outcome. Each part waits for the last one's end,
so that its end state does not depend on who died in between.
"""

from schemas.deployments import DeploymentSpec, EngineSpec, ShareSpec, SwapSpec
from schemas.inbox import (
    DeployRequested,
    KeyCreateRequested,
    KeyRevokeRequested,
    ParkRequested,
    RetireRequested,
    WakeRequested,
)
from schemas.units import GB
from tests.faults.mortal_fleet import TENANT, Fleet


def spec(name: str, portion: float, swap: SwapSpec | None = None) -> DeploymentSpec:
    return DeploymentSpec(
        name=name,
        engine=EngineSpec(weights_bytes=20 * GB, cold_start_s=0.5),
        share=ShareSpec(request_portion=portion),
        swap=swap or SwapSpec(minimum_residency_s=0.2),
    )


async def everything(fleet: Fleet) -> None:
    """Admission, turns on one GPU, operators, an engine's death, cold and back, replacement, retirement, keys."""
    await _admit(fleet)
    await fleet.until_served("a")
    await fleet.until_served("b")
    await fleet.until_served("a")
    await _operate(fleet)
    await _lose_an_engine(fleet)
    await _replace_and_retire(fleet)
    await _go_cold_and_return(fleet)
    await _settle(fleet)


async def _admit(fleet: Fleet) -> None:
    """All at once, so that they are handled together and committed as a group."""
    deploys = [("c1", spec("a", 0.6)), ("c2", spec("b", 0.6)), ("c1", spec("a", 0.6)), ("c3", spec("large", 1.5))]
    deploys.append(("c4", spec("fixed", 0.9, SwapSpec(is_parkable=False))))
    for command_id, wish in deploys:
        await fleet.command(DeployRequested(command_id=command_id, deployment=wish))
    await fleet.publish(f"sublet.in.{TENANT}.inbox_deploy_requested_v1", b"{not json")
    await fleet.command(KeyCreateRequested(command_id="c5", key_id="k1", key_hash="0" * 64))
    await fleet.command(KeyCreateRequested(command_id="c6", key_id="k2", key_hash="no hash"))
    await fleet.command(KeyRevokeRequested(command_id="c7", key_id="k1"))
    await fleet.until(lambda: 9 <= fleet.placement.inbox_seq, what="all commands are handled")
    await fleet.until(lambda: bool(fleet.residency("a")) and bool(fleet.residency("b")), what="a and b have leases")


async def _operate(fleet: Fleet) -> None:
    await fleet.until(lambda: fleet.residency("a") == "resident", what="a is resident")
    await fleet.command(ParkRequested(command_id="p1", model="a"))
    await fleet.until(lambda: fleet.residency("a") == "parked", what="a is parked")
    await fleet.command(WakeRequested(command_id="w1", model="a"))
    await fleet.until(lambda: fleet.residency("a") == "resident", what="a is back")


async def _lose_an_engine(fleet: Fleet) -> None:
    replica_id = fleet.replica_id("a")
    epoch = fleet.agent.replicas[replica_id].lease_epoch
    fleet.kill_engine(replica_id)
    await fleet.until(
        lambda: fleet.agent.replicas[replica_id].lease_epoch > epoch and fleet.residency("a") == "resident",
        what="a was started again",
    )


async def _replace_and_retire(fleet: Fleet) -> None:
    await fleet.command(DeployRequested(command_id="c8", deployment=spec("b", 0.5)))
    await fleet.until_served("b")
    await fleet.command(RetireRequested(command_id="r1", model="b"))
    await fleet.command(RetireRequested(command_id="r2", model="nobody"))
    await fleet.until(lambda: not fleet.residency("b"), what="b is gone")


async def _go_cold_and_return(fleet: Fleet) -> None:
    wish = spec("cold", 0.2, SwapSpec(warm_window_s=1.0, minimum_residency_s=0.2, cold_after_s=8.0))
    await fleet.command(DeployRequested(command_id="c9", deployment=wish))
    await fleet.until_served("cold")
    await fleet.until(lambda: not fleet.residency("cold"), what="it went cold")
    await fleet.until_served("cold")
    await fleet.until(lambda: fleet.residency("cold") == "parked", what="it is parked")


async def _settle(fleet: Fleet) -> None:
    await fleet.command(RetireRequested(command_id="r3", model="cold"))
    await fleet.command(ParkRequested(command_id="p2", model="a"))
    await fleet.until(
        lambda: fleet.residency("a") == "parked" and not fleet.residency("cold") and not fleet.swapper.decisions,
        what="the end",
    )
    await fleet.until(lambda: len(fleet.placement.replicas) == 1, what="all have heard of it")
