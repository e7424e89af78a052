"""What a models file says of an engine, beyond what its schema can check: each setting by itself is well-formed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A mistake by its path in the settings, before anybody looked up where that is."""

    path: Path_
    message: str
    hint: str = ""
    key: str = ""
    """Set: the mistake is this key below `path`; else it is the value at `path`."""


def engine_findings(settings: Mapping[str, Any], properties: Mapping[str, Any]) -> Iterator[Finding]:
    """Mistakes in one model's settings. Ill-formed ones are passed over: they are told already.

    `properties` is the schema's part on models, which says what each kind of engine can do.
    """
    engine = settings.get("engine") or ("training" if settings.get("kind") == "training" else "simulated")
    if engine not in properties["engine"]["enum"]:
        return
    yield from _program(settings, engine, properties["engine"])
    yield from _variables(settings, properties)
    if engine not in ("simulated", "training"):
        yield from _options(settings, properties["arguments"])
    able, swap = properties["swap"]["x-by-engine"][engine], settings.get("swap")
    if swap in properties["swap"]["enum"] and swap not in able:
        yield Finding(
            path=("swap",), message=f"engine {engine} cannot be parked by {swap}", hint=f"use {', '.join(able)}"
        )


def _program(settings: Mapping[str, Any], engine: str, kinds: Mapping[str, Any]) -> Iterator[Finding]:
    image, command, runtime = settings.get("image"), settings.get("command"), settings.get("runtime")
    is_container = runtime == "docker" or (runtime is None and (bool(image) or engine in kinds["x-containers-only"]))
    if engine in kinds["x-containers-only"] and runtime == "process":
        yield Finding(path=("runtime",), message=f"engine {engine} runs in containers only", hint="leave `runtime` out")
    elif engine == "openai" and not command and not image:
        message = "engine openai needs a command or an image that serves the model"
        yield Finding(path=("engine",), message=message, hint="add `command: [my-server, --port, '{port}']`")
    elif engine == "openai" and not command and not is_container:
        message = "engine openai needs a command to run as a process"
        yield Finding(path=("runtime",), message=message, hint="add `command: [my-server, --port, '{port}']`")
    elif is_container and not image and engine not in kinds["x-usual-images"]:
        path: Path_ = ("runtime",) if runtime else ("engine",)
        message = f"engine {engine} needs an image to run in a container"
        yield Finding(path=path, message=message, hint="add `image: ...`")
    if image and runtime == "process" and engine not in kinds["x-containers-only"]:
        yield Finding(path=("image",), message="an image is for runtime docker", hint="leave `runtime` or `image` out")


def _variables(settings: Mapping[str, Any], properties: Mapping[str, Any]) -> Iterator[Finding]:
    rules = properties["environment"]
    environment, secrets = settings.get("environment"), settings.get("secrets")
    environment = environment if isinstance(environment, dict) else {}
    secrets = [name for name in secrets if isinstance(name, str)] if isinstance(secrets, list) else []
    for name in (name for name in environment if isinstance(name, str)):
        path = ("environment",)
        if re.match(rules["x-reserved"], name):
            yield Finding(path=path, key=name, message=f"the variable {name} is the node agent's", hint="leave it out")
        elif re.search(rules["x-secret"], name):
            message = f"{name} looks like a secret, and every log of the fleet would have it"
            hint = f"write `secrets: [{name}]` and put its value on the nodes (secrets_dir)"
            yield Finding(path=path, key=name, message=message, hint=hint)
        elif name in secrets:
            yield Finding(path=path, key=name, message=f"{name} is given twice, as a variable and as a secret")
    for index, name in enumerate(secrets):
        if re.match(rules["x-reserved"], name):
            message = f"the variable {name} is the node agent's"
            yield Finding(path=("secrets", index), message=message, hint="leave it out")


def _options(settings: Mapping[str, Any], rules: Mapping[str, Any]) -> Iterator[Finding]:
    arguments = settings.get("arguments")
    for name in arguments if isinstance(arguments, dict) else ():
        if name in rules["x-own"]:
            message = f"the option {name} is the node agent's"
            yield Finding(path=("arguments",), key=name, message=message, hint="leave it out")
        elif isinstance(name, str) and re.search(rules["x-secret"], name):
            message = f"the option {name} looks like a secret, and every log of the fleet would have it"
            hint = "engines take theirs from variables: name it in `secrets`"
            yield Finding(path=("arguments",), key=name, message=message, hint=hint)
