"""What a check of the machine found, and the probes that checks are made of."""

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

from packaging.requirements import Requirement

Status = Literal["ok", "missing", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `missing`: not there, `problem`: there but unfit.

    Both come with what the gap `prevents` and how to `fix` it. `needed` marks what export, `build --target cpu` and
    run cannot do without.
    """

    name: str
    status: Status
    found: str
    prevents: str = ""
    fix: str = ""
    needed: bool = False


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, None without one."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def requirements(extra: str = "") -> list[Requirement]:
    """What the project asks for on this machine: always, or for one of its extras."""
    asked = [Requirement(line) for line in requires("angelforge") or ()]
    always = [item for item in asked if item.marker is None or item.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [item for item in asked if item not in always and item.marker and item.marker.evaluate({"extra": extra})]


def probe(code: str, seconds: float = 60.0) -> tuple[bool, str]:
    """Run Python code in another process, where a broken library can do no harm.

    Returns whether it succeeded, and the last line that it printed or failed with.
    """
    command = [sys.executable, "-c", code]
    try:
        result = subprocess.run(
            command, cwd=sys.prefix, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {seconds:.0f} s"
    lines = [line for line in (result.stdout if result.returncode == 0 else result.stderr).splitlines() if line.strip()]
    ended = f"ended with code {result.returncode}" if result.returncode else "said nothing"
    return result.returncode == 0, lines[-1].strip() if lines else ended
