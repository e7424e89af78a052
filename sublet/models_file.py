"""``models.yaml``: a fleet in one file, three lines a model at least.

Its form is the published JSON Schema, ``sublet/models.schema.json``; what a schema cannot say (a limit below its
request) is checked here. All mistakes of all files are told at once, each with file, line, column and a suggestion.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from sublet import _contract as contract
from sublet.errors import InvalidInput
from sublet.models_file_engines import Finding, Path_, engine_findings
from sublet.positions import Document, Mark, Problem, read_yaml, suggestion
from sublet.quantities import DURATION, SIZE, bytes_of, seconds_of

SUFFIXES: Final = (".yaml", ".yml")
# Of one GPU; the schema says so to editors.
PORTION_MAX: Final = 1
# The largest fleet file that people write is some hundred kilobytes.
FILE_BYTES_MAX: Final = 4 * 1024**2


class InvalidFiles(InvalidInput):
    """Files with mistakes; `problems` are in the order of files and lines."""

    code = "invalid_file"

    def __init__(self, problems: Sequence[Problem]) -> None:
        count = len(problems)
        super().__init__(f"{count} {'problem' if count == 1 else 'problems'} found; nothing was sent")
        self.problems = tuple(problems)

    def details(self) -> list[str]:
        return [problem.render() for problem in self.problems]

    def as_json(self) -> dict[str, Any]:
        return {**super().as_json(), "problems": [problem.as_json() for problem in self.problems]}


@cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a models file."""
    loaded: dict[str, Any] = json.loads(Path(__file__).with_name("models.schema.json").read_text(encoding="utf-8"))
    return loaded


# ---- reading files -------------------------------------------------------------------------------------------------


def read_files(paths: Iterable[Path]) -> list[contract.DeploymentSpec]:
    """All deployments of these files, and of the YAML files directly in these folders. Raises `InvalidFiles`."""
    problems: list[Problem] = []
    specs: list[contract.DeploymentSpec] = []
    first_seen: dict[str, str] = {}
    for path in _files(paths, problems):
        document = _load(path)
        found = _deployments(document)
        problems += document.problems
        for name, mark, spec in found:
            if name in first_seen:
                problems.append(document.problem(mark, f"'{name}' is given twice", f"first in {first_seen[name]}"))
            first_seen.setdefault(name, f"{document.file}:{mark.line + 1}")
            if spec is not None:
                specs.append(spec)
    if problems:
        raise InvalidFiles(sorted(problems, key=lambda problem: (problem.file, problem.mark.line, problem.mark.column)))
    return specs


def parse(text: str, file: str = "models.yaml") -> list[contract.DeploymentSpec]:
    """The deployments in this text. Raises `InvalidFiles`."""
    document = read_yaml(text, file)
    found = _deployments(document)
    if document.problems:
        raise InvalidFiles(sorted(document.problems, key=lambda problem: (problem.mark.line, problem.mark.column)))
    return [spec for _, _, spec in found if spec is not None]


def _files(paths: Iterable[Path], problems: list[Problem]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = sorted(child for child in path.iterdir() if child.suffix in SUFFIXES and child.is_file())
            if not inside:
                problems.append(Problem(file=str(path), mark=Mark(), message="this folder holds no .yaml file"))
            yield from inside
        else:
            yield path


def _load(path: Path) -> Document:
    file = str(path)
    nothing = Document(file=file, lines=[])
    try:
        content = path.read_bytes()
    except OSError as error:
        nothing.problems.append(nothing.problem(Mark(), f"cannot be read: {error.strerror}"))
        return nothing
    if len(content) > FILE_BYTES_MAX:
        nothing.problems.append(nothing.problem(Mark(), f"larger than {FILE_BYTES_MAX // 1024**2} MiB"))
        return nothing
    try:
        return read_yaml(content.decode("utf-8-sig"), file)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n")
        nothing.problems.append(nothing.problem(Mark(line=line), "not UTF-8 text"))
        return nothing


def _deployments(document: Document) -> list[tuple[str, Mark, contract.DeploymentSpec | None]]:
    """Name, place and wish of each model; None for one with mistakes, which are added to the document's problems."""
    root = document.root
    if root is None:
        if not document.problems:
            document.problems.append(
                document.problem(Mark(), "the file is empty", "write `models:` and a model below it")
            )
        return []
    plain = root.plain()
    findings = list(_schema_findings(plain))
    models = plain.get("models") if isinstance(plain, dict) else None
    models = models if isinstance(models, dict) else {}
    for name, settings in models.items():
        if isinstance(settings, dict):
            findings += [_below(("models", name), finding) for finding in _semantic_findings(settings)]
    for finding in findings:
        mark = root.mark_of(finding.path, key=finding.key)
        document.problems.append(document.problem(mark, finding.message, finding.hint))
    marks = root.at(("models",)).key_marks
    is_clean = not document.problems
    return [
        (name, marks.get(name, Mark()), _translate(name, settings) if is_clean else None)
        for name, settings in models.items()
    ]


def _below(path: Path_, finding: Finding) -> Finding:
    return Finding(path=path + finding.path, message=finding.message, hint=finding.hint, key=finding.key)


# ---- what the schema says ------------------------------------------------------------------------------------------


def _schema_findings(plain: Any) -> Iterator[Finding]:
    from jsonschema import Draft202012Validator

    seen = set()
    for error in Draft202012Validator(schema()).iter_errors(plain):
        for finding in _findings_of(error, tuple(error.absolute_path)):
            if finding not in seen:
                seen.add(finding)
                yield finding


def _findings_of(error: Any, path: Path_) -> Iterator[Finding]:
    """One schema error in our words."""
    setting = _setting(path)
    rule, value = error.validator, error.instance
    expects = error.schema.get("x-expects", "") if isinstance(error.schema, Mapping) else ""
    match rule:
        case "additionalProperties":
            known = error.schema["properties"]
            for key in sorted(set(value) - set(known)):
                yield Finding(path=path, key=key, message=f"unknown setting '{key}'", hint=suggestion(key, known))
        case "required":
            for key in error.validator_value:
                if key not in value:
                    example = error.schema["properties"][key].get("examples", ["..."])[0]
                    owner = f"{path[-1]} has" if path else "the file has"
                    above, last = (path[:-1], str(path[-1])) if path else (path, "")
                    hint = f"add `{key}: {example}`" if isinstance(example, str | float | int) else f"add `{key}:`"
                    yield Finding(path=above, key=last, message=f"{owner} no '{key}'", hint=hint)
        case "enum":
            hint = suggestion(str(value), error.validator_value)
            choices = ", ".join(error.validator_value)
            yield Finding(path=path, message=f"unknown {setting} '{_shown(value)}'; use one of {choices}", hint=hint)
        case "maximum" if error.validator_value == PORTION_MAX and path[-1] != "compute":
            message = f"{setting} {_shown(value)} is more than one GPU"
            hint = "for a size add its unit, for example 20GiB; for two GPUs write `gpus: 2` and the share of each"
            yield Finding(path=path, message=message, hint=hint)
        case "minProperties" if path == ("models",):
            yield Finding(path=path, message=f"{setting} must not be empty", hint="add a model below it")
        case "pattern" if "x-name" in error.schema:
            noun = error.schema.get("x-noun", "model name")
            yield Finding(path=path, key=str(value), message=f"'{_shown(value)}' is no {noun}; {expects}")
        case _:
            yield Finding(path=path, message=f"{setting} must be {expects}; found {_described(value)}")


def _setting(path: Path_) -> str:
    """How a sentence calls the value at this path."""
    if not path:
        return "the file"
    words = [str(step) for step in path[2:]] or [str(path[-1])]
    return ".".join(words) if words[0] != "share" or len(words) == 1 else f"the share's {words[-1]}"


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _described(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"'{_shown(value)}'"


# ---- what it cannot say --------------------------------------------------------------------------------------------


def _semantic_findings(settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Mistakes of settings that are well-formed one by one. Ill-formed ones are passed over: they are told already."""
    share = settings.get("share")
    inner = share if isinstance(share, dict) else {}
    if "limit" in inner and "limit" in settings:
        yield Finding(path=(), key="limit", message="the limit is given twice: here and in share")
    limit_path: Path_ = ("share", "limit") if "limit" in inner else ("limit",)
    request = _amount(inner.get("request") if inner else share)
    limit_value = inner.get("limit", settings.get("limit"))
    limit = _amount(limit_value)
    if request is not None and limit is not None and type(request) is type(limit) and limit < request:
        written = inner.get("request") if inner else share
        message = f"the limit {_shown(limit_value)} is below the request {_shown(written)}"
        yield Finding(path=limit_path, message=message, hint="raise the limit or lower the share")
    yield from _oversized(settings)
    if settings.get("gang") is True and settings.get("replicas", 1) == 1:
        yield Finding(path=("gang",), message="a gang of one replica is no gang", hint="add `replicas: 2` or more")
    engine, kind = settings.get("engine"), settings.get("kind")
    if kind == "training" and engine not in (None, "training"):
        yield Finding(path=("engine",), message="a training job needs engine training", hint="leave `engine` out")
    if kind == "inference" and engine == "training":
        yield Finding(path=("kind",), message="engine training serves no requests", hint="write `kind: training`")
    yield from engine_findings(settings, schema()["properties"]["models"]["additionalProperties"]["properties"])


def _oversized(settings: Mapping[str, Any]) -> Iterator[Finding]:
    """Well-formed sizes and durations that no number on the wire can hold."""
    share = settings.get("share")
    inner = {("share", key): value for key, value in share.items()} if isinstance(share, dict) else {}
    amounts = {(key,): settings.get(key) for key in ("weights", "share", "limit", "memory")} | inner
    for path, value in amounts.items():
        if isinstance(value, str) and SIZE.fullmatch(value) and bytes_of(value) is None:
            yield Finding(path=path, message=f"{_shown(value)} is larger than any memory")
    for key in (*_DURATIONS, *_BOUNDS):
        value = settings.get(key)
        if isinstance(value, str) and DURATION.fullmatch(value) and seconds_of(value) is None:
            yield Finding(path=(key,), message=f"{_shown(value)} is longer than any time")


def _amount(value: Any) -> float | int | None:
    """A portion as float, bytes as int, None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if value <= PORTION_MAX else None
    return bytes_of(value) if isinstance(value, str) else None


# ---- translation ---------------------------------------------------------------------------------------------------


def deployment(name: str, **settings: Any) -> contract.DeploymentSpec:
    """One deployment from the settings of a models file, for example ``weights="14.5GB", share=0.3, warm="5m"``.

    Strict: raises `InvalidInput` with every mistake for an unknown setting or a wrong value.
    """
    plain = {"models": {name: {key: value for key, value in settings.items() if value is not None}}}
    findings = list(_schema_findings(plain))
    findings += [_below(("models", name), finding) for finding in _semantic_findings(plain["models"][name])]
    if findings:
        facts = tuple(f"{finding.message}{' - ' + finding.hint if finding.hint else ''}" for finding in findings)
        raise InvalidInput(f"{name or 'the deployment'}: {findings[0].message}", facts=facts, fix=findings[0].hint)
    return _translate(name, plain["models"][name])


def _translate(name: str, settings: Mapping[str, Any]) -> contract.DeploymentSpec:
    """The wire form of settings that have no mistakes."""
    kind = settings.get("kind") or ("training" if settings.get("engine") == "training" else "inference")
    engine = settings.get("engine") or ("training" if kind == "training" else "simulated")
    weights_bytes = bytes_of(settings["weights"])
    assert weights_bytes is not None, settings
    seconds = {key: seconds_of(settings[key]) for key in (*_DURATIONS, *_BOUNDS) if key in settings}
    swap = {field: seconds[key] for key, field in _DURATIONS.items() if key in seconds and field}
    bounds = {field: seconds[key] for key, field in _BOUNDS.items() if key in seconds}
    if "parkable" in settings:
        swap["is_parkable"] = settings["parkable"]
    return contract.DeploymentSpec(
        name=name,
        kind=kind,
        engine=contract.EngineSpec(
            kind=engine,
            model=settings.get("model", ""),
            weights_bytes=weights_bytes,
            cold_start_s=seconds.get("cold_start"),
            arguments={key: _argument(value) for key, value in settings.get("arguments", {}).items()},
            image=settings.get("image", ""),
            command=tuple(settings.get("command", ())),
            environment={key: _argument(value) for key, value in settings.get("environment", {}).items()},
            secrets=tuple(settings.get("secrets", ())),
            runtime=settings.get("runtime"),
            swap_driver=settings.get("swap"),
            is_elastic=settings.get("elastic"),
        ),
        share=_share(settings),
        priority=settings.get("priority"),
        is_preemptible=settings.get("preemptible"),
        swap=contract.SwapSpec(**swap),  # type: ignore[arg-type]  # Durations are set where their key is.
        replica_count=settings.get("replicas", 1),
        host=contract.HostSpec(
            cpu_millicores=round(settings.get("cpu", 0) * 1000),
            memory_bytes=bytes_of(settings["memory"]) or 0 if "memory" in settings else 0,
        ),
        placement=_placement(settings, bounds),
    )


def _placement(settings: Mapping[str, Any], bounds: Mapping[str, float | None]) -> contract.PlacementSpec:
    strategy = settings.get("strategy", {})
    inner = strategy if isinstance(strategy, dict) else {"node": strategy, "gpu": strategy}
    return contract.PlacementSpec(
        gpu_models=tuple(settings.get("gpu_models", ())),
        node_labels=dict(settings.get("node_labels", {})),
        node_strategy=inner.get("node", "binpack"),
        gpu_strategy=inner.get("gpu", "binpack"),
        anti_affinity=settings.get("anti_affinity", "none"),
        is_gang=settings.get("gang", False),
        is_movable=settings.get("movable", True),
        **bounds,  # type: ignore[arg-type]  # Durations are set where their key is.
    )


_BOUNDS: Final = {"minimum_runtime": "minimum_runtime_s", "preemption_delay": "preemption_delay_s"}
"""Settings that are durations, and their field in `PlacementSpec`."""
_DURATIONS: Final = {
    "warm": "warm_window_s",
    "cold_after": "cold_after_s",
    "minimum_residency": "minimum_residency_s",
    "return_deadline": "return_deadline_s",
    "cold_start": "",
}
"""Settings that are durations, and their field in `SwapSpec`; empty: it belongs to the engine."""


def _argument(value: Any) -> str:
    """An engine argument as its command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _share(settings: Mapping[str, Any]) -> contract.ShareSpec:
    share = settings["share"]
    inner = share if isinstance(share, dict) else {"request": share}
    request, limit = _amount(inner["request"]), _amount(inner.get("limit", settings.get("limit")))
    return contract.ShareSpec(
        request_portion=request if isinstance(request, float) else None,
        request_bytes=request if isinstance(request, int) else None,
        limit_portion=limit if isinstance(limit, float) else None,
        limit_bytes=limit if isinstance(limit, int) else None,
        minimum_grade=settings.get("minimum_grade"),
        gpu_count=settings.get("gpus", 1),
        burst_weight=settings.get("burst_weight", 1),
        compute_portion=settings.get("compute"),
    )
