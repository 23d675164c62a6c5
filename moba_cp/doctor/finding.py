"""What a check found: one line."""

from collections.abc import Callable
from dataclasses import dataclass

WRONG = 3
"""Exit code where a check failed."""


@dataclass(frozen=True)
class Finding:
    """The verdict of one check."""

    name: str
    passed: bool
    text: str
    """What was seen."""
    fix: str = ""
    """What to do about it, where the check failed."""

    def __str__(self) -> str:
        tail = f"; {self.fix}" if self.fix and not self.passed else ""
        return f"{'PASS' if self.passed else 'FAIL'}  {self.name:12}  {self.text}{tail}"


def guarded(name: str, check: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    """What ``check`` finds; an error of its own is a failure too, and keeps no other check from being made."""
    try:
        found = check()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return [Finding(name, False, f"{type(error).__name__}: {lines[0]}", "the check itself could not be made")]
    return found if isinstance(found, list) else [found]
