"""An autoscaler's core with its state, for tests."""

from typing import Any

from kit.outcomes import Context, Outcome, Timer
from schemas.autoscaler import ReplicasDecided
from schemas.deployments import DeploymentSpec, EngineKind, EngineSpec, ShareSpec, SwapSpec, WorkloadKind
from schemas.gateways import LoadSampled, ModelLoad, ModelWanted
from schemas.messages import Fact
from schemas.placement import DeploymentAdmitted
from schemas.units import GiB
from services.autoscaler.core import SERVICE, Tick
from services.autoscaler.settings import AutoscalerSettings
from services.autoscaler.state import ScalerState


class Scaler:
    """One that began to listen at 1,000 s; time stands still unless a test moves it."""

    def __init__(self) -> None:
        self.state: ScalerState = SERVICE.new_state(AutoscalerSettings())
        self.now_s = 1000.0
        self.started = list(SERVICE.on_start(self.state, self.context()))

    def context(self) -> Context:
        return Context(now_s=self.now_s, writer_epoch=3)

    def handle(self, item: Any) -> list[Outcome]:
        if isinstance(item, Fact):
            SERVICE.evolve(self.state, item)
        observe = SERVICE.observers.get(type(item))
        if observe is not None:
            observe(self.state, item, self.now_s)
        handler = SERVICE.handlers.get(type(item))
        outcomes = [] if handler is None else list(handler(self.state, item, self.context()))
        for outcome in outcomes:
            if isinstance(outcome, Fact):
                SERVICE.evolve(self.state, outcome)
        SERVICE.check_invariants(self.state)
        return outcomes

    def tick(self, after_s: float = 0.0) -> list[Outcome]:
        """What a tick decides, without the next tick's timer."""
        self.now_s += after_s
        return [outcome for outcome in self.handle(Tick()) if not isinstance(outcome, Timer)]

    def admit(
        self, name: str, *, cold_after_s: float | None = 20.0, is_training: bool = False, replica_count: int = 1
    ) -> None:
        kind = WorkloadKind.TRAINING if is_training else WorkloadKind.INFERENCE
        engine = EngineKind.TRAINING if is_training else EngineKind.SIMULATED
        spec = DeploymentSpec(
            name=name,
            kind=kind,
            engine=EngineSpec(kind=engine, weights_bytes=GiB),
            share=ShareSpec(request_portion=0.5),
            swap=SwapSpec(cold_after_s=cold_after_s),
            replica_count=replica_count,
        )
        self.handle(
            DeploymentAdmitted(
                at_s=self.now_s,
                inbox_seq=1,
                command_id="c",
                tenant="default",
                deployment_id=f"d-{name}",
                revision_count=1,
                deployment=spec,
            )
        )

    def load(self, *busy: str, gateway: str = "g") -> LoadSampled:
        """A gateway's sample: one request in flight for each model that is named, none for the others."""
        models = tuple(
            ModelLoad(
                deployment_id=f"d-{d.model}",
                in_flight_count=int(d.model in busy),
                waiting_count=0,
                arrived_count=0,
                last_arrival_s=0.0,
            )
            for d in self.state.deployments.values()
        )
        return LoadSampled(gateway=gateway, models=models)

    def wanted(self, name: str, count: int = 1) -> ModelWanted:
        return ModelWanted(gateway="g", deployment_id=f"d-{name}", model=name, waiting_count=count)

    def decided(self, name: str, count: int, reason: str) -> ReplicasDecided:
        return ReplicasDecided(
            at_s=self.now_s, deployment_id=f"d-{name}", model=name, replica_count=count, reason=reason
        )
