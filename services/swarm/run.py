"""Carries out a plan: safety under its faults, then heal, then a hard deadline for convergence, then every check."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

from msgspec.structs import replace as changed

from kit import simulation_harm as harm
from kit.bus import Stored
from kit.service import Service
from kit.simulation_members import Member
from schemas.deployments import DeploymentSpec, WorkloadKind
from schemas.gateways import LoadSampled
from schemas.inbox import ParkRequested, RetireRequested, WakeRequested
from schemas.messages import Fact, Signal
from schemas.swapper import ParkDecided, WakeDecided
from schemas.units import GiB
from services.autoscaler.settings import AutoscalerSettings
from services.gateway.settings import GatewaySettings
from services.gateway.simulated import ANSWERED
from services.nodeagent.simulated_resizing import HostFaults
from services.placement.settings import PlacementSettings
from services.simulated import Shape, SimulatedSystem
from services.swapper.settings import SwapperSettings
from services.swarm.checks import Books, Conduct, check_ends, disagreement, is_answerable, signature
from services.swarm.displacement import Displacement
from services.swarm.gangs import Gangs
from services.swarm.gpu_rules import GpuRules
from services.swarm.ladders import Ladders
from services.swarm.plan import TRAFFIC, Plan, Step, point_of
from services.swarm.upkeep import Upkeep

SETTLE_S: Final = 150.0
"""After the last fault, everything must have converged within this: a failed engine's last restart comes after 16 s, an
order that was lost is given up after 60 s."""
PROBE_S: Final = 45.0
"""After that, a request to any model that is placed must be answered within this."""
STARTS_S: Final = 20.0
"""A model that got its place so long ago, or longer, has no excuse."""
MOVE_S: Final = 1200.0
"""No move goes on for longer: its replacement is given up after 900 s."""
LOOK_S: Final = 1.0
LOADING: Final = "model_loading"
RETRY_S: Final = 3.0
XID_CODES: Final = (13, 31, 43, 63, 94, 48, 95, 119)
DECIDERS: Final = ("placement", "swapper", "autoscaler")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What a run broke."""

    seed: int
    message: str
    signature: str
    at_s: float
    """Seconds after the run's begin."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """One seed's run."""

    plan: Plan
    trace_hash: str = ""
    failure: Failure | None = None
    injected: Counter[str] = field(default_factory=Counter)
    """{kind: how often}. Steps that found nothing to harm are not counted."""
    delivered_count: int = 0
    fact_count: int = 0
    wake_count: int = 0
    park_count: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    """{how it ended: requests}"""
    converged_s: float = 0.0


def shape_of(plan: Plan) -> Shape:
    if plan.is_at_real_pace:
        return Shape(
            gateway_count=plan.gateway_count,
            has_standbys=plan.has_standbys,
            alive_s=2.0,
            burst_tick_s=1.0,
            has_checkpoint=plan.has_checkpoint,
        )
    return Shape(
        gateway_count=plan.gateway_count,
        has_standbys=plan.has_standbys,
        route_term_s=10.0,
        alive_s=5.0,
        burst_tick_s=3.0,
        has_checkpoint=plan.has_checkpoint,
        placement=PlacementSettings(presence_tick_s=4.0, load_fresh_s=6.0, gateway_gone_s=20.0),
        gateway=GatewaySettings(lease_wait_s=4.0, sample_every_s=2.0),
        swapper=SwapperSettings(tick_s=1.0, load_fresh_s=6.0, gateway_gone_s=20.0),
        autoscaler=AutoscalerSettings(tick_s=2.0, load_fresh_s=6.0, gateway_gone_s=20.0),
    )


class Run:
    """A plan in progress; whatever breaks an invariant raises at that instant."""

    def __init__(self, plan: Plan, services: Mapping[str, Service[Any]] | None = None) -> None:
        self.plan = plan
        self.outcome = Outcome(plan=plan)
        shape = shape_of(plan)
        self.books, self.upkeep, self.ladders = Books(), Upkeep(), Ladders()
        self.gangs, self.displacement, self.gpu_rules = Gangs(), Displacement(), GpuRules(self.books)
        self.conduct = Conduct(load_fresh_s=shape.swapper.load_fresh_s + plan.faults.late_s + 1.0)
        self.system = SimulatedSystem(
            seed=plan.seed,
            node_count=plan.node_count,
            gpu_count=plan.gpu_count,
            faults=plan.faults,
            host_faults=plan.host_faults,
            host_budget_bytes=400 * GiB,
            services=services,
            shape=shape,
            listen=self._hear,
        )
        simulation = self.system.simulation
        simulation.checks_replay_at_crashes = True
        simulation.on_signal.append(self._hear_signal)
        self.begun_s = self.conduct.heard_load_at_s = simulation.now_s
        self._silent_until_s = 0.0
        self._is_healed = False
        self._command_count = 0

    # --- Phases -------------------------------------------------------------------------------------------------------

    def carry_out(self) -> Outcome:
        """Raises what a check raises."""
        self.begin()
        self.system.run_for(self.plan.lasts_s)
        self._heal()
        self._settle()
        self._probe()
        check_ends(self.system)
        self.gpu_rules.check_ends(self.system)
        self.gangs.check_ended(self.system.simulation.now_s)
        self.upkeep.check_ends(now_s=self.system.simulation.now_s, lasts_s_max=MOVE_S)
        self.system.check()
        return self._count()

    def begin(self) -> None:
        """Deploy the models and put the plan's steps on the clock."""
        self.system.deploy(list(self.plan.models))
        for step in self.plan.steps:
            self.system.simulation.at(self.begun_s + step.at_s, partial(self._do, step))

    def _heal(self) -> None:
        self._is_healed = True
        self._silent_until_s = 0.0
        for host in self.system.hosts.values():
            host.faults = HostFaults()
            host.silent_until_s = host.short_until_s = 0.0
            host.foreign_bytes.clear()
            host.eyes.sick_until_s.clear()
            host.find_gpus()
            for engine in host.engines.values():
                engine.hung_until_s = 0.0
        harm.heal(self.system.simulation)

    def _settle(self) -> None:
        """Traffic has ended. All must tell one story before the deadline, and still at it."""
        simulation = self.system.simulation
        begun_s = simulation.now_s
        told = "not looked at"
        while simulation.now_s - begun_s < SETTLE_S:
            self.system.run_for(LOOK_S)
            told = disagreement(self.system)
            if not told and all(ask.ended_s is not None for ask in self.system.asks):
                self.outcome.converged_s = simulation.now_s - begun_s
                return
        still = told or f"{sum(ask.ended_s is None for ask in self.system.asks)} requests are open"
        raise AssertionError(f"not converged {SETTLE_S:.0f} s after the last fault: {still}")

    def _probe(self) -> None:
        """Every model that is placed answers, to a client that tries again when it is told that the model loads.

        Where there was no place for it until shortly before its request ended, the next request must be answered.
        """
        for spec in self.plan.models:
            outcome, placed_s = self._probed(spec.name)
            if outcome != ANSWERED and placed_s < STARTS_S:
                outcome, _ = self._probed(spec.name)
            is_excused = not is_answerable(self.system, spec.name)
            assert outcome == ANSWERED or is_excused, f"all is healed, and {spec.name} does not answer: {outcome}"

    def _probed(self, model: str) -> tuple[str, float]:
        """How requests to it end, and for how long it has had its place."""
        simulation = self.system.simulation
        deadline_s, unplaced_at_s = simulation.now_s + PROBE_S, float("-inf")
        outcome = LOADING
        while outcome == LOADING and is_answerable(self.system, model):
            assert simulation.now_s < deadline_s, f"all is healed, and {model} only ever loads"
            ask = self.system.ask(model, gateway=0, takes_s=0.1, patience_s=PROBE_S)
            while ask.ended_s is None:
                self.system.run_for(LOOK_S)
                if not is_answerable(self.system, model):
                    unplaced_at_s = simulation.now_s
            outcome = ask.outcome
            if outcome == LOADING:
                self.system.run_for(RETRY_S)
        return outcome, simulation.now_s - unplaced_at_s

    def _count(self) -> Outcome:
        outcome, simulation = self.outcome, self.system.simulation
        outcome.trace_hash = simulation.trace_hash()
        outcome.delivered_count = simulation.counters.delivered_count
        outcome.fact_count = len(simulation.stream)
        outcome.asked.update(ask.outcome for ask in self.system.asks)
        counters = simulation.counters
        outcome.injected.update(
            {
                "message lost": counters.lost_count,
                "message doubled": counters.doubled_count,
                "message late": counters.late_count,
                "append unknown": counters.unknown_count,
                "append refused": counters.refused_count,
                "writer superseded": counters.superseded_count,
                "order refused": sum(
                    m.processor.refused_order_count for m in simulation.members.values() if m.processor is not None
                ),
                **{f"died {point}": count for point, count in counters.tripped.items()},
            }
        )
        return outcome

    # --- Listening ----------------------------------------------------------------------------------------------------

    def _hear(self, stored: Stored, fact: Fact) -> None:
        self.books.hear(fact)
        self.ladders.hear(fact)
        self.gpu_rules.hear(stored, fact)
        self.gangs.hear(fact, stored)
        self.conduct.hear(stored, fact)
        self.upkeep.hear(stored, fact)
        self.displacement.hear(stored, fact)
        self.outcome.wake_count += isinstance(fact, WakeDecided)
        self.outcome.park_count += isinstance(fact, ParkDecided)

    def _hear_signal(self, signal: Signal) -> None:
        """When the swapper may last have heard of any load, by its own clock. On its way counts as heard."""
        simulation = self.system.simulation
        if isinstance(signal, LoadSampled) and simulation.now_s >= max(
            self._silent_until_s, simulation.bus_away_until_s
        ):
            self._heard()

    def _heard(self) -> None:
        simulation = self.system.simulation
        swappers = [m for m in simulation.members.values() if m.writer == "swapper" and m.is_active]
        self.conduct.heard_load_at_s = max([simulation.now_s, *map(simulation.local_s, swappers)])

    # --- Steps --------------------------------------------------------------------------------------------------------

    def _do(self, step: Step) -> None:
        if self._is_healed:
            return
        if step.kind == TRAFFIC:
            self._ask(step)
            return
        done = self._deeds()[step.kind](step)
        if done is not False:
            self.outcome.injected[step.kind] += 1

    def _deeds(self) -> dict[str, Callable[[Step], Any]]:
        return {
            "crash": lambda s: self._crash(self._member(s), s.lasts_s),
            "crash-at": lambda s: self._trap(self._member(s), s),
            "crash-loop": lambda s: harm.crash_loop(
                self.system.simulation, self._member(s).name, count=3 + s.which % 8, every_s=0.1 + 2 * s.size
            ),
            "all-down": self._all_down,
            "pause": self._pause,
            "rival": lambda s: harm.rival(self.system.simulation, DECIDERS[s.which % 3]),
            "cut": lambda s: self._cut(self._member(s), s, "both"),
            "cut-in": lambda s: self._cut(self._member(s), s, "in"),
            "cut-out": lambda s: self._cut(self._member(s), s, "out"),
            "slow-link": lambda s: harm.slow_link(
                self.system.simulation, self._member(s), extra_s=0.05 + s.size, lasts_s=s.lasts_s
            ),
            "clock": self._clock,
            "bus-away": lambda s: harm.bus_away(self.system.simulation, lasts_s=s.lasts_s),
            "silence": self._be_silent,
            "engine-killed": self._kill_engine,
            "engine-hung": self._hang_engine,
            "gpu-lost": self._lose_gpu,
            "xid": self._strike,
            "gpu-sick": self._sicken,
            "power-lost": lambda s: self.system.lose_power(self._node(s), lasts_s=s.lasts_s),
            "foreign-memory": self._foreign,
            "nvml-silent": self._nvml_silent,
            "host-memory-short": self._host_short,
            "journal-torn": lambda s: self._trap(self._agent(s), replace(s, which=7)),
            "gateway-crash": lambda s: self._gateway(s).crash(down_s=s.lasts_s),
            "gateway-paused": lambda s: harm.pause(self.system.simulation, self._gateway(s), lasts_s=s.lasts_s),
            "gateway-cut": lambda s: self._cut(self._gateway(s), s, "both"),
            "herd": self._herd,
            "clients-leave": self._clients_leave,
            "park": lambda s: self._order(ParkRequested, s),
            "wake": lambda s: self._order(WakeRequested, s),
            "retire": lambda s: self._order(RetireRequested, s),
            "redeploy": lambda s: self._deploy(self._another(s)),
            "deploy-twice": self._deploy_twice,
            "park-wake-storm": self._storm,
            "retire-while-waking": self._retire_while_waking,
        }

    def _member(self, step: Step) -> Member:
        members = list(self.system.simulation.members.values())
        return members[step.which % len(members)]

    def _agent(self, step: Step) -> Member:
        return self.system.simulation.members[f"node.{self._node(step)}"]

    def _node(self, step: Step) -> str:
        nodes = list(self.system.hosts)
        return nodes[step.which % len(nodes)]

    def _gateway(self, step: Step) -> Any:
        return self.system.gateways[step.which % len(self.system.gateways)]

    def _spec(self, step: Step) -> DeploymentSpec:
        return self.plan.models[step.which % len(self.plan.models)]

    def _crash(self, member: Member, down_s: float) -> bool:
        was_alive = member.is_alive
        self.system.simulation.crash(member.name, down_s=down_s)
        return was_alive

    def _pause(self, step: Step) -> None:
        """A stopped swapper takes what waited for it as news when it goes on: signals do not say how old they are."""
        member, simulation = self._member(step), self.system.simulation
        harm.pause(simulation, member, lasts_s=step.lasts_s)
        if member.writer == "swapper":
            simulation.after(step.lasts_s, self._heard)

    def _all_down(self, step: Step) -> None:
        for member in list(self.system.simulation.members.values()):
            self._crash(member, step.lasts_s)

    def _trap(self, member: Member, step: Step) -> bool:
        return harm.set_trap(self.system.simulation, member.name, point_of(step), down_s=step.lasts_s)

    def _cut(self, party: Any, step: Step, way: str) -> None:
        harm.cut(self.system.simulation, party, lasts_s=step.lasts_s, way=way)

    def _clock(self, step: Step) -> None:
        """What is on its way to a swapper while its clock jumps is news by the new time."""
        by_s = (1 if step.which % 2 else -1) * (0.5 + 3600 * step.size**4)
        member = self._member(step)
        harm.jump_clock(member, by_s=by_s)
        if member.writer == "swapper":
            self._heard()

    def _be_silent(self, step: Step) -> None:
        """No signal and no order arrives for a while."""
        simulation = self.system.simulation
        simulation.faults = replace(self.plan.faults, fleeting_lost_fraction=1.0)
        self._silent_until_s = max(self._silent_until_s, simulation.now_s + step.lasts_s)
        simulation.at(self._silent_until_s, self._speak)

    def _speak(self) -> None:
        if self.system.simulation.now_s >= self._silent_until_s and not self._is_healed:
            self.system.simulation.faults = self.plan.faults

    def _engine(self, step: Step) -> tuple[str, str] | None:
        node = self._node(step)
        engines = sorted(self.system.hosts[node].engines)
        return (node, engines[int(step.size * len(engines))]) if engines else None

    def _kill_engine(self, step: Step) -> bool:
        found = self._engine(step)
        if found is not None:
            self.system.kill_engine(*found)
        return found is not None

    def _hang_engine(self, step: Step) -> bool:
        found = self._engine(step)
        return found is not None and self.system.hosts[found[0]].hang_engine(found[1], lasts_s=step.lasts_s)

    def _lose_gpu(self, step: Step) -> bool:
        """Every second time its agent dies of it too, and finds out when it is back."""
        node = self._node(step)
        host = self.system.hosts[node]
        if not host.is_up or len(host.gpus) < 2:
            return False
        self.system.lose_gpu(node, step.which)
        agent = f"node.{node}"
        if step.size < 0.5:
            self.system.simulation.crash(agent, down_s=0.5)

        def back() -> None:
            host.find_gpus()

        self.system.simulation.after(step.lasts_s, back)
        return True

    def _strike(self, step: Step) -> bool:
        """An XID: of the application's, of the hardware's, or a notice."""
        node = self._node(step)
        if not self.system.hosts[node].is_up:
            return False
        code = XID_CODES[int(step.size * len(XID_CODES))]
        self.system.strike_gpu(node, step.which, code=code, which=step.which)
        return True

    def _sicken(self, step: Step) -> None:
        self.system.hosts[self._node(step)].eyes.sicken(step.which, lasts_s=step.lasts_s)

    def _foreign(self, step: Step) -> None:
        host = self.system.hosts[self._node(step)]
        gpu_uuid = host.take_foreign(step.which, int((1 + 40 * step.size) * GiB))

        self.system.simulation.after(step.lasts_s, lambda: host.free_foreign(gpu_uuid))

    def _nvml_silent(self, step: Step) -> None:
        host = self.system.hosts[self._node(step)]
        host.fall_silent(until_s=self.system.simulation.now_s + step.lasts_s)

    def _host_short(self, step: Step) -> None:
        host = self.system.hosts[self._node(step)]
        host.short_until_s = max(host.short_until_s, self.system.simulation.now_s + step.lasts_s)

    # --- Clients and operators ----------------------------------------------------------------------------------------

    def _ask(self, step: Step, *, count: int = 0) -> bool:
        spec = self._spec(step)
        if spec.kind is not WorkloadKind.INFERENCE:
            return False
        for number in range(count or int(step.size)):
            self.system.ask(spec.name, gateway=step.which // 7 + number, takes_s=step.lasts_s)
        return True

    def _herd(self, step: Step) -> bool:
        return self._ask(replace(step, lasts_s=0.5), count=50 + int(150 * step.size))

    def _clients_leave(self, step: Step) -> bool:
        """Every second client that waits or reads gives up."""
        gateway = self._gateway(step)
        if not gateway.is_alive or gateway.is_paused:
            return False
        for ask in list(gateway.asks.values())[::2]:
            gateway.leave(ask)
        return True

    def _order(self, kind: Any, step: Step) -> None:
        self._command_count += 1
        self.system.command(kind(command_id=f"x{self._command_count}", model=self._spec(step).name))

    def _deploy(self, spec: DeploymentSpec) -> None:
        self.system.deploy([spec])

    def _another(self, step: Step) -> DeploymentSpec:
        """Another wish of the same kind for this name."""
        spec = self._spec(step)
        alike = [other for other in self.plan.models if other.kind is spec.kind]
        return changed(alike[step.which // 3 % len(alike)], name=spec.name)

    def _deploy_twice(self, step: Step) -> None:
        self._deploy(self._another(step))
        self._deploy(self._another(step))

    def _storm(self, step: Step) -> None:
        for number in range(10):
            kind = ParkRequested if number % 2 else WakeRequested
            self.system.simulation.after(number * step.size, partial(self._order, kind, step))

    def _retire_while_waking(self, step: Step) -> None:
        self._ask(replace(step, size=1.0, lasts_s=0.5))
        self.system.simulation.after(0.3 * step.size, partial(self._order, RetireRequested, step))
        self.system.simulation.after(5.0, partial(self._deploy, self._spec(step)))


def carry_out(plan: Plan, services: Mapping[str, Service[Any]] | None = None) -> Outcome:
    """Run the plan. What it breaks is in the outcome; `services` run in place of the real ones, by name."""
    run = Run(plan, services)
    try:
        return run.carry_out()
    except (AssertionError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        outcome = run._count()
        at_s = run.system.simulation.now_s - run.begun_s
        message = str(error) or type(error).__name__
        outcome.failure = Failure(seed=plan.seed, message=message, signature=signature(error), at_s=at_s)
        return outcome
