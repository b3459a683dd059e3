"""Measure on a GPU: which arrays, which contestants, the device's time, and whole networks. `benchmarks/gpu.py` runs it."""
