"""The architecture, held by tests: who imports whom, how much, and what stands at the door."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import shields

ROOT = Path(__file__).parents[1]
PACKAGES = ("shields", "trainers", "robustness")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
#: what wraps other people's packages is loaded when a name is looked up, never at import
HEAVY = (
    "cv2", "diffusers", "facenet_pytorch", "h5py", "kornia", "lightning", "lpips",
    "pyarrow", "pytorch_grad_cam", "pytorch_lightning", "spandrel", "torchmetrics", "torchvision",
    "transformers",
)  # fmt: skip
#: the core from bottom to top; a module may import those of its own and of lower layers
LAYERS = (
    {"errors", "files", "registry"},
    {"card"},
    {"types"},
    {"budget"},
    {
        "codec",
        "faces",
        "jpeg",
        "masks",
        "photo",
        "provenance",
        "transforms",
        "visibility",
        "weights",
    },
    {"models"},
    {"metrics", "pgd"},
    {"protectors"},
    {"shield", "verify"},
    {"folders", "sheet", "spread"},
    {"batch"},
    {"cli", "cli_check", "cli_common", "cli_models", "cli_protect", "cli_spread", "cli_verify"},
)


def module_name(path: Path) -> str:
    """`shields/models/base.py` -> `shields.models.base`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Modules and names that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> int | None:
    """Height of a module of the core; None for what is not one."""
    parts = name.split(".")
    if parts[0] != "shields" or len(parts) == 1:
        return None
    return next((height for height, names in enumerate(LAYERS) if parts[1] in names), None)


def test_every_module_of_the_core_has_a_layer() -> None:
    names = {module_name(path) for path in ROOT.glob("shields/**/*.py")} - {"shields"}
    assert {name for name in names if layer(name) is None} == set()


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if layer(module_name(path)) is not None], ids=module_name
)
def test_imports_point_downwards(path: Path) -> None:
    name = module_name(path)
    height = layer(name)
    assert height is not None
    for other in imports(path):
        reached = layer(other)
        assert reached is None or reached <= height, f"{name} imports {other}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_packages_keep_their_distance(path: Path) -> None:
    own = module_name(path).partition(".")[0]
    forbidden = {"shields": {"trainers", "robustness"}, "trainers": {"robustness"},
                 "robustness": {"trainers"}}[own]  # fmt: skip
    reached = {name.partition(".")[0] for name in imports(path)}
    assert not reached & forbidden
    if own != "trainers":
        assert not reached & {"pytorch_lightning", "lightning"}


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=module_name)
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if path.parts[-2] == "shields"], ids=module_name
)
def test_exported_names_are_sorted_and_exist(path: Path) -> None:
    module = import_module(module_name(path))
    names = list(module.__all__) if path.name != "__main__.py" else []
    constants = [name for name in names if name.isupper()]
    classes = [name for name in names if not name.isupper() and name[0].isupper()]
    others = [name for name in names if not name[0].isupper()]
    assert names == sorted(constants) + sorted(classes) + sorted(others)
    assert [name for name in names if not hasattr(module, name)] == []


def test_the_front_door_and_its_lazy_table_are_equal() -> None:
    lazy = {name for names in shields._HOMES.values() for name in names}
    assert lazy | {"Report", "__version__", "verify"} == set(shields.__all__)
    for home, names in shields._HOMES.items():
        for name in names:
            assert getattr(shields, name) is getattr(import_module(home), name)
    with pytest.raises(AttributeError, match="no attribute 'Shiled'"):
        _ = shields.Shiled


def loaded_after(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after a statement."""
    script = f"import sys\n{statement}\nsys.stdout.write('\\n@' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.rpartition("@")[2].split()}


HELP = "from shields.cli import app\napp(['{}', '--help'], standalone_mode=False)"


@pytest.mark.parametrize(
    "statement",
    [
        "import shields",
        "import shields.cli",
        "from shields.cli import app\napp(['--help'], standalone_mode=False)",
        HELP.format("protect"),
        HELP.format("models"),
    ],
)
def test_the_front_door_and_the_help_are_light(statement: str) -> None:
    assert not loaded_after(statement) & {*HEAVY, "torch"}


def test_all_of_the_core_loads_without_the_packages_it_wraps() -> None:
    statement = "import shields\nfor name in shields.__all__: getattr(shields, name)"
    assert not loaded_after(statement) & set(HEAVY)
    command = "import shields.cli_protect, shields.cli_verify, shields.cli_models"
    assert not loaded_after(command) & set(HEAVY)


def test_the_readme_lists_every_protector() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in shields.PROTECTORS if f"| `{name}` |" not in readme] == []
