"""Drafts for speculative decoding by prompt lookup (Saxena 2023): what followed the last time that the text ended like this."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens that must be the same."""


class PromptLookup:
    """A text by its n-grams: adding a token and asking for a draft each take a time that does not depend on the length of the text."""

    def __init__(self) -> None:
        self.text: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def add(self, tokens: Iterable[int]) -> None:
        """Go on with the text."""
        for token in tokens:
            # Known by what came before it: a draft for the end of the text must not find that end.
            for n in range(SHORTEST, min(LONGEST, len(self.text)) + 1):
                self._after[tuple(self.text[-n:])] = len(self.text)
            self.text.append(token)

    def draft(self, most: int) -> Sequence[int]:
        """Up to ``most`` tokens that may follow; empty where the end of the text has not been seen before."""
        for n in range(min(LONGEST, len(self.text)), SHORTEST - 1, -1):
            if (place := self._after.get(tuple(self.text[-n:]))) is not None:
                draft = self.text[place : place + most]
                while len(draft) < most:  # the text repeats itself: so does the draft
                    draft.append(draft[place - len(self.text)])
                return draft
        return []
