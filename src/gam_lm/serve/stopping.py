"""Where an answer ends: stop texts, found as the text comes, in a time that is linear in its length. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Keeps back the end of a text as long as a stop text may have begun in it.

    Every stop text is an automaton (Knuth, Morris and Pratt 1977) that takes each character once. The stop text that is complete first ends the text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.rest = ""
        """What is kept back."""
        self._stops = [(stop, _failures(stop)) for stop in stops]
        self._matched = [0] * len(stops)

    def add(self, text: str) -> tuple[str, bool]:
        """What can be said now, and whether a stop text has come, before which the answer ends."""
        kept, start = self.rest + text, len(self.rest)
        for place in range(start, len(kept)):
            for i, (stop, failures) in enumerate(self._stops):
                matched = self._matched[i]
                while matched and stop[matched] != kept[place]:
                    matched = failures[matched - 1]
                matched += stop[matched] == kept[place]
                if matched == len(stop):
                    self.rest = ""
                    return kept[: place + 1 - matched], True
                self._matched[i] = matched
        begun = max(self._matched, default=0)
        said, self.rest = kept[: len(kept) - begun], kept[len(kept) - begun :]
        return said, False


def _failures(stop: str) -> list[int]:
    """For each prefix, the length of its longest proper suffix that is also a prefix."""
    failures, matched = [0] * len(stop), 0
    for i in range(1, len(stop)):
        while matched and stop[matched] != stop[i]:
            matched = failures[matched - 1]
        matched += stop[matched] == stop[i]
        failures[i] = matched
    return failures
