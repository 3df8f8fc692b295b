"""Progress of a TensorRT build, and its cancellation."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event, Lock
from typing import Any

from angelforge.plugins.tensorrt.library import Library

# Nearly all time goes into this phase, whose steps are spread evenly over the profiles (seen in TensorRT-RTX 1.7.1).
MAIN_PHASE = "Computing profile costs"

# Called with the name of the phase at work and the share of the whole that is done, 0 to 1, never falling.
Report = Callable[[str, float], None]


def part(report: Report, begin: float, width: float) -> Report:
    """A report of a part of the work, which begins at the share `begin` and is `width` of it."""
    return lambda phase, share: report(phase, begin + width * share)


@dataclass
class _Phase:
    """A phase of the builder that is under way."""

    name: str
    parent: str | None
    steps: int
    done: int = 0


class _Monitor:
    """IProgressMonitor: adds the phases inside the main one up to one share. Called from several threads."""

    api: Any

    def __init__(self, report: Report, cancel: Event) -> None:
        self.api.IProgressMonitor.__init__(self)
        self.report, self.cancel = report, cancel
        self.phases: dict[str, _Phase] = {}
        self.reached = 0.0
        self.guard = Lock()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        """A phase begins."""
        with self.guard:
            self.phases[phase_name] = _Phase(phase_name, parent_phase, num_steps)

    def step_complete(self, phase_name: str, step: int) -> bool:
        """A step is done. False asks TensorRT to stop."""
        with self.guard:
            if phase_name in self.phases:
                self.phases[phase_name].done = step + 1
            self._tell(phase_name)
        return not self.cancel.is_set()

    def phase_finish(self, phase_name: str) -> None:
        """A phase ends, whether or not all of its steps were done."""
        with self.guard:
            self.phases.pop(phase_name, None)

    def _tell(self, name: str) -> None:
        """The share of a phase is its steps done and of the step at work the share of its child.

        Phases are known by name only, so that one within another of the same name would be its own parent.
        """
        phase, share, seen = self.phases.get(name), 0.0, set[str]()
        while phase is not None and phase.name not in seen:
            seen.add(phase.name)
            share = min((phase.done + share) / max(phase.steps, 1), 1.0)
            if phase.name == MAIN_PHASE:
                self.reached = max(self.reached, share)
            phase = self.phases.get(phase.parent) if phase.parent else None
        self.report(name, self.reached)


def make_monitor(library: Library, report: Report, cancel: Event) -> Any:
    """An IProgressMonitor that calls `report` and stops the build once `cancel` is set."""
    kind = type("AngelForgeProgress", (_Monitor, library.api.IProgressMonitor), {"api": library.api})
    return kind(report, cancel)
