"""The first screen of a report: a question, its answer in one sentence with an interval, one picture, one short table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gam_lm.errors import InputError
from gam_lm.report.compare import Measured, difference_words, find, measured, over_the_first, ranked
from gam_lm.report.plots import loss_curves
from gam_lm.report.rows import floor_name, floors, footnotes
from gam_lm.report.sections import kind_of
from gam_lm.report.statistics import Difference, shown, summarise
from gam_lm.report.tables import INTERVALS, Table, interval, mean
from gam_lm.results import read_results

MOST_ROWS = 7
"""Of the table, a floor included."""


@dataclass(frozen=True, kw_only=True)
class Lead:
    """What stands first."""

    question: str
    answer: str
    table: Table
    results: Mapping[str, Any]
    """Content of a results.json that has the rows of the table's models alone."""

    def picture(self, stem: Path) -> list[Path]:
        """Their loss curves, written as ``stem``.svg and .png."""
        return loss_curves(self.results, stem)


def lead_of(places: Sequence[str]) -> Lead:
    """The first screen on models that are named as for `gam compare`, DIR or DIR:MODEL. Raises InputError where they cannot be compared."""
    models = [model for place in places for model in find(place)]
    if len({model.place for model in models}) < 2:
        raise InputError(f"lead is {' '.join(places)!r}: name at least two models, as DIR:MODEL")
    return _lead(models)


def found_lead(paths: Sequence[Path]) -> Lead | None:
    """The first screen on the results.json that compares most: one that named primary comparisons, of these the one with most trainings on several seeds.

    None where no results.json compares trained models.
    """
    best: tuple[tuple[bool, int], list[Measured]] | None = None
    for path in paths:
        results = read_results(path)
        if kind_of(results) != "quality":
            continue
        models = [each for each in measured(results, path.parent) if each.compared()]
        worth = bool(results.get("primary")), sum(len(each.compared()) for each in models if len(each.compared()) > 1)
        if len(models) > 1 and (best is None or worth > best[0]):
            best = worth, models
    return None if best is None else _lead(best[1])


def _lead(models: Sequence[Measured]) -> Lead:
    finite = ranked(models)
    if len(finite) < 2:
        raise InputError(f"lead has {len(finite)} model with a finite loss: name at least two")
    lowest, others = finite[0], finite[1:]
    known = over_the_first(finite)
    folders = {each.directory: read_results(each.directory / "results.json") for each in finite}
    first = folders[lowest.directory]
    counts = [row for row in floors(first) if "val_nats_per_token" in row]
    counted = min(counts, key=lambda row: row["val_nats_per_token"], default=None)
    shown_models = finite[: MOST_ROWS - (counted is not None)]
    rows_shown = [row for each in shown_models for row in each.compared()]
    columns = ["Model", "Validation loss", "Over the lowest", "Bits per byte", "State (bytes)", "Seeds"]
    rows = [
        [
            each.name, interval(each.compared(), "val_nats_per_token", "{:.3f}"), "lowest" if each is lowest else difference_words(known.get(each.place), 3),
            mean(each.compared(), "val_bits_per_byte", "{:.3f}"), mean(each.rows[:1], "state_bytes", "{:,.0f}"),
            str(len(each.compared())),
        ]
        for each in shown_models
    ]  # fmt: skip
    floor = [] if counted is None else [[floor_name(counted), f"{counted['val_nats_per_token']:.3f}", "", mean([counted], "val_bits_per_byte", "{:.3f}"), "", ""]]
    more = f" {len(finite) - len(shown_models)} more models stand below." if len(finite) > len(shown_models) else ""
    corpus = first["corpus"]
    where = f"{corpus['name']}, {_amount(rows_shown)}"
    sizes = [each.rows[0]["parameters"] / 1e6 for each in shown_models]
    size = f"{min(sizes):.2f}" + (f" to {max(sizes):.2f}" if f"{min(sizes):.2f}" != f"{max(sizes):.2f}" else "")
    folders_shown = ", ".join(dict.fromkeys(each.directory.as_posix() for each in shown_models))
    note = f"Nats per token on {where}; {size} million parameters. {INTERVALS}{more} From {folders_shown}.{footnotes(rows_shown)}"
    table = Table(columns=columns, rows=rows, floors=floor, title="The lowest losses", note=note)
    return Lead(
        question=f"Which model has the lowest validation loss on {corpus['name']}?", answer=_answer(lowest, others, known), table=table,
        results={**first, "rows": [*rows_shown, *([counted] if counted is not None else [])]},
    )  # fmt: skip


def _loss(model: Measured) -> float:
    return summarise([row["val_nats_per_token"] for row in model.compared()]).mean


def _amount(rows: Sequence[Mapping[str, Any]]) -> str:
    tokens = sorted({row["train_tokens"] for row in rows if "train_tokens" in row})
    return f"{' or '.join(f'{each:,}' for each in tokens)} training tokens" if tokens else "the training tokens of each run"


def _answer(lowest: Measured, others: Sequence[Measured], known: Mapping[Any, Difference]) -> str:
    """The lowest against the next, and against how many others a difference is shown."""
    following = others[0]
    each = known.get(following.place)
    if each is None or not each.estimates:
        return (
            f"{lowest.name} has the lowest loss, {_loss(lowest):.3f} nats per token; {following.name} follows with {_loss(following):.3f}. "
            "One common seed or none describes these runs and does not compare the models."
        )
    low, high = each.mean - each.half_width, each.mean + each.half_width
    level = f"{100 * each.level:.4g} % interval"
    seeds = f"{each.count} seeds"
    apart = sum(shown(some) for some in known.values() if some.estimates)
    if shown(each):
        said = f"{lowest.name}: {each.mean:.3f} nats per token below {following.name}, the next lowest ({level} {low:.3f} to {high:.3f}, {seeds})"
    else:
        said = f"{lowest.name} is lowest, but no difference to {following.name} is shown: {each.mean:+.3f} nats per token ({level} {low:+.3f} to {high:+.3f}, {seeds})"
    return f"{said}. A difference is shown to {apart} of the {len(others)} other models."
