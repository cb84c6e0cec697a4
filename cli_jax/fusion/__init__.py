"""How vision meets language: one strategy per file, one line each in `registry.py`."""
