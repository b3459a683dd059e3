#!/usr/bin/env python3
"""Build an sdist and from it a wheel, in isolation, and try the wheel in clean environments. Run by `make release-check`.

    .ci/release_check.py numpy jax      also: torch, tensorflow, all
    .ci/release_check.py numpy@python3.12 numpy@python3.13      by other Pythons

The wheel that the first Python from 3.12 on has built serves all later ones, by the stable ABI, and is tried so.
What is made goes to build/release, which is cleared first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "release"
ENVIRONMENTS = {
    "numpy": "",
    "jax": "[keras,jax,tools]",
    "torch": "[torch,tools]",
    "tensorflow": "[keras,tensorflow,tools]",
    "all": "[keras,jax,flax,torch,tensorflow,tools]",
}
PARTS = (
    "tools/check/findings/BN101.md",
    "kernels/_cpu.",
    "kernels/_xla.",
    "kernels/_tensorflow.",
    "py.typed",
    "kernels/_cpu.pyi",
    "kernels/_xla.pyi",
)
LICENSES = ("licenses/LICENSE", "licenses/native/third_party/xla/LICENSE")

SMOKE = """
import numpy as np, evennorm
from evennorm.tools import doctor
from evennorm.tools.doctor.text import lines
y, _ = evennorm.numpy.batch_norm(np.arange(8.0).reshape(4, 2), axis=-1, epsilon=0.0)
np.testing.assert_allclose(y.std(0), 1.0)
doctor.SECONDS = 900  # the first import of a framework that has just been installed takes minutes on a busy machine
found = doctor.diagnose()
print(*lines(found), sep="\\n")
assert found.served, "compiled kernels do not serve all that is installed"
"""

FILES = """
import keras, numpy as np
from keras import layers
keras.Sequential(
    [keras.Input((8,)), layers.Dense(4), layers.BatchNormalization(), layers.ReLU(), layers.Dense(2, "softmax")]
).save("net.keras")
x = np.random.default_rng(0).normal(size=(120, 8)).astype("float32")
np.savez("data.npz", x=x, y=(x.sum(1) > 0).astype("int64"))
"""
COMMANDS = (
    "check net.keras --data data.npz --exit-zero",
    "fold net.keras -o folded.keras --data data.npz --no-speed",
    "compare --engine tensorflow --data data.npz --model net.keras --placements none,before --repeats 2 --epochs 1",
)
"""What the command line does with a Keras model where TensorFlow is the only framework."""


def run(*words: str | Path, home: Path = HOME, **variables: str) -> None:
    print("$", *(str(word).strip().split("\n")[0] for word in words), flush=True)
    subprocess.run([*map(str, words)], cwd=home, check=True, env={**os.environ, **variables})


def must(condition: bool, words: str) -> None:
    if not condition:
        sys.exit(f"release-check: {words}")


def source() -> Path:
    """The sdist."""
    run(sys.executable, "-c", f"from scikit_build_core.build import build_sdist; build_sdist({str(HOME)!r})", home=ROOT)
    (sdist,) = HOME.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    must(any(name.endswith("native/third_party/xla/xla/ffi/api/ffi.h") for name in names), "the sdist lacks XLA's headers")
    must(not any("/.venv/" in name or "/build/" in name for name in names), "the sdist holds what was built here")
    return sdist


def build(sdist: Path, python: str) -> Path:
    """The wheel, from the sdist alone, with nothing at hand but what pyproject.toml requires."""
    before = set(HOME.glob("*.whl"))
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", HOME, sdist)
    (wheel,) = set(HOME.glob("*.whl")) - before
    look(wheel)
    audit(wheel)
    return wheel


def abi(python: str) -> str:
    """What tells the wheels apart: cp311, or abi3 of all later ones."""
    asked = "import sys; print(sys.version_info.minor)"
    minor = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout
    return f"cp3{minor.strip()}" if int(minor) < 12 else "abi3"


def look(wheel: Path) -> None:
    """Parts, licenses and metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    for part in PARTS:
        must(any(name.startswith(f"evennorm/{part}") for name in names), f"the wheel lacks evennorm/{part}")
    for tool in ("compare", "check"):
        must(f"evennorm/tools/{tool}/page.html.j2" in names, f"the wheel lacks the template of the page of {tool}")
    for text in LICENSES:
        must(any(name.endswith(text) for name in names), f"the wheel lacks {text}")
    must(not any("_torch_" in name for name in names), "the wheel holds an extension that serves one torch alone")
    head = Parser().parsestr(metadata)
    must(head["License-Expression"] == "Apache-2.0", "the license is not said")
    must(head["Description-Content-Type"] == "text/markdown", "the README is no Markdown")
    must(f"evennorm-{head['Version']}-" in wheel.name, "the wheel is named after another version")
    print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(names)} files")


def audit(wheel: Path) -> None:
    """The oldest Linux that the wheel runs on, as auditwheel reads it from the symbols of its libraries."""
    if sys.platform != "linux":
        return
    home = HOME / "audit"
    run(sys.executable, "-m", "venv", "--clear", home)
    run(home / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "auditwheel")
    run(home / "bin" / "auditwheel", "show", wheel)


def attempt(wheel: Path, name: str, base: str = sys.executable) -> None:
    """Install the wheel into an environment of its own, and try the doctor and the commands there."""
    home = HOME / f"{name}-{Path(base).resolve().name}"
    run(base, "-m", "venv", "--clear", home)
    python = home / "bin" / "python"
    quiet = ("--quiet", "--disable-pip-version-check", "--constraint", ROOT / "constraints.txt")
    run(python, "-m", "pip", "install", *quiet, f"{wheel}{ENVIRONMENTS[name]}")
    backend = {"tensorflow": "tensorflow"}.get(name, "jax")
    run(python, "-c", SMOKE, KERAS_BACKEND=backend)
    command = subprocess.run([home / "bin" / "evennorm", "--version"], cwd=HOME, capture_output=True, text=True)
    if "tools" in ENVIRONMENTS[name]:
        must(command.returncode == 0, f"evennorm --version failed: {command.stderr}")
        run(home / "bin" / "evennorm", "explain", "--shape", "32,3")
        run(home / "bin" / "evennorm", "check", "--explain", "BN101")
        if name == "tensorflow":
            on_tensorflow(python)
    else:
        must("pip install 'evennorm[tools]'" in command.stderr, f"evennorm without click said {command.stderr!r}")
    shutil.rmtree(home)  # gigabytes, with torch and TensorFlow in it


def on_tensorflow(python: Path) -> None:
    """Check, fold and compare a Keras model; each says what it does, and fails with another exit code than 0."""
    home = HOME / "commands"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    run(python, "-c", FILES, home=home, KERAS_BACKEND="tensorflow")
    for words in COMMANDS:
        run(python, "-m", "evennorm", *words.split(), home=home, KERAS_BACKEND="tensorflow")
    must((home / "folded.keras").exists(), "evennorm fold wrote no model")
    must(any(home.glob("evennorm-runs/*/summary.json")), "evennorm compare wrote no summary")
    shutil.rmtree(home)


def main() -> None:
    names = sys.argv[1:] or ["numpy", "jax"]
    wanted = [(name.partition("@")[0], name.partition("@")[2] or sys.executable) for name in names]
    must(
        {name for name, _ in wanted} <= set(ENVIRONMENTS),
        f"environments are {', '.join(ENVIRONMENTS)}, or with @PYTHON behind one; received {' '.join(names)}",
    )
    for _, python in wanted:
        must(shutil.which(python) is not None, f"no such Python: {python}")
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True)
    sdist, wheels = source(), {}
    for name, python in wanted:
        kind = abi(python)
        wheels[kind] = wheels.get(kind) or build(sdist, python)
        attempt(wheels[kind], name, python)
    print(f"release-check: {', '.join(wheel.name for wheel in wheels.values())} serve in {', '.join(names)}")


if __name__ == "__main__":
    main()
