"""Stand for a package that is not installed: where it is, Keras loads it for seconds in each process that tests start."""

raise ModuleNotFoundError("left out of processes that tests start", name="matplotlib")
