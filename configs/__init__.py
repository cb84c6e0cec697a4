"""One file per experiment: each defines `get_config()` and says in its docstring how to run it."""
