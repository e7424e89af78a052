"""What our backend relies on is there in the vLLM that is installed; skipped where none is.

The sources are read and not imported, so that neither torch nor a GPU is needed; the last test imports them.
"""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

from tests.integration.test_vllm_plugin import STAND_IN

WHY = "vLLM is not installed here; the plugin was written against 0.33.0 (pip install vllm==0.33.0)"


def installed() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


pytestmark = pytest.mark.skipif(installed() is None, reason=WHY)


@pytest.fixture(params=["installed", "stand-in"])
def root(request: pytest.FixtureRequest) -> Path:
    """The stand-in has to keep what the real one has."""
    found = installed()
    assert found is not None
    return found if request.param == "installed" else STAND_IN / "vllm"


def module(root: Path, name: str) -> ast.Module:
    return ast.parse((root / f"{name}.py").read_text())


def of_class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def parameters(node: ast.ClassDef | ast.Module, name: str) -> list[str]:
    function = next(part for part in ast.walk(node) if isinstance(part, ast.FunctionDef) and part.name == name)
    return [argument.arg for argument in function.args.args]


def attributes(node: ast.ClassDef) -> set[str]:
    """Set on `self` anywhere in the class, or declared in its body."""
    on_self = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
    declared = {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    return on_self | declared


def test_backends_are_registered_by_name_module_and_class(root: Path) -> None:
    factory = of_class(module(root, "device_allocator/sleep_mode_backend"), "SleepModeBackendFactory")

    assert ["cls", "name", "module_path", "class_name"] == parameters(factory, "register_backend")
    assert ["cls", "name"] == parameters(factory, "get_backend_class")


def test_its_own_backend_is_what_ours_extends(root: Path) -> None:
    own = of_class(module(root, "device_allocator/sleep_mode_backend"), "CuMemBackend")

    assert ["self", "level"] == parameters(own, "suspend")
    assert ["self", "tags"] == parameters(own, "resume")
    assert ["self", "tags"] == parameters(own, "discard")
    assert '"runtime", "cudagraph"' in ast.unparse(own).replace("'", '"')


def test_the_allocator_shows_what_it_allocated_and_passes_over_what_sleeps(root: Path) -> None:
    tree = module(root, "device_allocator/cumem")
    allocator = of_class(tree, "CuMemAllocator")

    assert {"pointer_to_data", "python_malloc_callback", "python_free_callback"} <= attributes(allocator)
    assert ["self", "offload_tags"] == parameters(allocator, "sleep")
    assert ["self", "tags"] == parameters(allocator, "wake_up")
    assert parameters(tree, "create_and_map")
    assert parameters(tree, "unmap_and_release")
    assert "init_module" in ast.unparse(tree)
    for method in ("sleep", "wake_up", "discard"):
        body = next(part for part in allocator.body if isinstance(part, ast.FunctionDef) and part.name == method)
        assert "is_asleep" in ast.unparse(body), method


def test_an_allocation_has_its_handle_its_tag_and_whether_it_sleeps(root: Path) -> None:
    tree = module(root, "device_allocator/__init__")

    assert {"handle", "tag", "is_asleep"} <= attributes(of_class(tree, "AllocationData"))
    assert "get_mem_allocator_instance" in ast.unparse(tree)


def test_the_backend_is_chosen_on_the_command_line() -> None:
    found = installed()
    assert found is not None

    assert "--sleep-mode-backend" in (found / "engine" / "arg_utils.py").read_text()
    assert "sleep_mode_backend" in attributes(of_class(module(found, "config/model"), "ModelConfig"))


def test_the_real_factory_knows_our_backend() -> None:
    try:
        factory = importlib.import_module("vllm.device_allocator.sleep_mode_backend").SleepModeBackendFactory
    except ImportError as error:
        pytest.skip(f"vLLM is there but cannot be imported here: {error}")
    from engines.vllm_plugin import BACKEND_NAME, register

    register()
    register()

    assert factory.get_backend_class(BACKEND_NAME).__name__ == "StoreBackend"
