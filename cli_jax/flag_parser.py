"""How the commands parse their flags."""

from __future__ import annotations

import sys

from absl import app


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; a `--config.` name that does not exist is one line, not a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        reason = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error.args[0]
        sys.exit(f"error: unknown name in a --config flag: {' '.join(str(reason).split())}")
