"""The JSON Schema of ``models.yaml``, from the same enumerations and patterns as the wire.

`x-expects` completes the sentence "this setting must be ..." for whoever renders an error.
"""

from typing import Any, Final

import msgspec

from schemas.abilities import ABILITIES
from schemas.deployments import (
    DEFAULT_PRIORITY,
    PRIORITIES,
    AntiAffinity,
    EngineKind,
    IsolationGrade,
    Runtime,
    Strategy,
    SwapDriver,
    WorkloadKind,
)
from schemas.engine_wishes import (
    CONTAINERS_ONLY,
    HAVE_USUAL_IMAGES,
    OWN_OPTIONS,
    RESERVED_VARIABLE,
    SECRET_NAME,
    VARIABLE_NAME,
)
from schemas.units import ModelName

SIZE_PATTERN: Final = r"^\d+(\.\d+)? ?(B|[KMGT]i?B)$"
DURATION_PATTERN: Final = r"^(\d+(\.\d+)?(ms|s|m|h|d))+$"
_PORTION: Final = {"exclusiveMinimum": 0, "maximum": 1}


def models_schema() -> dict[str, Any]:
    """The schema that `sublet apply -f` and editors check against."""
    name = msgspec.json.schema(ModelName)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://sublet.dev/schemas/models.schema.json",
        "title": "Sublet models file",
        "description": "The models of a fleet: three lines each at least.",
        "type": "object",
        "x-expects": "a mapping with `models:`",
        "required": ["models"],
        "additionalProperties": False,
        "properties": {
            "models": {
                "description": "Models by the name that clients use.",
                "type": "object",
                "x-expects": "a mapping from names to settings",
                "minProperties": 1,
                "propertyNames": {
                    "pattern": name["pattern"],
                    "x-name": True,
                    "x-expects": "use letters, digits and . _ / : - between them",
                },
                "additionalProperties": _model(),
            }
        },
    }


def _model() -> dict[str, Any]:
    return {
        "type": "object",
        "x-expects": "a mapping of settings",
        "required": ["weights", "share"],
        "additionalProperties": False,
        "properties": {**_what(), **_engine(), **_room(), **_where(), **_swap()},
    }


def _what() -> dict[str, Any]:
    """What runs."""
    defaults = ", ".join(f"{priority} for {kind}" for kind, priority in DEFAULT_PRIORITY.items())
    return {
        "engine": {
            **_choice(EngineKind, "The program that serves the model. Default: simulated; for training: training."),
            "x-containers-only": sorted(CONTAINERS_ONLY),
            "x-usual-images": sorted(HAVE_USUAL_IMAGES),
        },
        "model": {
            "description": "The engine's own name for the model. Default: the name above.",
            "type": "string",
            "maxLength": 256,
            "x-expects": "a text of at most 256 characters",
        },
        "weights": _size("Bytes of the model's weights; host memory keeps as many while it is parked.", "14.5GB"),
        "kind": _choice(WorkloadKind, "Inference answers requests; training yields to it. Default: inference."),
        "priority": _choice(tuple(PRIORITIES), f"Who goes first. Default: {defaults}."),
        "preemptible": {
            "description": "May a more important workload take its guarantee. Default: by priority.",
            "type": "boolean",
            "x-expects": "true or false",
        },
        "cold_start": _duration(
            "Simulated engines only: how long a cold start takes before weights are loaded.", "10s"
        ),
    }


def _engine() -> dict[str, Any]:
    """How the program that runs is started."""
    return {
        "image": {
            "description": "Image of the engine's container. Default: the engine's usual one, where it runs in one.",
            "examples": ["nvcr.io/nim/meta/llama-3.1-8b-instruct:2.1.6"],
            "type": "string",
            "maxLength": 256,
            "pattern": r"^\S+$",
            "x-expects": "the name of an image such as vllm/vllm-openai:v0.33.0",
        },
        "command": {
            "description": "Instead of the engine's usual program; {port}, {model} and {memory_bytes} are filled in.",
            "examples": [["my-server", "--port", "{port}"]],
            "type": "array",
            "minItems": 1,
            "x-expects": "a list of words such as [my-server, --port, '{port}']",
            "items": {"type": "string", "minLength": 1, "x-expects": "a text; put it in quotes"},
        },
        "runtime": _choice(Runtime, "What runs the engine's program. Default: docker with an image, else process."),
        "environment": {
            "description": "More variables for the engine. No secrets: they would be in every log of the fleet.",
            "examples": [{"VLLM_LOGGING_LEVEL": "DEBUG"}],
            "type": "object",
            "x-expects": "a mapping from variables to values",
            "propertyNames": {
                "pattern": VARIABLE_NAME,
                "x-name": True,
                "x-noun": "name of a variable",
                "x-expects": "use letters, digits and _",
            },
            "x-reserved": RESERVED_VARIABLE,
            "x-secret": SECRET_NAME,
            "additionalProperties": {
                "type": ["string", "number", "boolean"],
                "x-expects": "a text, a number, true or false",
            },
        },
        "secrets": {
            "description": "Names of secrets of the node; the engine gets each as the variable of that name.",
            "examples": [["HF_TOKEN"]],
            "type": "array",
            "uniqueItems": True,
            "x-expects": "a list of different names of secrets such as [HF_TOKEN]",
            "items": {
                "type": "string",
                "pattern": VARIABLE_NAME,
                "x-reserved": RESERVED_VARIABLE,
                "x-expects": "the name of a variable such as HF_TOKEN",
            },
        },
        "arguments": {
            "description": "More command-line options for the engine, without the leading dashes.",
            "x-own": sorted(OWN_OPTIONS),
            "x-secret": SECRET_NAME,
            "type": "object",
            "x-expects": "a mapping from options to values",
            "additionalProperties": {
                "type": ["string", "number", "boolean"],
                "x-expects": "a text, a number, true or false",
            },
        },
    }


def _room() -> dict[str, Any]:
    """How much of a GPU."""
    limit = _part("Upper bound, at least the request; kept, bursting is not built yet. Default: the request.", 0.4)
    return {
        "share": {
            "description": "Guaranteed part of a GPU: a portion, a size, or a mapping with request and limit.",
            "examples": [0.3, "20GiB", {"request": 0.3, "limit": 0.4}],
            "type": ["number", "string", "object"],
            **_PORTION,
            "pattern": SIZE_PATTERN,
            "x-expects": "a part of one GPU such as 0.3, or a size such as 20GiB",
            "required": ["request"],
            "additionalProperties": False,
            "properties": {"request": _part("The guaranteed part.", 0.3), "limit": limit},
        },
        "limit": limit,
        "minimum_grade": _choice(IsolationGrade, "Only nodes that enforce the share at least this strongly."),
        "burst_weight": _count(
            "Among those that want more than their share: free bytes go by weight. Default: 1.", 2, 1000
        ),
        "elastic": _yes("Its cache can grow and shrink while it serves. Default: as its kind of engine usually can."),
        "compute": {
            "description": "The most of a GPU's processors that it may use; needs a GPU that is shared by MPS.",
            "examples": [0.5],
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 1,
            "x-expects": "a part of a GPU's processors such as 0.5, at most 1",
        },
    }


def _where() -> dict[str, Any]:
    """How many replicas, on how many GPUs, where, and what they put up with."""
    return {
        "gpus": _count("GPUs that one replica spans, all on one node; share and limit are of each. Default: 1.", 2, 64),
        "replicas": _count("Replicas that run side by side. Default: 1.", 3, 4096),
        "gang": _yes("All replicas start together, or none does. Default: false."),
        "cpu": {
            "description": "CPU cores of the host that one replica asks for. Default: 0, not counted.",
            "examples": [4],
            "type": "number",
            "minimum": 0,
            "x-expects": "a number of cores such as 4 or 0.5",
        },
        "memory": _size("Host memory that one replica asks for beside its parked weights. Default: 0.", "16GiB"),
        "gpu_models": {
            "description": "Names of GPUs, any of which will do; a part of the name is enough. Default: any.",
            "examples": [["H100", "H200"]],
            "type": "array",
            "x-expects": "a list of names of GPUs such as [H100, H200]",
            "items": {"type": "string", "minLength": 1, "x-expects": "the name of a GPU such as H100"},
        },
        "node_labels": {
            "description": "Only nodes that carry all of these labels.",
            "examples": [{"zone": "a"}],
            "type": "object",
            "x-expects": "a mapping from labels to values",
            "additionalProperties": {"type": "string", "x-expects": "a text"},
        },
        "strategy": {
            "description": "Fill what is partly used, or keep apart; for nodes and GPUs, or each for itself. "
            "Default: binpack.",
            "type": ["string", "object"],
            "pattern": f"^({'|'.join(Strategy)})$",
            "x-expects": f"{' or '.join(Strategy)}, or a mapping with node and gpu",
            "minProperties": 1,
            "additionalProperties": False,
            "properties": {
                "node": _choice(Strategy, "For nodes. Default: binpack."),
                "gpu": _choice(Strategy, "For the GPUs of a node. Default: binpack."),
            },
        },
        "anti_affinity": _choice(AntiAffinity, "Which place two replicas of the model never share. Default: none."),
        "movable": _yes("May it be moved to another GPU, behind a ready replacement. Default: true."),
        "minimum_runtime": _duration("Once running, it is not preempted sooner. Default: 0s.", "10m"),
        "preemption_delay": _duration("So long it waits for free room before it displaces others. Default: 0s.", "30s"),
    }


def _yes(description: str) -> dict[str, Any]:
    return {"description": description, "type": "boolean", "x-expects": "true or false"}


def _count(description: str, example: int, most: int) -> dict[str, Any]:
    return {
        "description": description,
        "examples": [example],
        "type": "integer",
        "minimum": 1,
        "maximum": most,
        "x-expects": f"a whole number from 1 to {most}",
    }


def _swap() -> dict[str, Any]:
    """How it leaves the GPU and comes back."""
    return {
        "swap": {
            **_choice(SwapDriver, "How it leaves the GPU and returns. Default: the quickest that engine and node can."),
            "x-by-engine": {str(kind): list(able.swap_drivers) for kind, able in ABILITIES.items()},
        },
        "parkable": {
            "description": "May it leave the GPU while idle; it then returns by a deadline. Default: true.",
            "type": "boolean",
            "x-expects": "true or false",
        },
        "warm": _duration("An idle model stays on the GPU this long when nobody needs its room. Default: 5m.", "5m"),
        "cold_after": _duration("Idle this long, its process is stopped too. Default: never.", "1h"),
        "minimum_residency": _duration(
            "It stays this long before it may be parked for another. Default: 500ms.", "500ms"
        ),
        "return_deadline": _duration(
            "A request to a parked model is answered or refused by then. Default: 30s.", "30s"
        ),
    }


def _choice(names: Any, description: str) -> dict[str, Any]:
    choices = [str(name) for name in names]
    return {"description": description, "enum": choices}


def _size(description: str, example: str) -> dict[str, Any]:
    return {
        "description": description,
        "examples": [example],
        "type": "string",
        "pattern": SIZE_PATTERN,
        "x-expects": f"a size with its unit, for example {example}",
    }


def _part(description: str, example: float) -> dict[str, Any]:
    return {
        "description": description,
        "examples": [example, "20GiB"],
        "type": ["number", "string"],
        **_PORTION,
        "pattern": SIZE_PATTERN,
        "x-expects": f"a part of one GPU such as {example}, or a size such as 20GiB",
    }


def _duration(description: str, example: str) -> dict[str, Any]:
    return {
        "description": description,
        "examples": [example],
        "type": "string",
        "pattern": DURATION_PATTERN,
        "x-expects": f"a duration with its unit, for example {example}",
    }
