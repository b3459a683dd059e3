"""Nobody pays for a framework that they did not ask for, and a missing one is named."""

import importlib
import json
import os
import subprocess
import sys

import pytest

HEAVY = (
    "numpy",
    "jax",
    "equinox",
    "flax",
    "haiku",
    "torch",
    "triton",
    "tensorflow",
    "keras",
    "optuna",
    "click",
    "rich",
    "matplotlib",
    "sklearn",
    "PIL",
)


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


FRAMEWORKS = ("equinox", "flax", "haiku", "jax", "keras", "numpy", "tensorflow", "torch")


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_submodules_are_found_after_import_evennorm(name: str) -> None:
    """Each is loaded when it is first asked for, and none before."""
    before = f"import sys, evennorm\nassert not [name for name in {FRAMEWORKS} if name in sys.modules]\n"
    asked = f"assert evennorm.{name} is sys.modules['evennorm.{name}']\nassert 'evennorm.{name}' in repr(evennorm.{name})"
    assert name in loaded_by(f"{before}{asked}")


def test_what_dir_shows() -> None:
    """The public API, submodules among it where their frameworks are installed; looking loads nothing."""
    import evennorm

    assert dir(evennorm) == sorted([*evennorm.__all__, *FRAMEWORKS])
    assert loaded_by("import evennorm; assert 'torch' in dir(evennorm)") == []
    statement = "import evennorm; assert 'torch' not in dir(evennorm) and 'jax' in dir(evennorm)"
    assert loaded_by(statement, without=("torch",)) == []


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_what_dir_shows_of_a_framework(name: str) -> None:
    module = importlib.import_module(f"evennorm.{name}")
    assert dir(module) == sorted(module.__all__)


def test_a_name_that_is_not_there() -> None:
    import evennorm

    with pytest.raises(AttributeError, match="module 'evennorm' has no attribute 'troch'"):
        evennorm.troch  # noqa: B018
    assert not hasattr(evennorm, "optuna")


def test_help_with_numpy_alone() -> None:
    """It looks at all that dir names."""
    others = [name for name in FRAMEWORKS if name != "numpy"]
    statement = "import evennorm, pydoc; text = pydoc.render_doc(evennorm); assert 'set_num_threads(' in text, text"
    assert loaded_by(statement, without=(*others, "optuna")) == ["numpy"]


def test_errors_stand_in_the_package() -> None:
    import evennorm
    from evennorm import errors

    raised = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.EvennormError)
    ]
    assert errors.ShapeError in raised
    assert all(getattr(evennorm, error.__name__) is error for error in raised)
    assert set(evennorm.__all__) >= {error.__name__ for error in raised}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("import evennorm.tensorflow", "import tensorflow"), ("import evennorm.keras", "import keras")],
)
def test_frameworks_that_load_others_themselves(ours: str, theirs: str) -> None:
    """Keras loads plotting and scikit-learn where they are installed, TensorFlow loads Keras; we add nothing to that."""
    added = f"{theirs}\nbefore = set(sys.modules)\n{ours}\nfor name in before.intersection({HEAVY}): del sys.modules[name]"
    assert loaded_by(added) == []


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
        ("evennorm.flax", "flax", "flax"),
        ("evennorm.equinox", "equinox", "equinox"),
        ("evennorm.haiku", "haiku", "haiku"),
    ],
)
def test_a_missing_framework_is_named_with_the_way_to_get_it(module: str, framework: str, extra: str) -> None:
    statement = (
        f"try:\n    import {module}\nexcept ImportError as error:\n    text = str(error)\n"
        f"assert {module!r} in text and \"pip install 'evennorm[{extra}]'\" in text, text"
    )
    loaded_by(statement, without=(framework,))


def test_keras_without_its_backend_is_told_of_another() -> None:
    """What a user meets who has installed evennorm[keras,jax], and has not set KERAS_BACKEND."""
    code = "import sys; sys.modules['tensorflow'] = None; {}import evennorm.keras"
    for absent, told in (
        ("", "or set KERAS_BACKEND=jax, which"),
        ("sys.modules['jax'] = None; ", "or set KERAS_BACKEND=torch, w"),
    ):
        variables = {**os.environ, "KERAS_BACKEND": "tensorflow"}
        run = subprocess.run([sys.executable, "-c", code.format(absent)], capture_output=True, text=True, env=variables)
        assert run.returncode == 1
        said = run.stderr.splitlines()[-1]
        assert (
            "needs the package tensorflow, which is not installed; install it with: pip install 'evennorm[tensorflow]'"
            in said
        )
        assert told in said


def test_the_command_without_click() -> None:
    run = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['click'] = None; import evennorm.cli"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "pip install 'evennorm[tools]'" in run.stderr
    assert "Traceback" not in run.stderr
