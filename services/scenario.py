"""Scenarios: conversations with the system in virtual time; commands, a line of dashes, and what happened.

``python -m services sim FILE`` plays one.

A block is a few commands, `----`, and what happened until the next blank line. Lines that begin with `#` are prose.

- `cluster nodes=1 gpus=2 host_gib=4096 gateways=0 alive_s=0 standbys`: begin; time counts from here. Without gateways,
  clients want models themselves; with them requests go through the real core, one gateway after another. With `alive_s`
  agents say so often that they are there, and a node that falls silent is lost
- `deploy NAME portion=0.3` or `gib=30`, and `limit_portion= limit_gib= weights_gb= start_s= priority= warm_s= stay_s=
  cold_s= grade= training fixed`, and `gpus= replicas= gang immovable`, and `tenant= runtime_s= delay_s=` (how long it
  runs at least before it is displaced, and waits before it displaces others)
- `quota TENANT gpus=2 weight=1` (the operator guarantees a tenant so many GPUs)
- `request NAME count=1`, `requests last_s=0.5` (how long each is in flight), `park NAME`, `wake NAME`,
  `retire NAME tenant=`
- `repack moves=8` (an operator wants whole GPUs), `close-gpu NODE index=0 drain`, `open-gpu NODE index=0`
- `kill SERVICE down_s=1`: placement, swapper, autoscaler or a node's name (its agent; engines run on)
- `kill-engine NAME`, `explain NAME tenant=`, `advance SECONDS`, `show` (who holds what on each GPU, in GiB)

What goes wrong; `WHO` is a service, its standby (`swapper/2`), a node's name (its agent) or a gateway (`gw0`):

- `kill WHO at=after-commit` (or before-handle, after-handle, after-ahead, after-send, mid-release): when it comes there
- `pause WHO lasts_s=30`, `rival SERVICE` (its standby starts beside it), `clock WHO by_s=-3600`
- `cut WHO lasts_s=30 way=both` (or in, out): from the bus; `slow WHO extra_s=0.5 lasts_s=30`; `bus-away lasts_s=30`
- `hang-engine NAME lasts_s=10`, `lose-gpu NODE index=0`, `find-gpus NODE`, `lose-power NODE lasts_s=30`
- `foreign NODE index=0 gib=20` (a process that is not ours takes memory)
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from kit import simulation_harm as harm
from kit.bus import Stored
from kit.simulation import Member, Party, Point
from schemas.deployments import (
    DeploymentSpec,
    EngineKind,
    EngineSpec,
    IsolationGrade,
    PlacementSpec,
    ShareSpec,
    SwapSpec,
    WorkloadKind,
)
from schemas.history import WriterStarted
from schemas.inbox import (
    GpuCloseRequested,
    GpuReinstateRequested,
    ParkRequested,
    QuotaRequested,
    RepackRequested,
    RetireRequested,
    WakeRequested,
)
from schemas.messages import Fact
from schemas.nodes import NodeJoined
from schemas.placement import DeploymentAdmitted
from schemas.queries import Explain, Explanation
from schemas.units import GB, GiB
from services.nodeagent.simulated import SimulatedHost
from services.nodeagent.state import NodeState
from services.nodeagent.transitions import Residency
from services.placement import explaining as _explaining  # noqa: F401  # Registers its answer.
from services.placement import views as _views  # noqa: F401
from services.placement.core import SERVICE as PLACEMENT
from services.placement.state import ClusterState
from services.placement.wording import text_of
from services.simulated import TENANT, Request, Shape, SimulatedSystem

DASHES: Final = "----"


class ScenarioError(Exception):
    """A line that cannot be carried out, in one sentence."""


class Conversation:
    """One scenario's system, and the lines that it has said since they were last taken."""

    def __init__(self) -> None:
        self.system: SimulatedSystem | None = None
        self.lines: list[str] = []
        self._begun_at_s = 0.0
        self._answered: set[int] = set()
        self._models: dict[str, str] = {}
        self._command_count = 0

    def say(self, line: str) -> None:
        """Carry out one line of a scenario."""
        verb, *words = line.split()
        names = [word for word in words if "=" not in word]
        values = dict(word.split("=", 1) for word in words if "=" in word)
        verbs: dict[str, Callable[[list[str], dict[str, str]], None]] = {
            "cluster": self._cluster,
            "deploy": self._deploy,
            "request": self._request,
            "requests": self._requests,
            "park": lambda n, _: self._live.command(ParkRequested(command_id=self._id(), model=n[0])),
            "wake": lambda n, _: self._live.command(WakeRequested(command_id=self._id(), model=n[0])),
            "retire": lambda n, v: self._live.command(
                RetireRequested(command_id=self._id(), model=n[0]), tenant=v.get("tenant", TENANT)
            ),
            "repack": lambda _, v: self._live.command(
                RepackRequested(command_id=self._id(), move_count_max=int(v.get("moves", "8")))
            ),
            "close-gpu": lambda n, v: self._live.command(
                GpuCloseRequested(command_id=self._id(), is_draining="drain" in n, **self._gpu(n, v))
            ),
            "open-gpu": lambda n, v: self._live.command(
                GpuReinstateRequested(command_id=self._id(), **self._gpu(n, v))
            ),
            "quota": self._quota,
            "kill": self._kill,
            "kill-engine": self._kill_engine,
            "explain": self._explain,
            "advance": lambda n, _: self._advance(float(n[0])),
            "show": lambda _n, _v: self._show(),
            **self._harms(),
        }
        if verb not in verbs:
            raise ScenarioError(f"'{verb}' is no command; there are {', '.join(verbs)}")
        try:
            verbs[verb](names, values)
        except (ValueError, IndexError, KeyError) as error:
            raise ScenarioError(f"'{line}' cannot be carried out: {error}") from error

    def take(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    # --- Commands -----------------------------------------------------------------------------------------------------

    @property
    def _live(self) -> SimulatedSystem:
        if self.system is None:
            raise ScenarioError("begin with `cluster`")
        return self.system

    def _id(self) -> str:
        self._command_count += 1
        return f"x{self._command_count}"

    def _cluster(self, names: list[str], values: dict[str, str]) -> None:
        self.system = SimulatedSystem(
            seed=1,
            node_count=int(values.get("nodes", "1")),
            gpu_count=int(values.get("gpus", "1")),
            host_budget_bytes=int(values.get("host_gib", "4096")) * GiB,
            shape=Shape(
                gateway_count=int(values.get("gateways", "0")),
                has_standbys="standbys" in names,
                alive_s=float(values.get("alive_s", "0")),
            ),
        )
        self._begun_at_s = self.system.simulation.now_s
        self._answered.clear()
        self._models.clear()
        self.system.simulation.on_stored.append(self._hear)
        self._show()

    def _deploy(self, names: list[str], values: dict[str, str]) -> None:
        name, *flags = names
        is_training = "training" in flags
        portion, gib = values.get("portion"), values.get("gib")
        limit_portion, limit_gib = values.get("limit_portion"), values.get("limit_gib")
        cold_s, grade = values.get("cold_s"), values.get("grade")
        spec = DeploymentSpec(
            name=name,
            kind=WorkloadKind.TRAINING if is_training else WorkloadKind.INFERENCE,
            engine=EngineSpec(
                kind=EngineKind.TRAINING if is_training else EngineKind.SIMULATED,
                weights_bytes=int(float(values.get("weights_gb", "10")) * GB),
                cold_start_s=float(values.get("start_s", "10")),
            ),
            share=ShareSpec(
                request_portion=None if portion is None else float(portion),
                request_bytes=None if gib is None else int(gib) * GiB,
                limit_portion=None if limit_portion is None else float(limit_portion),
                limit_bytes=None if limit_gib is None else int(limit_gib) * GiB,
                minimum_grade=None if grade is None else IsolationGrade(grade),
                gpu_count=int(values.get("gpus", "1")),
            ),
            replica_count=int(values.get("replicas", "1")),
            placement=PlacementSpec(
                is_gang="gang" in flags,
                is_movable="immovable" not in flags,
                minimum_runtime_s=float(values.get("runtime_s", "0")),
                preemption_delay_s=float(values.get("delay_s", "0")),
            ),
            priority=values.get("priority"),
            swap=SwapSpec(
                is_parkable="fixed" not in flags,
                warm_window_s=float(values.get("warm_s", "300")),
                minimum_residency_s=float(values.get("stay_s", "0.5")),
                cold_after_s=None if cold_s is None else float(cold_s),
            ),
        )
        self._live.deploy([spec], tenant=values.get("tenant", TENANT))

    def _quota(self, names: list[str], values: dict[str, str]) -> None:
        command = QuotaRequested(
            command_id=self._id(),
            quota_tenant=names[0],
            gpu_quota=float(values["gpus"]),
            over_quota_weight=float(values.get("weight", "1")),
        )
        self._live.command(command)

    def _request(self, names: list[str], values: dict[str, str]) -> None:
        for _ in range(int(values.get("count", "1"))):
            if self._live.gateways:
                self._live.ask(names[0], gateway=len(self._live.asks), takes_s=self._live.clients.service_s)
            else:
                self._live.clients.request(names[0])

    def _requests(self, names: list[str], values: dict[str, str]) -> None:
        self._live.clients.service_s = float(values["last_s"])

    def _kill(self, names: list[str], values: dict[str, str]) -> None:
        down_s = float(values.get("down_s", "1"))
        party = self._party(names)
        point = values.get("at")
        if not isinstance(party, Member):
            next(g for g in self._live.gateways if g is party).crash(down_s=down_s)
        elif point is None:
            self._live.simulation.crash(party.name, down_s=down_s)
        else:
            harm.set_trap(self._live.simulation, party.name, Point(point), down_s=down_s)
            self.lines.append(f"{self._time()} {names[0]} will be killed {point}")
            return
        self.lines.append(f"{self._time()} {names[0]} is killed")

    def _kill_engine(self, names: list[str], values: dict[str, str]) -> None:
        for node, host in self._live.hosts.items():
            for replica_id in [r for r in host.engines if self._models.get(r) == names[0]]:
                self._live.kill_engine(node, replica_id)

    def _explain(self, names: list[str], values: dict[str, str]) -> None:
        answer = PLACEMENT.answers[Explain](self._placement(), Explain(model=names[0]), values.get("tenant", TENANT))
        assert isinstance(answer, Explanation), answer
        self.lines.append(f"{names[0]}: {answer.summary}" + (f"; {answer.remedy}" if answer.remedy else ""))
        self.lines += [f"  not {other.gpu_uuid}: {other.reason}" for other in answer.alternatives]

    def _advance(self, duration_s: float) -> None:
        self._live.run_for(duration_s)
        self._live.check()

    # --- What goes wrong ----------------------------------------------------------------------------------------------

    def _harms(self) -> dict[str, Callable[[list[str], dict[str, str]], None]]:
        return {
            "pause": lambda n, v: self._harm(n, "stops", harm.pause, self._party(n), lasts_s=float(v["lasts_s"])),
            "cut": lambda n, v: self._harm(
                n,
                "is cut from the bus",
                harm.cut,
                self._party(n),
                lasts_s=float(v["lasts_s"]),
                way=_one_of(v.get("way", "both"), harm.WAYS),
            ),
            "slow": lambda n, v: self._harm(
                n,
                "has a slow link",
                harm.slow_link,
                self._party(n),
                extra_s=float(v["extra_s"]),
                lasts_s=float(v["lasts_s"]),
            ),
            "bus-away": lambda _, v: self._harm(["NATS"], "is away", harm.bus_away, lasts_s=float(v["lasts_s"])),
            "rival": self._rival,
            "clock": self._clock,
            "hang-engine": self._hang_engine,
            "lose-gpu": lambda n, v: self._node_harm(n, "loses a GPU", self._live.lose_gpu, int(v.get("index", "0"))),
            "find-gpus": lambda n, _: self._node_harm(
                n, "has its GPUs back", lambda name: self._host(name).find_gpus()
            ),
            "lose-power": self._lose_power,
            "xid": lambda n, v: self._node_harm(
                n, f"reports XID {v['code']}", lambda name: self._xid(name, int(v.get("index", "0")), int(v["code"]))
            ),
            "no-foreign": lambda n, _: self._node_harm(n, "has no strangers any more", self._without_strangers),
            "foreign": lambda n, v: self._node_harm(
                n,
                "has a stranger on a GPU",
                lambda name: self._host(name).take_foreign(int(v.get("index", "0")), int(float(v["gib"]) * GiB)),
            ),
        }

    def _gpu(self, names: list[str], values: dict[str, str]) -> dict[str, str]:
        gpu = self._host(names[0]).gpus[int(values.get("index", "0"))]
        return {"node": names[0], "gpu_uuid": gpu.gpu_uuid}

    def _member(self, name: str) -> Member:
        members = self._live.simulation.members
        key = f"node.{name}" if name in self._live.hosts else name
        if key not in members:
            known = [*(each.removeprefix("node.") for each in members), *(g.name for g in self._live.gateways)]
            raise ScenarioError(f"there is no '{name}'; there are {', '.join(known)}")
        return members[key]

    def _party(self, names: list[str]) -> Party:
        found = [gateway for gateway in self._live.gateways if gateway.name == names[0]]
        return found[0] if found else self._member(names[0])

    def _host(self, name: str) -> SimulatedHost:
        if name not in self._live.hosts:
            raise ScenarioError(f"there is no node '{name}'; there are {', '.join(self._live.hosts)}")
        return self._live.hosts[name]

    def _harm(self, names: list[str], what: str, deed: Callable[..., object], *parts: Any, **values: Any) -> None:
        deed(self._live.simulation, *parts, **values)
        self.lines.append(f"{self._time()} {names[0]} {what}")

    def _node_harm(self, names: list[str], what: str, deed: Callable[..., object], *parts: Any) -> None:
        self._host(names[0])
        deed(names[0], *parts)
        self.lines.append(f"{self._time()} {names[0]} {what}")

    def _rival(self, names: list[str], values: dict[str, str]) -> None:
        if not harm.rival(self._live.simulation, names[0]):
            raise ScenarioError(f"{names[0]} has no standby that waits; begin with `cluster standbys`")
        self.lines.append(f"{self._time()} {names[0]}/2 starts beside {names[0]}")

    def _clock(self, names: list[str], values: dict[str, str]) -> None:
        harm.jump_clock(self._member(names[0]), by_s=float(values["by_s"]))
        self.lines.append(f"{self._time()} the clock of {names[0]} is set by {float(values['by_s']):+.0f} s")

    def _hang_engine(self, names: list[str], values: dict[str, str]) -> None:
        for host in self._live.hosts.values():
            for replica_id in [r for r in host.engines if self._models.get(r) == names[0]]:
                host.hang_engine(replica_id, lasts_s=float(values["lasts_s"]))
                self.lines.append(f"{self._time()} the engine of {names[0]} hangs")

    def _xid(self, name: str, index: int, code: int) -> None:
        self._live.strike_gpu(name, index, code=code)

    def _without_strangers(self, name: str) -> None:
        for gpu_uuid in list(self._host(name).foreign_bytes):
            self._host(name).free_foreign(gpu_uuid)

    def _lose_power(self, names: list[str], values: dict[str, str]) -> None:
        self._host(names[0])
        self._live.lose_power(names[0], lasts_s=float(values["lasts_s"]))
        self.lines.append(f"{self._time()} {names[0]} has no power")

    # --- What happened ------------------------------------------------------------------------------------------------

    def _time(self, at_s: float | None = None) -> str:
        now_s = self._live.simulation.now_s if at_s is None else at_s
        return f"t={now_s - self._begun_at_s:.2f}"

    def _hear(self, stored: Stored, fact: Fact) -> None:
        if isinstance(fact, NodeJoined):
            return
        writer = stored.subject.split(".")[3 if stored.subject.startswith("sublet.fact.node.") else 2]
        if isinstance(fact, DeploymentAdmitted):
            self._models[fact.deployment_id] = fact.deployment.name
        self.lines.append(f"{self._time()} {writer:<10} {type(fact).__name__} {self._about(fact)}".rstrip())

    def _about(self, fact: Fact) -> str:
        if isinstance(fact, WriterStarted):
            return ""
        self._learn(fact)
        text = text_of(fact)
        for identifier, model in sorted(self._models.items(), key=lambda item: -len(item[0])):
            text = text.replace(identifier, model)
        model = self._model_of(fact)
        return f"{model}: {text}" if model and not text.startswith(f"{model} ") else text

    def _learn(self, fact: Fact) -> None:
        for replica in getattr(fact, "replicas", ()):
            name = self._models.get(replica.deployment_id, replica.deployment_id)
            self._models[replica.replica_id] = name

    def _model_of(self, fact: Fact) -> str:
        replicas = getattr(fact, "replicas", ())
        identifier = replicas[0].replica_id if replicas else getattr(fact, "replica_id", "")
        for name in (identifier, *getattr(fact, "replica_ids", ())):
            if name in self._models:
                return self._models[name]
        return str(getattr(fact, "model", "") or self._models.get(getattr(fact, "deployment_id", ""), ""))

    def answers(self) -> list[str]:
        """One line for each request that was answered since the last look."""
        lines = []
        for number, request in enumerate(self._live.clients.requests):
            if request.served_at_s is not None and number not in self._answered:
                self._answered.add(number)
                lines.append(self._answer(request, request.served_at_s))
        for number, ask in enumerate(self._live.asks):
            if ask.ended_s is not None and number not in self._answered:
                self._answered.add(number)
                waited_s = (ask.first_byte_s or ask.ended_s) - ask.arrived_s
                what = f"answered after {waited_s:.2f} s" if ask.outcome == "answered" else f"ended: {ask.outcome}"
                lines.append(f"{self._time(ask.first_byte_s or ask.ended_s)} {ask.gateway:<10} {ask.model} {what}")
        return lines

    def _answer(self, request: Request, served_at_s: float) -> str:
        waited_s = served_at_s - request.arrived_s
        return f"{self._time(served_at_s)} client     {request.model} answered after {waited_s:.2f} s"

    def _placement(self) -> ClusterState:
        state = self._live.state("placement")
        assert isinstance(state, ClusterState), state
        return state

    def _show(self) -> None:
        for node in sorted(self._live.hosts):
            state = self._live.state(f"node.{node}")
            assert isinstance(state, NodeState), state
            for gpu in sorted(self._live.hosts[node].gpus, key=lambda gpu: gpu.index):
                here = [r for r in state.replicas.values() if gpu.gpu_uuid in r.share_bytes]
                parts = []
                for replica in here:
                    model = replica.proposal.deployment.name
                    where = "" if replica.residency is Residency.RESIDENT else f" {replica.residency}"
                    held_bytes = replica.held_on(gpu.gpu_uuid)
                    held = f" {_gib(held_bytes)}" if held_bytes else ""
                    parts.append(f"{model}{where}{held}")
                free_bytes = gpu.allocatable_bytes - state.held_bytes(gpu.gpu_uuid)
                self.lines.append(f"{node} gpu-{gpu.index} [{' | '.join([*parts, f'free {_gib(free_bytes)}'])}]")
        placement = self._placement()
        nowhere = [d.spec.name for d in placement.deployments.values() if not placement.replicas_of(d.deployment_id)]
        if nowhere:
            self.lines.append(f"nowhere: {', '.join(nowhere)}")


def _one_of(word: str, known: tuple[str, ...]) -> str:
    if word not in known:
        raise ValueError(f"'{word}' is none of {', '.join(known)}")
    return word


def _gib(size_bytes: int) -> str:
    """In GiB, one digit below ten."""
    size = size_bytes / GiB
    return f"{size:.1f}" if 0 < size < 9.95 else f"{size:.0f}"


def replayed(text: str) -> str:
    """The scenario with what happens now instead of what is written under its dashes."""
    conversation = Conversation()
    result: list[str] = []
    is_answer = False
    for line in text.splitlines():
        if line == DASHES:
            is_answer = True
            said = [*conversation.take(), *conversation.answers()]
            result += [DASHES, *_in_order(said)]
        elif not line.strip():
            is_answer = False
            result.append("")
        elif not is_answer:
            result.append(line)
            if not line.startswith("#"):
                conversation.say(line)
    return "\n".join(result).rstrip() + "\n"


def _in_order(lines: list[str]) -> list[str]:
    """What has a time by its time; what has none (`show`, `explain`) stays after everything before it."""
    timed = sorted((line for line in lines if line.startswith("t=")), key=lambda line: float(line[2:].split()[0]))
    return [*timed, *(line for line in lines if not line.startswith("t="))]


def main(arguments: list[str]) -> int:
    """Play one scenario and print the conversation."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        sys.stdout.write("usage: python -m services sim FILE\n\n" + str(__doc__))
        return 0 if arguments else 2
    sys.stderr.write("simulated, in virtual time\n")
    try:
        sys.stdout.write(replayed(Path(arguments[0]).read_text(encoding="utf-8")))
    except OSError as error:
        sys.stderr.write(f"error: {arguments[0]} cannot be read: {error.strerror}\n")
        return 2
    except ScenarioError as error:
        sys.stderr.write(f"error: {arguments[0]}: {error}\n")
        return 2
    return 0
