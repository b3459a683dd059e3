"""Measuring on a GPU: which arrays, who takes part, the device's time, and a whole network. `benchmarks/gpu.py` runs it."""
