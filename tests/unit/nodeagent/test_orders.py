"""Orders are fleeting: the shells refuse those of a superseded writer and those that waited too long."""

from typing import Any

from kit.bus import Stored
from kit.processor import CHAIN_START, Delivery, Processor
from kit.snapshots import pack, unpack
from schemas.catalogue import encode
from schemas.history import WriterStarted
from schemas.messages import Fact, fact_subject
from schemas.orders import WakeOrdered
from services.nodeagent.core import SERVICE
from services.nodeagent.settings import NodeAgentSettings
from services.nodeagent.state import NodeState
from tests.unit.nodeagent.builders import NODE, Agent


class AgentInItsShell:
    """A processor with the state of an agent that has one parked replica; it has read history up to here."""

    def __init__(self) -> None:
        self.processor: Processor[NodeState] = Processor(
            SERVICE, NodeAgentSettings(node=NODE), writer=f"node.{NODE}", instance="one"
        )
        agent = Agent()
        agent.parked("a", 60)
        self.processor.state.gpus, self.processor.state.replicas = agent.state.gpus, agent.state.replicas
        self.order = agent.wake("a", writer_epoch=19)

    def decided(self, order: WakeOrdered, *, waited_s: float = 0.0) -> list[str]:
        """The facts that the order leads to."""
        why_not = self.processor.receive(Delivery(input=order, now_s=100.0), handled_s=100.0 + waited_s)
        batch = self.processor.take_batch()
        assert not (why_not and batch.entries)
        return [entry.subject.split(".")[-1] for entry in batch.entries] or [why_not]


def swapper_started(seq: int) -> Stored:
    fact: Fact = WriterStarted(instance="new", at_s=50.0)
    return Stored(
        seq=seq,
        time_s=50.0,
        subject=fact_subject("swapper", fact),
        body=encode(fact),
        id="swapper:new:0",
        previous_hash=CHAIN_START,
    )


def renewed(order: WakeOrdered, **changes: Any) -> WakeOrdered:
    return WakeOrdered(**{**{f: getattr(order, f) for f in order.__struct_fields__}, **changes})


def test_the_agent_reads_who_the_swapper_is() -> None:
    processor = AgentInItsShell().processor

    assert swapper_started(1).subject in processor.reads


def test_an_order_of_the_present_swapper_is_carried_out() -> None:
    agent = AgentInItsShell()
    agent.processor.replay_one(swapper_started(19))

    assert "nodes_replica_waking_v1" in agent.decided(agent.order)


def test_an_order_of_an_older_instance_is_refused_once_a_newer_one_sent_any_order() -> None:
    agent = AgentInItsShell()
    agent.decided(renewed(agent.order, writer_epoch=20, replica_id="unknown"))

    assert agent.decided(agent.order) == ["swapper of epoch 19 was superseded by 20"]
    assert agent.processor.refused_order_count == 1


def test_a_restarted_agent_refuses_a_stale_order_before_it_heard_any_other() -> None:
    """What it read of history tells it who the swapper is, although all that it remembered is gone."""
    agent = AgentInItsShell()
    agent.processor.replay_one(swapper_started(20))

    assert agent.decided(agent.order) == ["swapper of epoch 19 was superseded by 20"]


def test_a_start_from_a_snapshot_knows_the_newest_epoch_too() -> None:
    before = AgentInItsShell()
    before.processor.receive_stored(swapper_started(20))
    taken = before.processor.snapshot()
    agent = AgentInItsShell()
    agent.processor = Processor(SERVICE, NodeAgentSettings(node=NODE), writer=f"node.{NODE}", instance="two")

    agent.processor.restore(unpack(taken.position, pack(taken)))

    assert agent.decided(agent.order) == ["swapper of epoch 19 was superseded by 20"]


def test_an_order_that_waited_longer_than_its_deadline_is_never_carried_out() -> None:
    agent = AgentInItsShell()

    assert agent.decided(agent.order, waited_s=1.001) == [
        "it waited 1.001 s, longer than its deadline of 1000 ms",
    ]
    assert "nodes_replica_waking_v1" in agent.decided(agent.order, waited_s=0.999)
