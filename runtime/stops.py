"""Stop strings in streamed text: found across token boundaries, and never shown in part."""

from __future__ import annotations

#: Characters up to which a text is looked up among all begins of stop strings; longer begins would fill the memory.
_SHORT = 32


class StopFilter:
    """Passes text on until the first stop string is complete; holds back what may be the begin of one.

    What comes out does not depend on how the text was cut: the stop string that is complete first ends it, and of
    several that end at the same character the longest.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stopped = False
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._begins = tuple({stop[:size] for stop in stops for size in range(1, min(len(stop), _SHORT + 1))})
        self._held = ""

    def push(self, text: str) -> str:
        """Takes new text and returns what is certain to belong to the output."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [(begin + len(stop), begin) for stop in self._stops if (begin := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = self._unsure(text)
        self._held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """What was held back: no more text comes, so it was no stop string."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """Where the longest end of `text` begins that a stop string begins with."""
        if len(text) <= _SHORT and not text.endswith(self._begins):  # nearly always, and one call
            return len(text)
        for begin in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[begin] in self._firsts:
                end = text[begin:]
                if any(stop.startswith(end) for stop in self._stops):
                    return begin
        return len(text)
