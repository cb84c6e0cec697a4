"""Host code imports no jax. Grain does by itself, so the modules that need it are only read."""

import ast
import subprocess
import sys
from pathlib import Path

import cli_jax

PACKAGE = Path(cli_jax.__file__).parent
HOST = ("image", "text", "data")
DEVICE = {"jax", "jaxlib", "flax", "optax", "orbax"}
GRAIN = {"bin_stream", "stream", "pipeline"}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_host_module_imports_a_device_library():
    files = [file for package in HOST for file in sorted((PACKAGE / package).glob("*.py"))]
    assert len(files) > 10
    for file in files:
        roots = {name.split(".")[0] for name in imported(file)}
        assert not roots & DEVICE, file
        assert ("grain" in roots) == (file.stem in GRAIN), file
        ours = {name.split(".")[1] for name in imported(file) if name.startswith("cli_jax.")}
        assert ours <= {"batch", "config", "experiment", "flag_parser", *HOST}, file


def test_importing_host_code_loads_no_jax():
    names = [
        f"cli_jax.{package}.{file.stem}"
        for package in HOST
        for file in sorted((PACKAGE / package).glob("*.py"))
        if file.stem not in {"__init__", *GRAIN}
    ]
    code = f"import sys, {', '.join(names)}; print('jax' in sys.modules, len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
