"""Models files: what they mean, and how mistakes are told."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from inline_snapshot import snapshot

from sublet import _contract as contract
from sublet.errors import InvalidInput
from sublet.models_file import InvalidFiles, deployment, parse, read_files, schema
from sublet.positions import LINE_BREAKS, Problem, read_yaml

ROOT = Path(__file__).resolve().parents[3]
MISTAKES = """\
models:
  chat:
    weights: 14.5
    share: 0.3
    limt: 0.4
  big:
    weights: 20GB
    share: 1.5
    priority: hihg
  low:
    weights: 20GB
    share: {request: 20GiB, limit: 10GiB}
    warm: 5 minutes
    engine: simulatd
  low:
    share: 1
  -bad-:
    weights: 1GB
    share: x
  tune: {kind: inference, engine: training, weights: 1GB, share: 0.5}
  loud: {weights: 1GB, share: 0.5, limit: 0.4}
  bare:
  half:
    weights: 1GB
modells: 1
"""


NO_SHARE = "share must be a part of one GPU such as 0.3, or a size such as 20GiB; found"
MANY_GPUS = "is more than one GPU"
START = "not YAML: while"


def mistakes(text: str) -> str:
    """Everything that is said about this file."""
    with pytest.raises(InvalidFiles) as caught:
        parse(text)
    return "\n".join(problem.render() for problem in caught.value.problems) + "\n"


def messages(text: str) -> list[str]:
    with pytest.raises(InvalidFiles) as caught:
        parse(text)
    return [problem.message for problem in caught.value.problems]


def test_all_mistakes_are_told_at_once_with_place_and_suggestion() -> None:
    assert mistakes(MISTAKES) == snapshot("""\
models.yaml:3:14: weights must be a size with its unit, for example 14.5GB; found '14.5'
    3 |     weights: 14.5
      |              ^^^^
models.yaml:5:5: unknown setting 'limt'
    5 |     limt: 0.4
      |     ^^^^  did you mean 'limit'?
models.yaml:8:12: share 1.5 is more than one GPU
    8 |     share: 1.5
      |            ^^^  for a size add its unit, for example 20GiB; for two GPUs write `gpus: 2` and the share of each
models.yaml:9:15: unknown priority 'hihg'; use one of very-low, low, medium-low, medium, medium-high, high, very-high
    9 |     priority: hihg
      |               ^^^^  did you mean 'high'?
models.yaml:12:36: the limit 10GiB is below the request 20GiB
   12 |     share: {request: 20GiB, limit: 10GiB}
      |                                    ^^^^^  raise the limit or lower the share
models.yaml:13:11: warm must be a duration with its unit, for example 5m; found '5 minutes'
   13 |     warm: 5 minutes
      |           ^^^^^^^^^
models.yaml:14:13: unknown engine 'simulatd'; use one of simulated, training, vllm, sglang, nim, llama-server, openai
   14 |     engine: simulatd
      |             ^^^^^^^^  did you mean 'simulated'?
models.yaml:15:3: 'low' is given twice
   15 |   low:
      |   ^^^  first in line 10
models.yaml:17:3: '-bad-' is no model name; use letters, digits and . _ / : - between them
   17 |   -bad-:
      |   ^^^^^
models.yaml:19:12: share must be a part of one GPU such as 0.3, or a size such as 20GiB; found 'x'
   19 |     share: x
      |            ^
models.yaml:20:16: engine training serves no requests
   20 |   tune: {kind: inference, engine: training, weights: 1GB, share: 0.5}
      |                ^^^^^^^^^  write `kind: training`
models.yaml:21:43: the limit 0.4 is below the request 0.5
   21 |   loud: {weights: 1GB, share: 0.5, limit: 0.4}
      |                                           ^^^  raise the limit or lower the share
models.yaml:22:3: bare must be a mapping of settings; found nothing
   22 |   bare:
      |   ^^^^
models.yaml:23:3: half has no 'share'
   23 |   half:
      |   ^^^^  add `share: 0.3`
models.yaml:25:1: unknown setting 'modells'
   25 | modells: 1
      | ^^^^^^^  did you mean 'models'?
""")


def test_the_example_is_the_articles_three_models_and_a_training_job() -> None:
    specs = read_files([ROOT / "examples" / "three-models.yaml"])

    assert [(spec.name, spec.kind, spec.share.request_portion, spec.share.limit_portion) for spec in specs] == [
        ("mistral-7b", "inference", 0.3, 0.4),
        ("nemotron-12b", "inference", 0.4, 0.5),
        ("nemotron-30b", "inference", 0.65, 0.75),
        ("training-job", "training", 0.6, None),
    ]


def test_three_lines_are_a_model() -> None:
    (spec,) = parse("models:\n  chat:\n    weights: 14.5GB\n    share: 0.3\n")

    assert spec == contract.DeploymentSpec(
        name="chat",
        engine=contract.EngineSpec(weights_bytes=14_500_000_000),
        share=contract.ShareSpec(request_portion=0.3),
    )


def test_every_setting_reaches_the_wire() -> None:
    (spec,) = parse(
        """
models:
  chat:
    engine: simulated
    model: mistralai/Mistral-7B
    arguments: {max-model-len: 8192, trust: true}
    weights: 20GiB
    share: {request: 20GiB, limit: 0.4}
    priority: high
    preemptible: true
    kind: inference
    warm: 1h30m
    cold_after: 1d
    parkable: false
    cold_start: 500ms
    minimum_residency: 2s
    return_deadline: 10s
    minimum_grade: driver
"""
    )

    assert spec == contract.DeploymentSpec(
        name="chat",
        engine=contract.EngineSpec(
            model="mistralai/Mistral-7B",
            weights_bytes=20 * 1024**3,
            cold_start_s=0.5,
            arguments={"max-model-len": "8192", "trust": "true"},
        ),
        share=contract.ShareSpec(request_bytes=20 * 1024**3, limit_portion=0.4, minimum_grade="driver"),
        priority="high",
        is_preemptible=True,
        swap=contract.SwapSpec(
            is_parkable=False,
            warm_window_s=5400.0,
            minimum_residency_s=2.0,
            cold_after_s=86400.0,
            return_deadline_s=10.0,
        ),
    )


@pytest.mark.parametrize("words", ["kind: training", "engine: training"])
def test_a_training_job_needs_one_word_only(words: str) -> None:
    (spec,) = parse(f"models:\n  tune: {{weights: 1GB, share: 1, {words}}}\n")

    assert (spec.kind, spec.engine.kind) == ("training", "training")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- a\n", "the file must be a mapping with `models:`; found a list"),
        ("models: {}\n", "models must not be empty"),
        ("models:\n", "models must be a mapping from names to settings; found nothing"),
        ("model: {}\n", "the file has no 'models'"),
        ("models: [\n", f"{START} parsing a flow node expected the node content, but found '<stream end>'"),
        ("models:\n\ta: 1", f"{START} scanning for the next token found character '\\t' that cannot start any token"),
        ("models: &a [*a]\n", "this alias contains itself"),
        ("models:\n  ? [a]\n  : 1\n", "a key must be a plain word"),
        ("models:\n  chat: {weights: 1GB, share: .nan}\n", f"{NO_SHARE} '.nan'"),
        ("models:\n  chat: {weights: 1GB, share: 0}\n", f"{NO_SHARE} '0'"),
        ("models:\n  chat: {weights: 1GB, share: true}\n", f"{NO_SHARE} 'true'"),
        ("models: {a: {share: {request: 1, limit: 1}, limit: 0.5}}", "the limit is given twice: here and in share"),
        ("models:\n  chat: {weights: 1GB, share: {limit: 0.4}}\n", "share has no 'request'"),
        ("models:\n  chat: {weights: 1GB, share: {request: 2}}\n", f"the share's request 2 {MANY_GPUS}"),
        ("models:\n  a: {arguments: {b: []}}\n", "arguments.b must be a text, a number, true or false; found a list"),
        ("models:\n  a: {weights: 99999999999TB, share: 0.3}\n", "99999999999TB is larger than any memory"),
        ("models:\n  a: {warm: 1" + "0" * 400 + "s}\n", "1" + "0" * 56 + "... is longer than any time"),
        ("models:\n  a: {share: 1" + "0" * 400 + "}\n", f"{NO_SHARE} '1" + "0" * 56 + "...'"),
    ],
)  # fmt: skip
def test_mistakes_have_clear_sentences(text: str, message: str) -> None:
    assert message in messages(text)


def test_yaml_is_read_as_version_1_2() -> None:
    """`no` is a word and `010` is ten."""
    (spec,) = parse("models:\n  no: {weights: 1GB, share: 0.3, arguments: {a: no, b: 010}}\n")

    assert spec.name == "no"
    assert spec.engine.arguments == {"a": "no", "b": "10"}


def test_aliases_of_aliases_do_not_fill_memory() -> None:
    rows = ["a: &a0 [1, 1, 1, 1, 1, 1, 1, 1]"]
    rows += [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 12)]

    assert messages("\n".join(rows)) == ["more than 50000 values (aliases count each time)"]


def test_a_folder_is_read_in_the_order_of_names_and_names_are_unique_across_files(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("models:\n  chat: {weights: 1GB, share: 0.3}\n")
    (tmp_path / "a.yml").write_text("models:\n  code: {weights: 1GB, share: 0.3}\n")
    (tmp_path / "notes.txt").write_text("not read")
    again = tmp_path / "again" / "c.yaml"
    again.parent.mkdir()
    again.write_text("models:\n  code: {weights: 1GB, share: 0.3}\n")

    assert [spec.name for spec in read_files([tmp_path])] == ["code", "chat"]
    with pytest.raises(InvalidFiles) as caught:
        read_files([tmp_path, again])
    (problem,) = caught.value.problems
    assert problem.message == "'code' is given twice"
    assert problem.hint == f"first in {tmp_path / 'a.yml'}:2"


def test_files_that_cannot_be_read_are_told_beside_the_mistakes_of_others(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"models:\n  caf\xe9: 1\n")
    (tmp_path / "bad.yaml").write_text("modells: 1\n")
    (tmp_path / "empty").mkdir()

    with pytest.raises(InvalidFiles) as caught:
        read_files([tmp_path / name for name in ("latin.yaml", "bad.yaml", "none.yaml", "empty")])

    told = {(Path(problem.file).name, problem.message) for problem in caught.value.problems}
    assert told >= {
        ("latin.yaml", "not UTF-8 text"),
        ("bad.yaml", "unknown setting 'modells'"),
        ("none.yaml", "cannot be read: No such file or directory"),
        ("empty", "this folder holds no .yaml file"),
    }


def test_the_library_is_as_strict_as_the_file() -> None:
    with pytest.raises(InvalidInput) as caught:
        deployment("chat", weights="14.5GB", share=0.3, limt=0.4, warm="soon")

    assert len(caught.value.facts) == 2
    assert "unknown setting 'limt' - did you mean 'limit'?" in caught.value.facts


def test_a_replica_may_span_gpus_and_say_where_it_goes() -> None:
    text = """
models:
  giant:
    weights: 240GB
    share: 0.9
    gpus: 4
    replicas: 2
    gang: true
    cpu: 16.5
    memory: 64GiB
    gpu_models: [H100, H200]
    node_labels: {zone: a}
    strategy: {node: spread}
    anti_affinity: node
    movable: false
    minimum_runtime: 10m
    preemption_delay: 30s
"""

    (giant,) = parse(text)

    assert (giant.share.gpu_count, giant.replica_count) == (4, 2)
    assert giant.host == contract.HostSpec(cpu_millicores=16_500, memory_bytes=64 * 1024**3)
    assert giant.placement == contract.PlacementSpec(
        gpu_models=("H100", "H200"),
        node_labels={"zone": "a"},
        node_strategy="spread",
        gpu_strategy="binpack",
        anti_affinity="node",
        is_gang=True,
        is_movable=False,
        minimum_runtime_s=600.0,
        preemption_delay_s=30.0,
    )


def test_one_word_is_the_strategy_of_nodes_and_of_gpus() -> None:
    (chat,) = parse("models:\n  chat: {weights: 1GB, share: 0.3, strategy: spread}\n")

    assert (chat.placement.node_strategy, chat.placement.gpu_strategy) == ("spread", "spread")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("gpus: 0", "gpus must be a whole number from 1 to 64; found '0'"),
        ("gpus: 65", "gpus must be a whole number from 1 to 64; found '65'"),
        ("replicas: many", "replicas must be a whole number from 1 to 4096; found 'many'"),
        ("cpu: -1", "cpu must be a number of cores such as 4 or 0.5; found '-1'"),
        ("strategy: pack", "strategy must be binpack or spread, or a mapping with node and gpu; found 'pack'"),
        ("strategy: {nod: spread}", "unknown setting 'nod'"),
        ("anti_affinity: nodes", "unknown anti_affinity 'nodes'; use one of none, gpu, node"),
        ("gpu_models: H100", "gpu_models must be a list of names of GPUs such as [H100, H200]; found 'H100'"),
        ("node_labels: [a]", "node_labels must be a mapping from labels to values; found a list"),
        ("preemption_delay: 30", "preemption_delay must be a duration with its unit, for example 30s; found '30'"),
        ("gang: true", "a gang of one replica is no gang"),
    ],
)
def test_a_wish_that_makes_no_sense_is_told(setting: str, message: str) -> None:
    text = f"models:\n  chat:\n    weights: 1GB\n    share: 0.3\n    {setting}\n"

    assert messages(text) == [message]


def test_every_setting_is_described() -> None:
    settings = schema()["properties"]["models"]["additionalProperties"]["properties"]

    assert [name for name, setting in settings.items() if not setting.get("description")] == []


def test_the_guide_names_every_setting() -> None:
    guide = (ROOT / "docs" / "guides" / "models-file.md").read_text()
    settings = schema()["properties"]["models"]["additionalProperties"]["properties"]

    assert [name for name in settings if f"`{name}`" not in guide] == []


# ---- any text at all -----------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    [
        "models",
        "chat",
        "weights",
        "share",
        "limit",
        "limt",
        "warm",
        "kind",
        "training",
        "0.3",
        "1.5",
        "14.5GB",
        "5m",
        "~",
    ]
)
PUNCTUATION = st.sampled_from(
    [": ", ":\n  ", "\n", "\n    ", ", ", "- ", "? ", "&a ", "*a", "<<: ", "!!int ", *"{}[]'\"#|%\t\x00\u2028"]
)
NEARLY_YAML = st.lists(st.one_of(WORDS, PUNCTUATION), max_size=40).map("".join)


@given(st.one_of(st.text(max_size=200), NEARLY_YAML))
def test_any_text_gives_models_or_mistakes_with_places(text: str) -> None:
    specs, problems = outcome_of(text)

    assert bool(specs) != bool(problems)
    for problem in problems:
        assert problem.message
        assert 0 <= problem.mark.line <= len(LINE_BREAKS.split(text))
        assert problem.render().startswith(f"models.yaml:{problem.mark.line + 1}:{problem.mark.column + 1}: ")


def outcome_of(text: str) -> tuple[list[contract.DeploymentSpec], tuple[Problem, ...]]:
    try:
        return parse(text), ()
    except InvalidFiles as error:
        return [], error.problems


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["14.5GB", "20GiB", "5m", "x", "high", "training"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["request", "limit", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)
SETTINGS = st.sampled_from([*schema()["properties"]["models"]["additionalProperties"]["properties"], "limt"])


@given(st.dictionaries(SETTINGS, VALUES, max_size=6))
def test_any_settings_give_a_wish_or_sentences(settings: dict[str, object]) -> None:
    try:
        body = contract.encode(deployment("chat", **settings))
    except InvalidInput as error:
        body = "".join(error.facts).encode()

    assert body


@given(st.integers(1, 10**6), st.sampled_from(["B", "KB", "MB", "GB", "KiB", "MiB", "GiB"]), st.integers(0, 999))
def test_sizes_and_durations_mean_what_they_say(number: int, unit: str, thousandths: int) -> None:
    factor = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]

    (spec,) = parse(f"models:\n  chat: {{weights: {number}{unit}, share: 0.5, warm: {number}.{thousandths:03}s}}\n")

    assert spec.engine.weights_bytes == number * factor
    assert spec.swap.warm_window_s == pytest.approx(number + thousandths / 1000)


def test_a_control_character_does_not_move_the_caret() -> None:
    document = read_yaml('a: "1\t2"\n', "f")

    assert document.root is not None
    assert document.problem(document.root.key_marks["a"], "here").source == 'a: "1 2"'
