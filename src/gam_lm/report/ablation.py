"""The ablation's table and picture: Table 3 with what each row costs over the full model, paired by seed and block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gam_lm.report.compare import Measured, corrected, difference, difference_words
from gam_lm.report.published import TABLE_3
from gam_lm.report.rows import Row, by_variant, differing, floors, same_but, settings_of, trained
from gam_lm.report.statistics import Difference, shown
from gam_lm.report.tables import INTERVALS, Table, finite, floor_cells, interval, mean, provenance, seeds


def ablation(results: Mapping[str, Any], directory: Path | None = None) -> Table:
    """Table 3's columns (row, parameters, perplexity) with our loss, its difference to the full model, and the published perplexity beside ours.

    Args:
        results: content of a results.json of `gam ablate`.
        directory: its folder, for the losses by block; without it differences are paired by seed alone.
    """
    columns = ["Row", "Parameters", "Parameters at the paper's size", "Val loss (nats)", "PPL", "Bits/byte", "Loss over full (nats)", "Seeds", "PPL published (WikiText-2)"]
    paper = any("paper_val_ppl" in row for row in trained(results))
    if paper:
        columns.insert(5, "PPL (paper's protocol)")
    above = above_full(results, directory)
    lines = []
    for name, group in variants(results).items():
        published = TABLE_3.get(group[0]["model"])
        cells = [
            name, f"{group[0]['parameters']:,}", f"{group[0]['paper_size_parameters']:,}", interval(finite(group), "val_nats_per_token", "{:.4f}"),
            mean(finite(group), "val_ppl", "{:,.2f}"), mean(finite(group), "val_bits_per_byte", "{:.4f}"), difference_words(above.get(name)), seeds(group),
            f"{published.val_ppl:.2f}" if published else "",
        ]  # fmt: skip
        if paper:
            cells.insert(5, mean(finite(group), "paper_val_ppl", "{:,.2f}"))
        lines.append(cells)
    below = [floor_cells(row, columns) for row in floors(results)]
    return Table(columns=columns, rows=lines, floors=below, title="Ablation", note=f"{INTERVALS} {provenance(results)}")


def ablation_table(results: Mapping[str, Any], directory: Path | None = None) -> str:
    """`ablation` as Markdown."""
    return ablation(results, directory).markdown()


def variants(results: Mapping[str, Any]) -> dict[str, list[Row]]:
    """The trained rows by name; where several full models were taken apart, every name says which."""
    rows = trained(results)
    return by_variant(rows, differing(settings_of(row for row in rows if row["model"] == "full")))


def above_full(results: Mapping[str, Any], directory: Path | None = None) -> dict[str, Difference]:
    """The difference in nats per token of each row to the full model that it was made from, by the row's name; those without one are left out.

    Holm's correction counts all of them.
    """
    groups = variants(results)
    found = {}
    for name, group in groups.items():
        full = _full_of(group[0], groups)
        if full is None or full == name:
            continue
        a, b = (
            Measured(name=each, rows=groups[each], directory=directory or Path("no folder"), corpus=results["corpus"]) for each in (name, full)
        )
        if (summary := difference(a, b)) is not None:
            found[name] = summary
    return corrected(found)


def ablation_plot(results: Mapping[str, Any], directory: Path | None, stem: Path) -> list[Path]:
    """What each row costs over the full model, as bars with their 95 % intervals. Returns the SVG and the PNG."""
    from gam_lm.report.plots import COLOURS, GREY, new_figure, save

    above = above_full(results, directory)
    names = list(above)[::-1]
    figure, axes = new_figure(height=1.5 + 0.42 * max(3, len(names)))
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#E5E5E5", linewidth=0.8)
    for place, name in enumerate(names):
        each = above[name]
        axes.barh(place, each.mean, color=COLOURS[0] if shown(each) and each.count > 1 else GREY, height=0.6)
        if math.isfinite(each.half_width):
            axes.errorbar(each.mean, place, xerr=each.half_width, color="black", capsize=3, linewidth=1.2)
        axes.annotate(difference_words(each), (1.02, place), xycoords=axes.get_yaxis_transform(), va="center", fontsize=8.5, annotation_clip=False)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("validation loss above the full model (nats per token); grey: within the noise, or one seed")
    axes.set_title(f"{results['corpus']['name']}: the full model taken apart, 95 % intervals", loc="left")
    return save(figure, stem)


def _full_of(row: Row, groups: Mapping[str, list[Row]]) -> str | None:
    """The name of the full model that differs from ``row`` in nothing but what the row changes."""
    for name, group in groups.items():
        if group[0]["model"] == "full" and same_but(row, group[0], {*row.get("changes", {}), *group[0].get("changes", {})}):
            return name
    return None
