"""Say what is installed, whether it works, and what to do about what is missing.

Exit code 1 if training cannot work.
"""

from __future__ import annotations

import argparse


def register(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> int:
    from moe_train.launch.doctor import examine

    missing = 0
    for finding in examine():
        print(f"{finding.state:<8}{finding.name:<16}{finding.text}", flush=True)
        if finding.advice:
            print(f"{'':<24}-> {finding.advice}", flush=True)
        missing += finding.state == "missing"
    print("Everything that training needs is here." if not missing else f"{missing} missing: see the arrows above.")
    return 1 if missing else 0
