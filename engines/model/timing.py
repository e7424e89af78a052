"""How long one step of an inference engine takes: the roofline of what it computes and what it reads.

A step handles some prompt tokens (prefill) and one token of each running sequence (decode):

    step = overhead + sequences x overhead each + max(compute, weights read) + KV and state read

Weights are read once a step, however many tokens share it; that is why a batch is cheap. A first-order model: expect
15 to 30 % error against a real engine. Prefill attention (quadratic in the prompt) is not in it yet.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOPS_PER_PARAMETER = 2  # one multiplication and one addition per parameter and token


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts: a step reads the shared part, and of the experts only those that some token chose."""

    expert_count: int
    experts_per_token_count: int
    shared_bytes: int
    expert_bytes: int  # all experts together

    def read_bytes(self, token_count: int) -> float:
        """Expected bytes for a step of that many tokens, each choosing its experts evenly and independently."""
        missed_fraction = (1 - self.experts_per_token_count / self.expert_count) ** token_count
        return self.shared_bytes + self.expert_bytes * (1 - missed_fraction)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParameters:
    """What the timing model must know about a model; `engines.model.catalogue` reads them from `models.json`."""

    name: str
    precision: str
    weights_bytes: int
    active_parameters: int  # that take part in one token
    kv_bytes_per_token: int
    state_bytes_per_sequence: int  # fixed memory of one sequence (Mamba layers); 0 for pure attention
    context_tokens_max: int
    prefill_efficiency: float  # part of the GPU's peak that prefill reaches, 0 to 1
    step_overhead_s: float
    sequence_overhead_s: float
    experts: Experts | None

    def weights_read_bytes(self, token_count: int) -> float:
        """Bytes of weights that a step of that many tokens reads."""
        return float(self.weights_bytes) if self.experts is None else self.experts.read_bytes(token_count)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpeed:
    """The two numbers of a GPU that bound a step.

    `compute_fraction` is the part of the GPU that this engine gets beside its neighbours, 0 to 1 (1: alone).
    """

    name: str
    memory_bytes_per_s: float
    memory_efficiency: float  # part of the bandwidth that kernels reach, 0 to 1
    flops_per_s: float
    compute_fraction: float = 1.0

    @property
    def read_bytes_per_s(self) -> float:
        return self.memory_bytes_per_s * self.memory_efficiency * self.compute_fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingModel:
    """Step times of one model on one GPU. `time_scale` multiplies every result (0.1: ten times faster)."""

    parameters: ModelParameters
    gpu: GpuSpeed
    time_scale: float = 1.0

    def step_s(self, *, prefill_tokens: int, decode_count: int, context_tokens: int) -> float:
        """One step of `prefill_tokens` prompt tokens and `decode_count` sequences.

        `context_tokens` is the sum over the decoding sequences of the tokens whose KV they read. No work, no time.
        """
        token_count = prefill_tokens + decode_count
        if token_count == 0:
            return 0.0
        parameters = self.parameters
        flops = FLOPS_PER_PARAMETER * parameters.active_parameters * token_count
        compute_s = flops / (self.gpu.flops_per_s * parameters.prefill_efficiency * self.gpu.compute_fraction)
        weights_s = parameters.weights_read_bytes(token_count) / self.gpu.read_bytes_per_s
        # A sequence's state is read and written back in each step.
        state_bytes = 2 * decode_count * parameters.state_bytes_per_sequence
        context_s = (context_tokens * parameters.kv_bytes_per_token + state_bytes) / self.gpu.read_bytes_per_s
        overhead_s = parameters.step_overhead_s + decode_count * parameters.sequence_overhead_s
        return (overhead_s + max(compute_s, weights_s) + context_s) * self.time_scale

    def prefill_s(self, prompt_tokens: int) -> float:
        """Time to the first token of a prompt on an idle engine."""
        return self.step_s(prefill_tokens=prompt_tokens, decode_count=0, context_tokens=0)

    def decode_step_s(self, *, decode_count: int, context_tokens: int) -> float:
        """Time between two tokens while `decode_count` sequences run."""
        return self.step_s(prefill_tokens=0, decode_count=decode_count, context_tokens=context_tokens)
