"""`gam report`, `gam models` and `gam env`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from gam_lm.cli.terminal import show


@dataclass(frozen=True, kw_only=True)
class Report:
    """Render results for people: one page of everything measured, that needs nothing beside it."""

    dirs: Positional[tuple[Path, ...]] = (Path("results"),)
    """Folders with a results.json in them or below, or such files."""
    lead: tuple[str, ...] = ()
    """DIR or DIR:MODEL of the models that the first screen compares; by default those of the results.json that compares most."""
    out: Path | None = None
    """The page; by default report.html, or report.md with --markdown."""
    markdown: bool = False
    """The same data as Markdown."""
    readme: Path | None = None
    """Instead: a Markdown file whose marked tables are made anew from the results.json files they name."""

    def run(self) -> None:
        """Render."""
        from gam_lm.report.lead import lead_of
        from gam_lm.report.page import find_results, report_html, report_markdown
        from gam_lm.report.readme import update
        from gam_lm.runtime.files import write_text

        if self.readme is not None:
            print(f"{self.readme}: {'tables made anew' if update(self.readme) else 'up to date'}")
            return
        found = find_results(self.dirs)
        out = self.out or Path("report.md" if self.markdown else "report.html")
        lead = lead_of(self.lead) if self.lead else None
        write_text(out, (report_markdown if self.markdown else report_html)(found, lead))
        print(f"{out}: {len(found)} results.json")


@dataclass(frozen=True, kw_only=True)
class Env:
    """What this machine is and which backends it has."""

    def run(self) -> None:
        """Print it, a line each."""
        from gam_lm.mixers.registry import mixer_class, mixer_names
        from gam_lm.runtime.measure import environment

        for name, value in environment().items():
            print(f"{name}: {value}")
        for name in mixer_names():
            print(f"mixer {name}: {', '.join(mixer_class(name).backends)}")


@dataclass(frozen=True, kw_only=True)
class Models:
    """Every model by its name: what it changes, and where it comes from."""

    def run(self) -> None:
        """Print the list."""
        from gam_lm.presets.models import explain_models

        show(explain_models())
