"""`gam compare`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import UseAppendAction

from gam_lm.cli.data import EvaluationText
from gam_lm.cli.numbers import Above


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Say in one paragraph whether one result is better than another, and how sure that is over seeds, blocks and documents."""

    results: tuple[str, ...]
    """Folders of a results.json, or FOLDER:MODEL with a model's name as the table has it. One folder alone compares all its models."""
    primary: UseAppendAction[tuple[str, ...]] = ()
    """MODEL:MODEL of a primary comparison, given once for each, at most three; the others carry Holm's correction. `gam bench` names them before the runs."""
    margin: Above | None = None
    """Nats per token that count as no loss; by default those that `gam bench --margin` named before the runs."""
    split: Literal["val", "test"] | EvaluationText = "val"
    """Text to compare on: a split, or one of those that `gam bench --texts` measured."""
    json: bool = False
    """Print the figures as JSON."""
    plot: Path | None = None
    """Also draw the loss of every seed, a line a model and a colour a folder: the pictures' path without .svg and .png."""

    def run(self) -> None:
        """Print the paragraph, or the JSON, and draw what is asked for."""
        from gam_lm.report.seed_plot import seed_plot
        from gam_lm.report.verdict import compare

        said = compare(self.results, primary=self.primary, margin=self.margin, split=self.split)
        print(json.dumps(said.to_json(), indent=1) if self.json else said.paragraph())
        if self.plot is not None:
            self.plot.parent.mkdir(parents=True, exist_ok=True)
            for path in seed_plot(self.results, self.plot, split=self.split):
                print(f"plot: {path}", file=sys.stderr)
