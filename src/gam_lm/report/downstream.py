"""What models and counts reach in BLiMP, LAMBADA, ARC-easy and PIQA, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gam_lm.report.rows import Row, by_variant, floor_name, floors, footnotes, three_digits, trained
from gam_lm.report.statistics import summarise
from gam_lm.report.tables import Table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text

CHANCE = {"blimp": "50", "arc_easy": "25", "piqa": "50"}
"""Task → right answers in % of whoever guesses."""

COLUMNS = {
    "BLiMP": ("blimp", "acc"), "LAMBADA": ("lambada", "acc"), "LAMBADA perplexity": ("lambada", "perplexity"), "ARC-easy": ("arc_easy", "acc"),
    "PIQA": ("piqa", "acc"),
}  # fmt: skip
"""Column → task and figure."""


def downstream(results: Mapping[str, Any]) -> list[Table]:
    """The share of right answers of each model and floor, and, where BLiMP was measured, its phenomena."""
    models, counted = by_variant(trained(results)), _floors(results)
    tasks = {row["task"] for row in results["rows"]}
    columns = {name: column for name, column in COLUMNS.items() if column[0] in tasks}

    def cells(name: str, rows: Sequence[Row]) -> list[str]:
        return [name, *(_cell([row for row in rows if row["task"] == task], figure) for task, figure in columns.values())]

    chance = ["chance", *(CHANCE.get(task, "") if figure == "acc" else "" for task, figure in columns.values())]
    note = (
        "Right answers in %, the more the better, and the perplexity of LAMBADA's last words. ± is the standard error over the examples; of several seeds, the 95 % "
        f"interval of their mean.{_examples(results['rows'])} lm-evaluation-harness {', '.join(sorted({row['lm_eval'] for row in results['rows']}))}."
        f"{footnotes(results['rows'])}"
    )
    lines = [cells(name, rows) for name, rows in models.items()]
    low = [*(cells(name, rows) for name, rows in counted.items()), chance]
    tables = [Table(columns=["Model", *columns], rows=lines, floors=low, title="Downstream tasks", note=note)]
    return tables + ([_phenomena(models, counted)] if "blimp" in tasks else [])


def write_downstream(out: Path) -> str:
    """Write table.md in ``out``, and return it."""
    tables = "\n".join(table.markdown() for table in downstream(read_results(out / "results.json")))
    write_text(out / "table.md", tables)
    return tables


def _phenomena(models: Mapping[str, Sequence[Row]], counted: Mapping[str, Sequence[Row]]) -> Table:
    """A line for each phenomenon of BLiMP, a column for each model and floor."""
    groups = {name: found for name, rows in {**models, **counted}.items() if (found := [row["phenomena"] for row in rows if "phenomena" in row])}
    names = list(dict.fromkeys(name for found in groups.values() for each in found for name in each))
    lines = [[name, *(f"{100 * summarise([each[name] for each in found if name in each]).mean:.1f}" for found in groups.values())] for name in sorted(names)]
    note = "Right answers in %, the mean over the paradigms of each phenomenon; chance is 50."
    return Table(columns=["Phenomenon", *groups], rows=lines, title="BLiMP by phenomenon", note=note)


def _cell(rows: Sequence[Row], figure: str) -> str:
    found = [row for row in rows if figure in row]
    if not found:
        return ""
    factor, form = (1, three_digits) if figure == "perplexity" else (100, "{:.1f}".format)
    summary = summarise([factor * row[figure] for row in found])
    spread = summary.half_width if summary.count > 1 else factor * found[0].get(f"{figure}_stderr", 0)
    return f"{form(summary.mean)} ± {form(spread)}"


def _floors(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The floors' rows by name, with the text, and the tokenizer where there are several."""
    rows = floors(results)
    several = len({row["variant"] for row in rows}) > 1
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{floor_name(row)}, {row['variant'] if several else row['corpus']['name']}", []).append(row)
    return found


def _examples(rows: Sequence[Row]) -> str:
    few = sorted({row["examples"] for row in rows if row.get("examples")})
    return f" Some rows are of the first {' or '.join(map(str, few))} examples of each task alone." if few else ""
