"""The command line as its own parser reads it."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence


def parse(command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """``moe-train command arguments``; ValueError where it would be refused."""
    module = importlib.import_module(f"moe_train.commands.{command}")
    parser = argparse.ArgumentParser(prog=command, allow_abbrev=False, exit_on_error=False)
    module.register(parser)
    try:
        intermixed = getattr(module, "INTERMIXED", False)
        return (parser.parse_intermixed_args if intermixed else parser.parse_args)(list(arguments))
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError(f"{command} {' '.join(arguments)}: {error}") from None
