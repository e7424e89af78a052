"""Every service folder looks alike, so that whoever knows one finds their way in all."""

import ast
from pathlib import Path

from tests.architecture.sources import listing, read, service_folders, tracked_files, tree_of

ANATOMY = ("__init__.py", "core.py", "state.py", "settings.py", "README.md")
# What a service may lack, with the reason.
MAY_LACK = {
    "broker": {"state.py": "it writes no facts; what it holds is the driver's and the kernel's"},
    "gateway": {"state.py": "it writes no facts; its tables are views of what others wrote"},
    "holder": {"state.py": "what it holds is the kernel's: processes, descriptors, pages"},
}
# Folders in services/ that are not services, with the reason.
NOT_SERVICES = {
    "local": "starts the services on one host, for development",
    "provision": "runs before the services of an installation in containers, and ends",
    "swarm": "draws and checks runs of all services in virtual time",
}
REGISTRY = Path("services/registry.py")


def test_every_service_has_the_anatomy() -> None:
    tracked = set(tracked_files())
    found = [
        f"services/{service}/{part}"
        for service in service_folders()
        if service not in NOT_SERVICES
        for part in ANATOMY
        if Path("services", service, part) not in tracked and part not in MAY_LACK.get(service, {})
    ]

    assert not found, (
        "missing; copy the shape of services/placement, or, where that cannot be, add it to MAY_LACK here with "
        "the reason:" + listing(found)
    )


def test_every_service_is_in_the_registry() -> None:
    """Compose, the supervisor, the simulation, permissions and docs read it; what is not in it does not run."""
    services = [name for name in service_folders() if name not in NOT_SERVICES]
    known = names_in(REGISTRY) if REGISTRY in tracked_files() else set(services)
    found = [name for name in services if name not in known]

    assert not found, "folders in services/ without a line in services/registry.py; add one each:" + listing(found)


def test_every_exception_is_still_needed() -> None:
    tracked = set(tracked_files())
    found = [
        f"services/{service}/{part}"
        for service, parts in MAY_LACK.items()
        for part in parts
        if Path("services", service, part) in tracked
    ]

    assert not found, "these exist after all; take them out of MAY_LACK here:" + listing(found)


def names_in(path: Path) -> set[str]:
    """Every word that stands in a string, an import or an identifier of this module."""
    words: set[str] = set()
    for node in ast.walk(tree_of(path)):
        match node:
            case ast.Constant(value=str(text)):
                words.update(text.replace(".", " ").split())
            case ast.ImportFrom(module=str(module), names=names):
                words.update(module.split("."), (alias.name for alias in names))
            case ast.Import(names=names):
                words.update(part for alias in names for part in alias.name.split("."))
    return words


def test_service_readmes_fit_on_one_screen() -> None:
    lines_max = 80
    found = [
        f"{path}: {lines} lines"
        for path in (Path("services", service, "README.md") for service in service_folders())
        if path in tracked_files() and (lines := read(path).count("\n")) > lines_max
    ]

    assert not found, f"longer than {lines_max} lines; move the hard part into design.md beside it:" + listing(found)
