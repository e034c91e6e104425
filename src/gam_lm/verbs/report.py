"""`gam report` and `gam env`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Report:
    """Render results for people."""

    readme: Path
    """Markdown file whose marked tables are made anew from the results.json files they name."""

    def run(self) -> None:
        """Render in place."""
        from gam_lm.report.readme import update

        print(f"{self.readme}: {'tables made anew' if update(self.readme) else 'up to date'}")


@dataclass(frozen=True, kw_only=True)
class Env:
    """What this machine is and which backends it has."""

    def run(self) -> None:
        """Print it, a line each."""
        from gam_lm.measure import environment
        from gam_lm.mixers import REGISTRY, mixer_class

        for name, value in environment().items():
            print(f"{name}: {value}")
        for name in REGISTRY:
            print(f"mixer {name}: {', '.join(mixer_class(name).backends)}")
