"""For all tests: the CPU, unless asked for an accelerator (`JAX_PLATFORMS=cuda pytest -m gpu`)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported, and for child processes
