"""Honest side-by-side comparisons of fusion strategies: `python analyze.py compare --help`."""
