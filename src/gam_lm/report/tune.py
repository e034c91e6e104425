"""A tuning study as a table and a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gam_lm.report.plots import Lines, new_figure, save
from gam_lm.report.tables import Table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text


def study_table(results: Mapping[str, Any]) -> Table:
    """A line for each model: its trials, the best values, their loss, how far the second best is, and what lies at an edge of what was tried."""
    groups = _trials(results)
    fields = sorted({field for group in groups.values() for row in group for field in row["tuned"]})
    rows = []
    for name, group in groups.items():
        finished = sorted((row for row in group if not row.get("diverged") and not row.get("pruned")), key=lambda row: row["val_nats_per_token"])
        lost = [f"{count} {word}" for word in ("diverged", "pruned") if (count := sum(bool(row.get(word)) for row in group))]
        trials = f"{len(group)}" + (f" ({', '.join(lost)})" if lost else "")
        if not finished:
            rows.append([name, trials, *("" for _ in fields), "", "", ""])
            continue
        best = finished[0]
        second = f"+{finished[1]['val_nats_per_token'] - best['val_nats_per_token']:.4f}" if len(finished) > 1 else ""
        ends = [
            f"{field} {word}" for field in fields for word, end in (("lowest", min), ("highest", max))
            if len(group) > 1 and best["tuned"][field] == end(row["tuned"][field] for row in group)
        ]  # fmt: skip
        rows.append([name, trials, *(f"{best['tuned'][field]:.3g}" for field in fields), f"{best['val_nats_per_token']:.4f}", second, ", ".join(ends)])
    columns = ["Model", "Trials", *(f"Best {field}" for field in fields), "Val loss (nats)", "Second best", "At an edge"]
    found = [row for group in groups.values() for row in group]
    seeds, optimizers = (" or ".join(dict.fromkeys(each)) for each in ((str(row["seed"]) for row in found), (row["train_config"]["optimizer"] for row in found)))
    recipe = f" Trials of seed {seeds}, {optimizers}." if found else ""
    note = f"{_alike(groups)}{recipe} {results['corpus']['name']}."
    return Table(columns=columns, rows=sorted(rows, key=lambda row: row[len(fields) + 2] or "~"), title="Tuning", note=note)


def study_plot(results: Mapping[str, Any], stem: Path) -> list[Path]:
    """The loss of every trial against each value that was searched, a panel for each; the picture's SVG and PNG."""
    groups = _trials(results)
    fields = sorted({field for group in groups.values() for row in group for field in row["tuned"]})
    paths = []
    for field in fields:
        figure, axes = new_figure()
        axes.set_xscale("log")
        axes.set_xlabel(field.replace("_", " "))
        axes.set_ylabel("validation loss (nats per token)")
        axes.set_title("Trials of every model", loc="left")
        lines = Lines(axes)
        for name, group in groups.items():
            points = {row["tuned"][field]: row["val_nats_per_token"] for row in group if "val_nats_per_token" in row}
            if points:
                lines.add(name, points, joined=len(fields) == 1)
        lines.name()
        paths += save(figure, stem if len(fields) == 1 else stem.with_name(f"{stem.name}_{field}"))
    return paths


def write_study(out: Path) -> str:
    """Write table.md and the pictures of the study in ``out``, and return the table."""
    results = read_results(out / "results.json")
    table = study_table(results).markdown()
    write_text(out / "table.md", table)
    study_plot(results, out / "tune")
    return table


def _alike(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Whether every model has the same trials."""
    tried = {name: {tuple(sorted(row["tuned"].items())) for row in group} for name, group in groups.items()}
    if all(each == next(iter(tried.values())) for each in tried.values()):
        return "Every model has the same values at the same trial number."
    counts = ", ".join(f"{name} {len(each)}" for name, each in tried.items())
    return f"**The models do not have the same trials** ({counts} values): `gam tune` with all of them evens that out."


def _trials(results: Mapping[str, Any]) -> dict[str, Sequence[Mapping[str, Any]]]:
    groups: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in results["rows"]:
        if "tuned" in row:
            groups[row["model"]].append(row)
    return dict(groups)
