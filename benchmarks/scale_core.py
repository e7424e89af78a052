"""The decisions alone: the fill's commands and the nodes' answers go straight into placement's log processor.

What is timed is what its process does for each input beside the bus: decode, decide, encode, hash, fold. Stand-ins make
the answers outside the measured time.
"""

import time
from collections.abc import Sequence
from typing import Final

from benchmarks.report import Value
from benchmarks.scale_agents import TO_NODES, StandIn
from benchmarks.scale_stage import GPUS_PER_NODE, IS_COMPILED, NODE_COUNT, NODE_COUNT_QUICK, TENANT, training
from benchmarks.sections import Measured, Setting, Wanted
from kit.bus import Entry, Stored
from kit.inbox import inbox_delivery
from kit.outcomes import Timer
from kit.processor import Delivery, Processor, Released
from kit.runner import INPUTS_PER_BATCH_MAX
from schemas.catalogue import decode, encode
from schemas.inbox import DeployRequested
from schemas.messages import Command, command_subject
from schemas.placement import PlacementProposed
from services.placement.core import SERVICE
from services.placement.main import HANDLERS, prepare_compiled
from services.placement.settings import PlacementSettings
from services.placement.state import ClusterState

BARS: Final[tuple[Wanted, ...]] = ()


class CoreAlone:
    """Placement's processor, and a stand-in for each node, in virtual order: no bus, no clock of its own."""

    def __init__(self, node_count: int) -> None:
        assert HANDLERS
        self.processor: Processor[ClusterState] = Processor(
            SERVICE, PlacementSettings(), writer="placement", instance="core"
        )
        self.nodes = {node.name: node for node in (StandIn(number) for number in range(node_count))}
        self.busy_s = 0.0
        self.proposed_count = 0
        self._seq = 0
        self._inbox_seq = 0
        self._now_s = time.time()
        self._commit(self.processor.take_over(now_s=self._now_s).entries)
        self.processor.started(writer_epoch=self._seq)
        for node in self.nodes.values():
            node.join()
            self._hand_in(node)

    def deploy(self, count: int) -> None:
        """So many deployments of one GPU, in batches as the runner makes them."""
        wishes = [training(f"job-{number}") for number in range(count)]
        self.hand_over([DeployRequested(command_id=f"core-{wish.name}", deployment=wish) for wish in wishes])

    def hand_over(self, commands: Sequence[Command]) -> None:
        """In batches as the runner makes them; all that follows from one is done before the next."""
        for first in range(0, len(commands), INPUTS_PER_BATCH_MAX):
            stored = [self._stored_command(command) for command in commands[first : first + INPUTS_PER_BATCH_MAX]]
            began_s = time.perf_counter()
            for command in stored:
                self.processor.receive(inbox_delivery(command, now_s=self._now_s))
            self.busy_s += time.perf_counter() - began_s
            self._settle()

    def _settle(self) -> None:
        """Facts to their nodes, timers that are due and the nodes' answers back, until nobody has anything to say."""
        while not (batch := self.processor.take_batch()).is_empty:
            touched: dict[str, StandIn] = {}
            for stored in self._commit(batch.entries):
                fact = decode(stored.body)
                if isinstance(fact, PlacementProposed):
                    self.proposed_count += len(fact.replicas)
                if isinstance(fact, TO_NODES):
                    touched[fact.node] = self.nodes[fact.node]
                    touched[fact.node].receive(fact, stored.seq)
            self._fire(batch.released)
            for node in touched.values():
                self._hand_in(node)

    def _fire(self, released: Sequence[Released]) -> None:
        began_s = time.perf_counter()
        for item in released:
            if isinstance(item.outcome, Timer) and item.outcome.due_s <= self._now_s:
                self.processor.receive(Delivery(input=item.outcome.input, now_s=self._now_s))
        self.busy_s += time.perf_counter() - began_s

    def _hand_in(self, node: StandIn) -> None:
        answers = self._stored(node.take()[0])
        began_s = time.perf_counter()
        for stored in answers:
            self.processor.receive_stored(stored)
        self.busy_s += time.perf_counter() - began_s

    def _commit(self, entries: list[Entry]) -> list[Stored]:
        stored = self._stored(entries)
        self.processor.last_seq = self._seq
        return stored

    def _stored(self, entries: list[Entry]) -> list[Stored]:
        result = []
        for entry in entries:
            self._seq += 1
            result.append(
                Stored(
                    seq=self._seq,
                    time_s=self._now_s,
                    subject=entry.subject,
                    body=entry.body,
                    id=entry.id,
                    cause_seq=entry.cause_seq,
                    cursor_seq=entry.cursor_seq,
                    previous_hash=entry.previous_hash,
                )
            )
        return result

    def _stored_command(self, command: Command) -> Stored:
        self._inbox_seq += 1
        subject = command_subject(TENANT, command)
        return Stored(seq=self._inbox_seq, time_s=self._now_s, subject=subject, body=encode(command))


async def measure(setting: Setting) -> Measured:
    """See `benchmarks.sections`."""
    node_count = setting.count(NODE_COUNT, NODE_COUNT_QUICK)
    if IS_COMPILED:
        prepare_compiled()
    core = CoreAlone(node_count)
    core.busy_s = 0.0
    count = GPUS_PER_NODE * node_count
    core.deploy(count)
    assert core.proposed_count == count, (core.proposed_count, count)
    figures: dict[str, Value] = {
        "core_decisions_per_s": round(count / core.busy_s, 1),
        "core_us_per_replica": round(1e6 * core.busy_s / count, 1),
    }
    return Measured(figures=figures)
