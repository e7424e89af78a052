"""Whether what a deployment says of its engine can ever be started, and what to write instead."""

import re
from typing import Final

from schemas.abilities import ABILITIES
from schemas.deployments import DeploymentSpec, EngineKind, Runtime

HAVE_USUAL_IMAGES: Final = frozenset({EngineKind.VLLM, EngineKind.SGLANG, EngineKind.LLAMA_SERVER})
"""Kinds for which a node agent knows an image."""
CONTAINERS_ONLY: Final = frozenset({EngineKind.NIM})
OURS: Final = frozenset({EngineKind.SIMULATED, EngineKind.TRAINING})

OWN_OPTIONS: Final = frozenset({"host", "port", "uds", "served-model-name", "alias", "api-key", "api-key-file"})
"""Options that the node agent gives itself, or that would keep it from asking the engine. Not for the engines that we
ship, which refuse what they do not know."""

SECRET_NAME: Final = r"(?i)(^|[_-])(token|key|password|passwd|secret|credentials?)($|[_-])"
"""What the name of a variable or an option looks like whose value nobody should see."""
VARIABLE_NAME: Final = r"^[A-Za-z_][A-Za-z0-9_]*$"
RESERVED_VARIABLE: Final = r"^SUBLET_"


def engine_problems(spec: DeploymentSpec) -> list[str]:
    """One clear sentence for each; empty when it is sound."""
    return [*_program_problems(spec), *_word_problems(spec), *_swap_problems(spec)]


def _program_problems(spec: DeploymentSpec) -> list[str]:
    engine, kind = spec.engine, spec.engine.kind
    problems = []
    is_container = engine.runtime is Runtime.DOCKER or (
        engine.runtime is None and (bool(engine.image) or kind in CONTAINERS_ONLY)
    )
    if kind in CONTAINERS_ONLY and engine.runtime is Runtime.PROCESS:
        problems.append(f"engine: an engine of kind '{kind}' runs in containers only; leave the runtime out.")
    elif kind is EngineKind.OPENAI and not engine.command and not engine.image:
        problems.append("engine: an engine of kind 'openai' needs a command, or an image; say what serves the model.")
    elif kind is EngineKind.OPENAI and not engine.command and not is_container:
        problems.append("engine: an engine of kind 'openai' needs a command to run as a process.")
    elif is_container and not engine.image and kind not in HAVE_USUAL_IMAGES:
        problems.append(f"engine: an engine of kind '{kind}' needs an image to run in a container.")
    if engine.image and engine.runtime is Runtime.PROCESS and kind not in CONTAINERS_ONLY:
        problems.append("engine: an image is for the runtime 'docker'; leave the runtime or the image out.")
    if re.search(r"\s", engine.image):
        problems.append(f"engine: '{engine.image}' is no name of an image; it has a space in it.")
    if "" in engine.command:
        problems.append("engine: the command has an empty word.")
    return problems


def _word_problems(spec: DeploymentSpec) -> list[str]:
    engine = spec.engine
    problems = []
    for name in sorted(engine.environment):
        if not re.match(VARIABLE_NAME, name):
            problems.append(f"engine: '{name}' is no name of a variable.")
        elif re.match(RESERVED_VARIABLE, name):
            problems.append(f"engine: the variable {name} is the node agent's; leave it out.")
        elif re.search(SECRET_NAME, name):
            problems.append(
                f"engine: the variable {name} looks like a secret, and every log of the fleet would have it; "
                "name it in secrets and put its value on the nodes."
            )
    for name in engine.secrets:
        if not re.match(VARIABLE_NAME, name) or re.match(RESERVED_VARIABLE, name):
            problems.append(f"engine: '{name}' is no name of a secret; it must be one of a variable, such as HF_TOKEN.")
        elif name in engine.environment:
            problems.append(f"engine: {name} is given twice, as a variable and as a secret.")
    for name in sorted(engine.arguments) if engine.kind not in OURS else ():
        if name in OWN_OPTIONS:
            problems.append(f"engine: the option {name} is the node agent's; leave it out.")
        elif re.search(SECRET_NAME, name):
            problems.append(
                f"engine: the option {name} looks like a secret, and every log of the fleet would have it; "
                "engines take theirs from variables: name it in secrets."
            )
    return problems


def _swap_problems(spec: DeploymentSpec) -> list[str]:
    able, wish = ABILITIES[spec.engine.kind], spec.engine.swap_driver
    if wish is None or wish in able.swap_drivers:
        return []
    known = ", ".join(able.swap_drivers)
    return [f"engine: an engine of kind '{spec.engine.kind}' cannot be parked by '{wish}'; it can by {known}."]
