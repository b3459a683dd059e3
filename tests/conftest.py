"""What holds for all tests: the engine of Keras, quiet frameworks, repeatable examples."""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "agg")

from hypothesis import settings

settings.register_profile("evennorm", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("evennorm")

pytest_plugins = ["pytester"]
