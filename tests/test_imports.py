"""Nobody pays for a framework that they did not ask for, and a missing one is named."""

import json
import subprocess
import sys

import pytest

HEAVY = ("numpy", "jax", "torch", "triton", "tensorflow", "keras", "optuna", "click", "rich", "matplotlib", "sklearn", "PIL")


def loaded_by(statement: str, *, without: tuple[str, ...] = ()) -> list[str]:
    """Which of the heavy packages a fresh interpreter holds after a statement; those in `without` cannot be imported."""
    code = (
        f"import json, sys\nfor name in {without!r}: sys.modules[name] = None\n{statement}\n"
        f"print(json.dumps([n for n in {HEAVY!r} if sys.modules.get(n)]))"
    )
    return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("statement", "packages"),
    [
        ("import evennorm", []),
        ("from evennorm import Geometry; Geometry((2, 3)).explain()", []),
        ("import evennorm.numpy", ["numpy"]),
        ("import evennorm.jax", ["numpy", "jax"]),
        ("import evennorm.torch", ["numpy", "torch"]),
        ("import evennorm.tools.explain", ["numpy"]),
        ("import evennorm.kernels, evennorm.kernels.reference", []),
    ],
)
def test_what_an_import_loads(statement: str, packages: list[str]) -> None:
    assert loaded_by(statement) == packages


def test_the_package_itself_costs_next_to_nothing() -> None:
    """Nothing but the standard library and its own few modules, less than NumPy alone loads."""
    code = "import json, sys; before = set(sys.modules); import evennorm; print(json.dumps([*set(sys.modules) - before]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = json.loads(run.stdout)
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"evennorm"}
    assert len(loaded) < 100


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("import evennorm.tensorflow", "import tensorflow"), ("import evennorm.keras", "import keras")],
)
def test_frameworks_that_load_others_themselves(ours: str, theirs: str) -> None:
    """Keras loads plotting and scikit-learn where they are installed, TensorFlow loads Keras; we add nothing to that."""
    assert set(loaded_by(ours)) <= {*loaded_by(theirs), "numpy"}


def test_the_command_is_quick_to_speak() -> None:
    loaded = loaded_by(
        "import sys; sys.argv = ['evennorm', '--help']\nfrom evennorm.cli import main\n"
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n    main(standalone_mode=False)"
    )
    assert not {"jax", "torch", "tensorflow", "keras", "optuna", "matplotlib", "sklearn"} & set(loaded)


@pytest.mark.parametrize(
    ("module", "framework", "extra"),
    [
        ("evennorm.jax", "jax", "jax"),
        ("evennorm.torch", "torch", "torch"),
        ("evennorm.tensorflow", "tensorflow", "tensorflow"),
        ("evennorm.keras", "keras", "keras"),
    ],
)
def test_a_missing_framework_is_named_with_the_way_to_get_it(module: str, framework: str, extra: str) -> None:
    statement = (
        f"try:\n    import {module}\nexcept ImportError as error:\n    text = str(error)\n"
        f"assert {module!r} in text and \"pip install 'evennorm[{extra}]'\" in text, text"
    )
    loaded_by(statement, without=(framework,))


def test_the_command_without_click() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['click'] = None; import evennorm.cli"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "pip install 'evennorm[tools]'" in run.stderr
    assert "Traceback" not in run.stderr
