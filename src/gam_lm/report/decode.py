"""The table and the plots of decoding, from results.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gam_lm.report.plots import Lines, decades, new_figure, save
from gam_lm.report.rows import ERRORS, by_network, by_setting, errors_of, machine_line, setting_name, three_digits
from gam_lm.report.tables import Table
from gam_lm.results import read_results
from gam_lm.runtime.files import write_text

Row = Mapping[str, Any]


def write_decode(directory: Path) -> str:
    """Write table.md and the plots of a folder's results.json. Returns the table."""
    results = read_results(directory / "results.json")
    table = decode_table(results)
    write_text(directory / "table.md", table)
    decode_plots(results, directory)
    return table


def decode_table(results: Mapping[str, Any]) -> str:
    """`decoding` as Markdown, each table under its title."""
    return "\n".join(f"### {table.title}\n\n{table.markdown()}" for table in decoding(results))


def decoding(results: Mapping[str, Any]) -> list[Table]:
    """A table for each batch size, format of the weights and variant.

    Milliseconds of one more token of every row after each context, how flat they are, the model bandwidth utilisation, and the state of one
    sequence after the shortest and the longest context.
    """
    tables = []
    for setting, rows in by_setting(results["rows"]).items():
        contexts = sorted({row["context"] for row in rows})
        first, last = contexts[0], contexts[-1]
        columns = ["Model", "Parameters", *(f"ms after {n:,}" for n in contexts), f"{last:,} over {first:,}", "MBU"]
        columns += [f"State after {n:,} (KB)" for n in dict.fromkeys((first, last))]
        exact = any("output_error" in row for row in rows)
        columns += [ERRORS] * exact
        lines = [_cells(name, group, contexts) + [next((errors_of(row) for row in group if row["outcome"] == "ok"), "")] * exact for name, group in by_network(rows).items()]
        measured = sorted({f"{row['bandwidth'] / 1e9:.0f}" for row in rows if row["outcome"] == "ok"}, key=float)
        bandwidth = f"{' to '.join(dict.fromkeys((measured[0], measured[-1])))} GB/s" if measured else "not measured"
        note = (
            "MBU, model bandwidth utilisation: the bytes of the weights over the time after the shortest context, as a share of the bandwidth at which this "
            f"machine reads memory ({bandwidth}); the states are left out. {machine_line(results)}"
        )
        tables.append(Table(columns=columns, rows=lines, title=_name(setting), note=note))
    return tables


def _cells(name: str, group: Sequence[Row], contexts: Sequence[int]) -> list[str]:
    rows = {row["context"]: row for row in group}
    done = {n: row for n, row in rows.items() if row["outcome"] == "ok"}
    first, last = contexts[0], contexts[-1]
    cells = [name, f"{next(iter(done.values()))['parameters']:,}" if done else ""]
    cells += [three_digits(done[n]["step_ms"]) if n in done else rows[n]["outcome"] if n in rows else "" for n in contexts]
    both = first in done and last in done
    cells.append(f"{done[last]['step_ms'] / done[first]['step_ms']:.2f}" if both else "")
    cells.append(f"{100 * done[first]['share_of_bandwidth']:.0f} %" if first in done else "")
    return cells + [f"{done[n]['state_bytes'] / 1024:,.0f}" if n in done else "" for n in dict.fromkeys((first, last))]


def _name(setting: tuple[Any, ...]) -> str:
    return setting_name(setting).replace(" autocast", " weights").replace("int8", "int8 weights")


def decode_plots(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Time of a step against the context on logarithmic axes, a line per model; a picture for each setting where there are several."""
    pictures = []
    settings = by_setting(results["rows"])
    for setting, rows in settings.items():
        figure, axes = new_figure()
        axes.set_xscale("log")
        lines = Lines(axes)
        for name, group in by_network(rows).items():
            points = {row["context"]: row["step_ms"] for row in group if row["outcome"] == "ok"}
            failed = sorted((row["context"], row["outcome"]) for row in group if row["outcome"] != "ok")
            if points:
                lines.add(name, points, note=f" ({failed[0][1]})" if failed else "")
        decades(axes)
        lines.name()
        axes.set_xlabel("tokens before (context)")
        axes.set_ylabel("time of one more token (ms)")
        axes.set_title(f"Decoding, {_name(setting)}", loc="left")
        pictures += save(figure, directory / ("decode" + ("" if len(settings) == 1 else "_" + "_".join(map(str, setting)))))
    return pictures
