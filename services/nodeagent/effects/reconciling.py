"""On each return of the agent, and every so often: what this host holds and no lease names is ended, closed, removed.

Nothing waits for it: adoption goes on beside it, and what cannot be ended counts as taken by a stranger meanwhile
(`probing.our_pids`).
"""

from collections.abc import Awaitable, Callable
from typing import Final, NoReturn

import anyio
import anyio.to_thread

from devices.api import DeviceError
from schemas.brokers import AccountClose
from schemas.holders import EngineView
from services.nodeagent.broker_client import BrokerProblem
from services.nodeagent.effects.hands import HOLDER_RETRY_S, Hands, log
from services.nodeagent.guard import NotEnforced
from services.nodeagent.guard.owners import owners_of
from services.nodeagent.reconciling import Differences, Holdings, Record, Stray, differences, either, in_both, record_of
from services.nodeagent.runtimes.api import Runtime, RuntimeProblem
from services.nodeagent.state import NodeState

EVERY_S: Final = 30.0
"""A look costs a question to the holder, one to the broker, and a list of processes for each GPU."""
SURE_S: Final = 2.0
"""Between two looks that must agree. Who stood still while another took its place learns of that meanwhile."""
PROBLEMS: Final = (RuntimeProblem, BrokerProblem, DeviceError, NotEnforced, OSError)


async def keep(hands: Hands) -> NoReturn:
    """For ever; the first time as soon as the record is there and the holder answers."""
    while True:
        is_done = False
        try:
            is_done = await reconcile(hands) is not None
        except PROBLEMS as problem:
            log.warning("holdings not compared", extra={"reason": str(problem)})
        await anyio.sleep(EVERY_S if is_done else HOLDER_RETRY_S)


async def reconcile(hands: Hands, *, pause_s: float = SURE_S) -> Differences | None:
    """What was found twice; all of it has been seen to. None: no record now. Raises `PROBLEMS`."""
    found = await _compared(hands)
    if found:
        await anyio.sleep(pause_s)
        again = await _compared(hands)
        found = in_both(found, again) if again is not None else None
    if found is None:
        return None
    async with anyio.create_task_group() as tg:
        for stray in found.strays:
            told = f"{stray.engine.replica_id} of lease {stray.engine.lease_epoch}, using {dict(stray.used_bytes)}"
            tg.start_soon(_seen_to, "engine of no lease", told, _end, hands, stray)
    for replica_id, namespace in found.leaves.items():
        await _seen_to("cgroup without an engine", replica_id, _take_leaf, hands, replica_id, namespace)
    if hands.guard.accounts is not None:
        for replica_id, lease_epoch in found.accounts:
            account = AccountClose(replica_id=replica_id, lease_epoch=lease_epoch)
            await _seen_to("account of nobody", replica_id, hands.guard.accounts.close_nobodys, account)
        for deployment_id in found.deployment_ids:
            await _seen_to("images of nobody", deployment_id, hands.guard.accounts.forget, deployment_id)
    return found


async def _compared(hands: Hands) -> Differences | None:
    """Named in the record before or after the look is named: what begins or ends meanwhile is no difference."""
    before = hands.record()
    if before is None:
        return None
    here = await _holdings(hands)
    after = hands.record()
    return differences(either(before, after), here) if after is not None else None


async def _seen_to(what: str, name: str, work: Callable[..., Awaitable[None]], *arguments: object) -> None:
    """Told, then done; what cannot be done now is found again by the next look."""
    log.warning(what, extra={"which": name})
    try:
        await work(*arguments)
    except PROBLEMS as problem:
        log.warning(f"{what} stays", extra={"which": name, "reason": str(problem)})


# --- What is here -----------------------------------------------------------------------------------------------------


async def _holdings(hands: Hands) -> Holdings:
    view = await hands.holder.view()
    engines = view.engines
    if hands.containers is not None:
        engines += await hands.containers.views()
    listed = await anyio.to_thread.run_sync(_processes, hands)
    pids = {pid for by_pid in listed.values() for pid in by_pid}
    return Holdings(
        engines=engines,
        leaves=view.leftover_namespaces,
        broker=await hands.guard.accounts.look() if hands.guard.accounts is not None else None,
        process_bytes=listed,
        owners=await anyio.to_thread.run_sync(owners_of, pids, engines),
    )


def _processes(hands: Hands) -> dict[str, dict[int, int | None]]:
    inventory = hands.guard.inventory
    return {gpu.uuid: dict(inventory.process_bytes(gpu.uuid)) for gpu in inventory.gpus()}


# --- What is done about it --------------------------------------------------------------------------------------------


async def _end(hands: Hands, stray: Stray) -> None:
    """As any engine is ended; its epoch is named, so that one that was started meanwhile is not meant.

    What bears the replica's name alone is cleared only where no lease does: else that lease's next start clears it.
    """
    engine, runtime = stray.engine, await _runtime(hands, stray.engine)
    if not stray.is_replaced and engine.is_alive and not engine.is_gated:
        await hands.holder.close_route(engine.replica_id)
    await hands.guard.drain(engine)
    if runtime is hands.containers:
        await hands.guard.give_up_nobodys(engine)
    await runtime.stop(engine.replica_id, lease_epoch=engine.lease_epoch, grace_s=hands.settings.stop_grace_s)
    now = await runtime.engine(engine.replica_id)
    if now is not None and now.lease_epoch == engine.lease_epoch and now.is_alive:
        raise RuntimeProblem("it could not be ended; what it uses counts as taken")
    if stray.is_replaced or _is_named(hands, engine.replica_id):
        return
    await hands.guard.lift_nobodys(engine)
    await runtime.forget(engine.replica_id, lease_epoch=engine.lease_epoch)


async def _take_leaf(hands: Hands, replica_id: str, namespace: str) -> None:
    """Its limits, then itself."""
    if not _is_named(hands, replica_id):
        await hands.guard.lift_group(namespace)
        await hands.holder.forget(replica_id, lease_epoch=0)


async def _runtime(hands: Hands, engine: EngineView) -> Runtime:
    """What runs it: the holder, unless it does not know this very engine."""
    known = await hands.holder.engine(engine.replica_id)
    is_holders = known is not None and (known.lease_epoch, known.pid) == (engine.lease_epoch, engine.pid)
    return hands.holder if is_holders or hands.containers is None else hands.containers


def _is_named(hands: Hands, replica_id: str) -> bool:
    record = hands.record()
    return record is not None and replica_id in record.replica_ids


def record_in(state: NodeState) -> Record | None:
    """None before this node has joined for the first time."""
    return record_of(state) if state.joined is not None else None
