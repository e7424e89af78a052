"""How long one step of an inference engine takes: the roofline of what it computes and what it moves.

A step handles some prompt tokens (prefill) and one token of each running sequence (decode):

    step = host + layers x gaps + max(matrix products, weights) + max(attention, KV and state) + all-reduces

Weights are read once a step, however many tokens share it; that is why a batch is cheap. The matrix products run at
the part of the GPU's peak, and reads at the part of its bandwidth, that published measurements of single, dedicated
GPUs show (`fit.json`). Attention and matrix products are different kernels, so their times add.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOPS_PER_PARAMETER = 2  # one multiplication and one addition per parameter and token
FLOPS_PER_ATTENDED = 4  # of each query element with each position: scores and weighted values
ALL_REDUCES_PER_LAYER = 2  # after attention and after the feed-forward part, with tensor parallelism
ACTIVATION_BYTES = 2  # one element between two layers


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
    read_bytes: int  # of the weights in one step: all but an input embedding that is not also the output's
    active_parameters: int  # that take part in the matrix products of one token
    layer_count: int
    hidden_size: int
    attention_layer_count: int  # whose KV grows with the length
    query_width: int  # query heads x head size
    kv_bytes_per_token: int
    state_bytes_per_sequence: int  # fixed memory of one sequence (Mamba layers); 0 for pure attention
    context_tokens_max: int
    compute_factor: float  # what the model's kernels reach of what dense bf16 ones do: 2 for fp8, less for experts
    experts: Experts | None
    window_tokens: int | None = None  # positions that attention looks back, if not all

    def weights_read_bytes(self, token_count: int) -> float:
        """Bytes of weights that a step of that many tokens reads."""
        return float(self.read_bytes) if self.experts is None else self.experts.read_bytes(token_count)

    def attended_tokens(self, context_tokens: int) -> int:
        """Positions that the next token of a sequence of that length looks at."""
        return context_tokens if self.window_tokens is None else min(context_tokens, self.window_tokens)

    def chunk_attended_tokens(self, *, start_tokens: int, tokens: int) -> float:
        """Positions that all tokens of a prompt's chunk look at, together: each at those before it."""
        if self.window_tokens is None:
            return tokens * (start_tokens + (tokens + 1) / 2)
        grow = max(min(self.window_tokens - start_tokens, tokens), 0)  # tokens that still see everything
        return grow * (start_tokens + (grow + 1) / 2) + (tokens - grow) * self.window_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpeed:
    """What bounds a step on one GPU. Efficiencies and overheads are fitted, the rest is from data sheets."""

    name: str
    memory_bytes_per_s: float
    memory_efficiency: float  # part of the bandwidth that kernels reach, 0 to 1
    flops_per_s: float  # dense bf16
    compute_efficiency: float  # part of the peak that matrix products and attention of long prompts reach, 0 to 1
    layer_overhead_s: float  # of each layer in each step: small kernels and the gaps between; the GPU is held
    sequence_overhead_s: float  # of each sequence in each step: scheduler, sampler, detokenizer; on the host
    link_bytes_per_s: float  # to another GPU of the host, one way
    switch_s: float = 0.0  # from one process's kernels to another's, without MPS

    @property
    def reached_bytes_per_s(self) -> float:
        return self.memory_bytes_per_s * self.memory_efficiency

    @property
    def reached_flops_per_s(self) -> float:
        return self.flops_per_s * self.compute_efficiency


@dataclass(frozen=True, slots=True)
class StepCost:
    """One step on a GPU of its own, in seconds, by what it needs.

    `host_s`: the GPU is free. `device_s`: it is held. `compute_s` and `memory_s` say how much of that the step would
    take at full arithmetic and at full bandwidth alone; what neither fills are gaps between small kernels.
    """

    host_s: float
    device_s: float
    compute_s: float
    memory_s: float

    @property
    def total_s(self) -> float:
        return self.host_s + self.device_s


NO_COST = StepCost(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingModel:
    """Step times of one model on `gpu_count` GPUs (tensor parallel). `time_scale` multiplies every result."""

    parameters: ModelParameters
    gpu: GpuSpeed
    gpu_count: int = 1
    time_scale: float = 1.0

    def cost(
        self, *, prefill: tuple[tuple[int, int], ...] = (), decode_count: int = 0, context_tokens: int = 0
    ) -> StepCost:
        """One step. `prefill`: (tokens done before, tokens of this chunk) of each prompt in it.

        `context_tokens` is the sum over the decoding sequences of the positions that they look at. No work, no time.
        """
        prefill_tokens = sum(tokens for _, tokens in prefill)
        token_count = prefill_tokens + decode_count
        if token_count == 0:
            return NO_COST
        model, gpu = self.parameters, self.gpu
        flops_per_s = gpu.reached_flops_per_s * model.compute_factor * self.gpu_count
        bytes_per_s = gpu.reached_bytes_per_s * self.gpu_count
        product_s = FLOPS_PER_PARAMETER * model.active_parameters * token_count / flops_per_s
        weights_s = model.weights_read_bytes(token_count) / bytes_per_s
        attended = context_tokens + sum(
            model.chunk_attended_tokens(start_tokens=start, tokens=tokens) for start, tokens in prefill
        )
        attention_flops = FLOPS_PER_ATTENDED * model.attention_layer_count * model.query_width * attended
        # Attention does not run on fp8 units or on experts: the dense bf16 rate holds for it.
        attention_s = attention_flops / (gpu.reached_flops_per_s * self.gpu_count)
        # KV of a chunk's past is read once for all its tokens; a sequence's state is read and written back.
        kv_tokens = context_tokens + sum(start + tokens for start, tokens in prefill)
        state_bytes = 2 * (decode_count + len(prefill)) * model.state_bytes_per_sequence
        kv_s = (kv_tokens * model.kv_bytes_per_token + state_bytes) / bytes_per_s
        scale = self.time_scale
        return StepCost(
            host_s=(decode_count + len(prefill)) * gpu.sequence_overhead_s * scale,
            device_s=(
                model.layer_count * gpu.layer_overhead_s
                + self._exchange_s(token_count)
                + max(product_s, weights_s)
                + max(attention_s, kv_s)
            )
            * scale,
            compute_s=(product_s + attention_s) * scale,
            memory_s=(weights_s + kv_s) * scale,
        )

    def _exchange_s(self, token_count: int) -> float:
        """All-reduces between the GPUs of a tensor-parallel engine; a ring moves 2 (n - 1) / n of the data."""
        if self.gpu_count == 1:
            return 0.0
        model = self.parameters
        moved_bytes = ALL_REDUCES_PER_LAYER * model.layer_count * token_count * model.hidden_size * ACTIVATION_BYTES
        return moved_bytes * 2 * (self.gpu_count - 1) / self.gpu_count / self.gpu.link_bytes_per_s

    def prefill_s(self, prompt_tokens: int) -> float:
        """Time to the first token of a prompt on an idle engine, in one chunk."""
        return self.cost(prefill=((0, prompt_tokens),)).total_s

    def decode_step_s(self, *, decode_count: int, context_tokens: int) -> float:
        """Time between two tokens while `decode_count` sequences run."""
        return self.cost(decode_count=decode_count, context_tokens=context_tokens).total_s
