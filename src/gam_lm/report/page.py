"""One page from several results.json: HTML that needs nothing beside it, or the same data as Markdown."""

from __future__ import annotations

import csv
import io
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from gam_lm.errors import InputError, MissingExtraError
from gam_lm.report.lead import Lead, found_lead
from gam_lm.report.plots import LINE
from gam_lm.report.rows import trained
from gam_lm.report.sections import CAPTIONS, KINDS, kind_of
from gam_lm.report.svg import inline
from gam_lm.report.tables import Table, one_line
from gam_lm.results import read_results

if TYPE_CHECKING:
    from jinja2 import Environment

MACHINE = {
    "device": "Device", "processor": "Processor", "cores": "Cores", "memory_gb": "Memory (GB)", "python": "Python", "torch": "torch", "commit": "Commit",
}  # fmt: skip


MOST_NAMED = 5
"""Models that a line names."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An inlined plot."""

    caption: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class Part:
    """What there is to show of one results.json."""

    name: str
    """Its folder as it was given."""
    results: Mapping[str, Any]
    tables: Sequence[Table]
    pictures: Sequence[Picture]

    @property
    def about(self) -> str:
        """What was measured, in a line: the text, the models, the seeds."""
        rows = trained(self.results)
        models = list(dict.fromkeys(str(row["model"]) for row in rows if "model" in row))
        seeds = len({row["seed"] for row in rows if "seed" in row})
        named = ", ".join(models) if len(models) <= MOST_NAMED else f"{', '.join(models[: MOST_NAMED - 1])} and {len(models) - MOST_NAMED + 1} more"
        parts = [(self.results["corpus"] or {}).get("name", ""), named, "" if not seeds else "one seed" if seeds == 1 else f"{seeds} seeds"]
        return "; ".join(part for part in parts if part) or "no row yet"

    @property
    def rows_csv(self) -> str:
        """Every row with all its single figures and settings, as CSV."""
        rows = [_flat(row) for row in self.results["rows"]]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        return _csv([columns, *([row.get(key, "") for key in columns] for row in rows)])


@dataclass(frozen=True, kw_only=True)
class Section:
    """All parts of one kind."""

    anchor: str
    title: str
    question: str
    intro: str
    parts: Sequence[Part]
    published: Table | None


def find_results(places: Sequence[Path]) -> list[Path]:
    """Each results.json that is named, lies in a named folder, or else below it; what lies below one that was found belongs to it.

    Raises:
        InputError: for a place that is not there, or has none.
    """
    found: dict[Path, None] = {}
    for place in places:
        if place.is_file():
            found[place] = None
            continue
        if not place.is_dir():
            raise InputError(f"dir is {str(place)!r}: there is no such folder or results.json")
        below = list(_below(place))
        if not below:
            raise InputError(f"dir {str(place)!r} has no results.json in it or below: name the --out folder of a measuring command")
        found |= dict.fromkeys(below)
    return list(found)


def _below(folder: Path) -> list[Path]:
    path = folder / "results.json"
    if path.is_file():
        return [path]
    return [each for child in sorted(folder.iterdir()) if child.is_dir() for each in _below(child)]


def report_html(paths: Sequence[Path], lead: Lead | None = None) -> str:
    """The page of several results.json, ``lead`` first; without one it is found among them.

    Raises InputError where one cannot be read, MissingExtraError where a needed package is not installed.
    """
    with TemporaryDirectory() as scratch:
        lead, found = lead or found_lead(paths), sections(paths, Path(scratch))
        drawn = [] if lead is None else _drawn(lead.picture(Path(scratch) / "loss_curves"), "lead")
        return templates().get_template("report.html.j2").render(lead=lead, picture=next(iter(drawn), None), sections=found, machines=machines(found))


def report_markdown(paths: Sequence[Path], lead: Lead | None = None) -> str:
    """The data of `report_html` as Markdown, without the pictures. Raises as that does."""
    found = sections(paths, None)
    return templates().get_template("report.md.j2").render(lead=lead or found_lead(paths), sections=found, machines=machines(found))


def _drawn(paths: Sequence[Path], prefix: str) -> list[Picture]:
    """The pictures to show: those with a single line compare nothing, and its figures stand in the tables."""
    pictures = []
    for path in (each for each in paths if each.suffix == ".svg" and each.read_text(encoding="utf-8").count(f'id="{LINE}') != 1):
        caption = next(said for stem, said in CAPTIONS.items() if path.stem.startswith(stem))
        pictures.append(Picture(caption=caption, svg=inline(path, f"{prefix}-{path.stem}-", caption)))
    return pictures


def sections(paths: Sequence[Path], scratch: Path | None) -> list[Section]:
    """What the results.json have to show, by kind; ``scratch`` is a folder to draw the pictures in, None leaves them out."""
    parts: dict[str, list[Part]] = {}
    for number, path in enumerate(paths):
        results, directory = read_results(path), path.parent
        kind = KINDS[name := kind_of(results)]
        pictures = []
        if scratch is not None and results["rows"]:
            pictures = _drawn(kind.pictures(results, directory, scratch / str(number)), f"p{number}")
        tables = [table for table in kind.tables(results, directory) if table.rows]
        parts.setdefault(name, []).append(Part(name=directory.as_posix(), results=results, tables=tables, pictures=pictures))
    return [
        Section(anchor=name, title=kind.title, question=kind.question, intro=kind.intro, parts=parts[name], published=kind.published)
        for name, kind in KINDS.items() if name in parts
    ]  # fmt: skip


def machines(found: Sequence[Section]) -> Table:
    """Where each results.json was measured, a row for each machine and commit."""
    lines = []
    for part in (part for section in found for part in section.parts):
        rows = part.results["rows"]
        own = [row["environment"] for row in rows if "environment" in row]
        for machine in [part.results["environment"], *(each for i, each in enumerate(own) if each not in own[:i])]:
            count = own.count(machine) or len(rows) - len(own)
            said = {key: "" if machine.get(key) is None else str(machine[key]) for key in MACHINE}
            said["commit"] = said["commit"][:12] + (" and changes" if machine.get("dirty") else "")
            lines.append([part.name, *said.values(), str(count)])
    return Table(columns=["Results", *MACHINE.values(), "Rows"], rows=lines, title="Where it was measured")


def templates() -> Environment:
    """The templates of this package. Raises MissingExtraError where jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtraError("jinja2", "plot", "a page") from error
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("gam_lm.report"), autoescape=lambda name: name is not None and not name.endswith(".md.j2"),
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    made.filters |= {"one_line": one_line, "fence": fence, "table_csv": table_csv, "data_link": data_link, "file_name": file_name}
    return made


def table_csv(table: Table) -> str:
    """A table's cells as CSV."""
    return _csv([table.columns, *table.rows, *table.floors])


def fence(text: str) -> str:
    """``text`` in a block of shell code that nothing in it can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}sh\n{text}\n{ticks}"


def data_link(text: str, kind: str = "text/csv") -> str:
    """A link that holds a file."""
    return f"data:{kind};charset=utf-8,{urllib.parse.quote(text)}"


def file_name(title: str) -> str:
    """A title as the name of a file, without ending."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def _flat(row: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """A row's values by name, those of what it holds as ``outer.inner``; lists of more than settings are left out."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{key}.")
        elif not isinstance(value, list) or (all(isinstance(each, int | float) for each in value) and len(value) < 10):
            found[before + key] = value
    return found
