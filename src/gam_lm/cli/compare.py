"""`gam compare`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Say whether one result is better than another: the difference in validation loss with its 95 % interval, paired by seed and validation block."""

    first: str
    """Folder of a results.json, or FOLDER:MODEL with a model's name as the table has it."""
    second: str
    """The same of the other."""

    def run(self) -> None:
        """Print a sentence for each pair of models."""
        from gam_lm.report.compare import compare

        for sentence in compare(self.first, self.second):
            print(sentence)
