"""The paper's experiments, on the user's data or on stand-ins: ``python -m benchmarks.paper``."""
