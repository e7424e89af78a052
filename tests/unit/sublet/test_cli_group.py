"""The command line as a whole: what it imports, what its help says, how a typo is met."""

import subprocess
import sys
from pathlib import Path

import click
import pytest

from sublet.cli import EXIT_CODES, VERBS, cli
from sublet.cli.session import Verb
from tests.unit.sublet.fakes import FakeControlPlane, run

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[3]
HEAVY = ("rich", "jsonschema", "ruamel", "nats", "msgspec", "asyncio", "aiohttp")
IMPORTED = """
import sys
from sublet.cli import cli
try:
    cli({words!r}, prog_name="sublet")
except SystemExit:
    pass
print(",".join(name for name in {heavy!r} if name in sys.modules), file=sys.stderr)
"""


def imported_by(*words: str, heavy: tuple[str, ...]) -> str:
    """Which of the heavy libraries this command line loads, comma-separated."""
    code = IMPORTED.format(words=list(words), heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1]


def test_help_imports_nothing_heavy() -> None:
    assert imported_by("--help", heavy=HEAVY) == ""


def test_ps_imports_neither_yaml_nor_schemas_nor_aiohttp() -> None:
    """Even where it ends with an error, because nobody listens."""
    words = ("--context", "/dev/null", "ps")

    assert imported_by(*words, heavy=("rich", "jsonschema", "ruamel", "aiohttp")) == ""


def commands() -> list[tuple[str, click.Command]]:
    """Every verb with its path, those of groups too."""
    found = []
    context = click.Context(cli)
    for name in VERBS:
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += [(f"{name} {child}", command.commands[child]) for child in command.commands]
        else:
            found.append((name, command))
    return found


@pytest.mark.parametrize(("path", "command"), commands())
def test_every_verb_opens_with_two_examples_and_knows_json(path: str, command: click.Command) -> None:
    assert isinstance(command, Verb)
    assert len(command.examples) == 2
    assert all(f"sublet {path}" in example for example in command.examples)
    assert {"is_json", "is_debug"} <= {parameter.name for parameter in command.params}


def test_help_names_every_verb_and_exit_code() -> None:
    result = run(FakeControlPlane(), "--help")

    assert result.exit_code == 0
    assert all(f"\n  {name} " in result.stdout for name in VERBS)
    assert all(f"  {code} " in result.stdout for code in EXIT_CODES)


def test_help_of_a_verb_shows_its_examples_before_its_options() -> None:
    text = run(FakeControlPlane(), "apply", "--help").stdout

    assert 0 < text.index("sublet apply -f models.yaml") < text.index("Options:")


@pytest.mark.parametrize(
    ("words", "said"),
    [(["pss"], "Did you mean 'ps'?"), (["ps", "--wid"], "--wide"), (["deploy"], "MODEL"), (["keys", "lss"], "ls")],
)
def test_a_typo_is_wrong_use_with_a_suggestion(words: list[str], said: str) -> None:
    result = run(FakeControlPlane(), *words)

    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_the_docs_name_every_verb_and_exit_code() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()

    assert [path for path, _ in commands() if f"## `sublet {path}`" not in page] == []
    assert [code for code in EXIT_CODES if f"| {code} |" not in page] == []


@pytest.mark.parametrize("words", [[], ["keys"]])
def test_without_a_verb_help_is_shown(words: list[str]) -> None:
    result = run(FakeControlPlane(), *words)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("Usage: sublet")


def test_version_is_told_also_from_a_checkout() -> None:
    result = run(FakeControlPlane(), "--version")

    assert result.exit_code == 0
    assert result.stdout.strip()


def test_a_bug_of_ours_is_one_sentence(tmp_path: Path) -> None:
    plane = FakeControlPlane()
    plane.steps = []

    result = run(plane, "ps")

    assert result.exit_code == 1
    assert result.stderr.startswith("error[internal]: IndexError")


def test_completion_knows_verbs_and_their_options() -> None:
    verbs = completions("sublet p")
    options = completions("sublet ps --w")

    assert {"ps", "park"} <= verbs
    assert {"--wide", "--watch"} <= options


def completions(line: str) -> set[str]:
    environ = {"_SUBLET_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    code = "from sublet.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    return {row.partition(",")[2] for row in done.stdout.splitlines()}
