"""What is imported is declared: each extra of pyproject.toml brings what its modules need, and what is missing is named."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from evennorm.tools.extras import EXTRAS, missing

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"torchvision", "timm"}
"""Whose networks are taken where they are installed."""
OF_OTHERS = {("evennorm.jax.nnx", "flax"), ("evennorm.torch.lightning", "lightning")}
"""Modules of an engine that need a package of another extra."""
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "tensorflow": "tensorflow-cpu", "haiku": "dm-haiku"}


def modules() -> dict[str, Path]:
    paths = (path.relative_to(ROOT / "src") for path in (ROOT / "src" / "evennorm").rglob("*.py"))
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imported(path: Path) -> set[str]:
    """Top-level names of the packages that a file imports anywhere, of others than Python and evennorm."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / "src" / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"evennorm"}


@cache
def declared(extra: str) -> frozenset[str]:
    """Distributions that evennorm[extra] asks for itself."""
    found = {"numpy"}
    for text in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == "evennorm":
            for other in requirement.extras:
                found |= declared(other)
        else:
            found.add(canonicalize_name(requirement.name))
    return frozenset(found)


def test_every_package_that_is_imported_is_in_an_extra() -> None:
    used: dict[str, list[str]] = {}
    for name, path in modules().items():
        for package in imported(path):
            used.setdefault(package, []).append(name)
    assert set(used) - OPTIONAL - {"numpy"} == set(EXTRAS) - OPTIONAL
    for package, extra in EXTRAS.items():
        assert DISTRIBUTIONS.get(package, package).lower() in declared(extra), (package, used.get(package))


@pytest.mark.parametrize(
    ("floor", "extras"),
    [
        ("evennorm.core", set()),
        ("evennorm.numpy", set()),
        ("evennorm.jax", {"jax", "flax"}),
        ("evennorm.flax", {"jax", "flax"}),
        ("evennorm.equinox", {"jax", "equinox"}),
        ("evennorm.haiku", {"jax", "haiku"}),
        ("evennorm.torch", {"torch", "gpu", "lightning"}),
        ("evennorm.tensorflow", {"tensorflow"}),
        ("evennorm.kernels", {"gpu", "jax", "torch", "tensorflow"}),
        ("evennorm.keras", {"keras", "tensorflow"}),
        ("evennorm.cli", {"tools"}),
    ],
)
def test_modules_import_what_their_extra_brings(floor: str, extras: set[str]) -> None:
    allowed = {package for package, extra in EXTRAS.items() if extra in extras} | {"numpy"}
    for name, path in modules().items():
        if name == floor or name.startswith(f"{floor}."):
            assert imported(path) <= allowed, name


def closure(extra: str) -> set[str]:
    """Distributions that are there once evennorm[extra] is installed into an empty environment."""
    found: set[str] = set()
    waiting = [(name, frozenset[str]()) for name in declared(extra)]
    while waiting:
        name, extras = waiting.pop()
        if name in found and not extras:
            continue
        found.add(name)
        try:
            texts = requires(name) or []
        except PackageNotFoundError:
            continue
        for requirement in map(Requirement, texts):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": each}) for each in ("", *extras)):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


ALONE = """
import json, sys
absent = set(json.loads(sys.argv[1]))

class Without:
    def __init__(self, finder):
        self._finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in absent else self._finder.find_spec(name, path, target)
    def __getattr__(self, name):  # what finds the metadata of distributions, as plotly asks for its version
        return getattr(self._finder, name)

sys.meta_path[:] = [Without(finder) if hasattr(finder, "find_spec") else finder for finder in sys.meta_path]
"""

IMPORTS = """
import importlib
from evennorm.errors import MissingExtra
failed = {}
for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except ImportError as error:
        cause = error
        while isinstance(cause, MissingExtra):
            cause = cause.__cause__
        failed[name] = (cause.name or str(cause)).split(".")[0]
    except SystemExit:  # of the command, without click
        failed[name] = "click"
print(json.dumps(failed))
"""


def alone(extra: str, program: str, *arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a program that sees the packages of one extra alone."""
    there = closure(extra) | (closure("jax") if extra == "keras" else set())  # Keras is nothing without an engine
    absent = {
        package
        for package, distributions in packages_distributions().items()
        if not {canonicalize_name(name) for name in distributions} & there and package not in sys.stdlib_module_names
    }
    absent = (absent | set(without)) - {"evennorm", "scripts", "tests"}
    absent = {package for package in absent if not package.startswith("_")}
    return subprocess.run(
        [sys.executable, "-c", ALONE + program, json.dumps(sorted(absent)), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": "", "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


@pytest.mark.parametrize("extra", ["jax", "torch", "tensorflow", "keras", "flax", "equinox", "haiku", "tools"])
def test_with_one_extra_alone(extra: str) -> None:
    """Whatever fails names a package of another extra; what this extra's modules need is there."""
    floors = {"tools": "evennorm.cli"}
    floor = floors.get(extra, f"evennorm.{extra}")
    names = [name for name in modules() if not name.startswith("evennorm.kernels.triton") and not name.endswith("__main__")]
    done = alone(extra, IMPORTS, json.dumps(names))
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    ours = {package for package, its in EXTRAS.items() if its == extra} | {"numpy"}
    for name, package in failed.items():
        assert package in EXTRAS, (name, package)
        assert package not in ours, (name, package)
        inside = name == floor or name.startswith(f"{floor}.")
        assert not inside or (name, package) in OF_OTHERS, (name, package)


COMMAND = """
sys.argv = ["evennorm", *sys.argv[2:]]
from evennorm.cli import main
main()
"""


@pytest.mark.parametrize(
    ("extra", "without", "arguments", "words"),
    [
        ("tools", (), ("compare",), "needs the package keras, which is not installed"),
        ("demo", ("scipy",), ("compare",), "needs the package scipy, which is not installed"),
        ("demo", ("scipy",), ("compare",), "pip install 'evennorm[tools]'"),
        ("tools", (), ("bench", "--network"), "needs the package torch, which is not installed"),
        ("tools", (), ("migrate", "old.h5", "-o", "new.keras"), "needs the package keras, which is not installed"),
        ("tools", ("rich",), ("explain", "--shape", "32,10"), "needs the package rich, which is not installed"),
    ],
)
def test_a_missing_package_is_named(extra: str, without: tuple[str, ...], arguments: tuple[str, ...], words: str) -> None:
    done = alone(extra, COMMAND, *arguments, without=without)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert words in line


def test_packages_of_others_are_not_ours() -> None:
    assert missing("x", ModuleNotFoundError(name="module_of_the_user")) is None
    assert "pillow" in str(missing("x", ModuleNotFoundError(name="PIL.Image")))
