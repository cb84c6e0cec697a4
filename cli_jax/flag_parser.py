"""How the commands parse their flags."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from cli_jax.experiment import ConfigError


def parse(argv: list[str]) -> list[str]:
    """Parses the flags; a `--config.` name that does not exist is one line, not a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        sys.exit(f"error: {_unknown_name(error)}")


def read_config(path: str, changes: Sequence[str]) -> ConfigDict:
    """The config of a file, with `changes` such as `--config.seed=1`; raises ConfigError.

    For commands whose own options are not absl's.
    """
    values = flags.FlagValues()
    argv = [sys.argv[0], f"--config={path}", *changes]
    config_flags.DEFINE_config_file(
        "config", None, "", lock_config=True, flag_values=values, sys_argv=argv
    )
    try:
        left = values(argv)
        if left[1:]:
            raise ConfigError(f"unknown arguments: {' '.join(left[1:])}")
        values.config.lock()  # raises if the file could not be read
        return values.config
    except (AttributeError, KeyError) as error:
        raise ConfigError(_unknown_name(error)) from None
    except (flags.Error, OSError, TypeError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _unknown_name(error: Exception) -> str:
    reason = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error.args[0]
    return f"unknown name in a --config flag: {' '.join(str(reason).split())}"
