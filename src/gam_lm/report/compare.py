"""Two models on the same text: is one better, and by how much?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gam_lm.errors import InputError, unknown_name
from gam_lm.report.rows import Row, by_variant, trained
from gam_lm.report.statistics import Summary, paired, paired_blocks, shown, verdict
from gam_lm.results import read_blocks, read_results

NO_DIFFERENCE = "no difference shown"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The trainings of one model in one results.json."""

    name: str
    rows: Sequence[Row]
    directory: Path
    corpus: Mapping[str, Any]


def difference(a: Measured, b: Measured) -> Summary | None:
    """The difference a − b in validation nats per token, over the seeds that both have.

    By seed and block where the losses by block are there, else by seed alone. None where no seed is common.

    Raises:
        InputError: where the two were measured on different tokens.
    """
    for key, what in (("sha256", "text"), ("tokenizer_sha256", "tokenizer")):
        if a.corpus.get(key) != b.corpus.get(key):
            raise InputError(f"{a.name} and {b.name} were measured with another {what} ({a.corpus['name']}, {b.corpus['name']}): a difference says nothing")
    rows_a, rows_b = ({row["seed"]: row for row in each.rows} for each in (a, b))
    seeds = sorted(rows_a.keys() & rows_b.keys())
    if not seeds:
        return None
    if all(row.get("val_blocks") and (each.directory / row["val_blocks"]).is_file() for each in (a, b) for row in each.rows if row["seed"] in seeds):
        blocks_a, blocks_b = ([read_blocks(each.directory, rows[seed]) for seed in seeds] for each, rows in ((a, rows_a), (b, rows_b)))
        if all(len(x[1]) == len(y[1]) and (x[1] == y[1]).all() for x in blocks_a[:1] for y in (*blocks_a, *blocks_b)):
            return paired_blocks(blocks_a, blocks_b)
    return paired(*([rows[seed]["val_nats_per_token"] for seed in seeds] for rows in (rows_a, rows_b)))


def measured(results: Mapping[str, Any], directory: Path) -> list[Measured]:
    """The models of the results.json in ``directory`` that have a validation loss."""
    rows = [row for row in trained(results) if "val_nats_per_token" in row and "seed" in row]
    return [Measured(name=name, rows=group, directory=directory, corpus=results["corpus"]) for name, group in by_variant(rows).items()]


def over_the_lowest(models: Sequence[Measured]) -> tuple[str, dict[str, Summary]]:
    """The name of the model of the lowest mean loss, and by name how far the others are above it, as far as they have a seed in common with it."""
    lowest = min(models, key=lambda each: math.fsum(row["val_nats_per_token"] for row in each.rows) / len(each.rows))
    found = {each.name: difference(each, lowest) for each in models if each is not lowest}
    return lowest.name, {name: summary for name, summary in found.items() if summary is not None}


def difference_words(difference: Summary | None, digits: int = 4) -> str:
    """A difference with its interval as a table's cell; empty for None."""
    if difference is None:
        return ""
    if difference.half_width == math.inf:
        return f"{difference.mean:+.{digits}f} (one seed)"
    said = with_interval(difference.mean, difference.half_width, digits)
    return f"{said} (one seed)" if difference.count == 1 and shown(difference) else said


def with_interval(value: float, half_width: float, digits: int = 4) -> str:
    """A difference and half its 95 % interval, and a plain word where that holds zero."""
    said = f"{value:+.{digits}f} ± {half_width:.{digits}f}"
    return said if abs(value) > half_width else f"{said}: {NO_DIFFERENCE}"


def find(place: str) -> list[Measured]:
    """The models of ``DIR``, ``DIR:MODEL``, or the same with a results.json in place of its folder.

    Raises:
        InputError: where there is no such file or model.
    """
    path, model = Path(place), None
    if not path.exists() and ":" in place:
        before, _, model = place.rpartition(":")
        path = Path(before)
    path = path / "results.json" if path.is_dir() else path
    models = measured(read_results(path), path.parent)
    if not models:
        raise InputError(f"results {str(path)!r} hold no trained model with a validation loss")
    if model is None:
        return models
    chosen = [each for each in models if each.name == model]
    if not chosen:
        raise unknown_name(f"model of {str(path)!r}", model, [each.name for each in models])
    return chosen


def compare(first: str, second: str) -> list[str]:
    """Two results in words, a sentence for each pair of models: one with every other, or where both name several, those that both have.

    Raises:
        InputError: where there is nothing to compare.
    """
    found_a, found_b = find(first), find(second)
    one_with_all = len(found_a) == 1 or len(found_b) == 1
    pairs = [(a, b) for a in found_a for b in found_b if (_place(a) != _place(b) if one_with_all else a.name == b.name)]
    if not pairs:
        names = [" ".join(each.name for each in found) for found in (found_a, found_b)]
        raise InputError(f"{first} has {names[0]}, {second} has {names[1]}: name one model of each, as DIR:MODEL")
    sentences = []
    for a, b in pairs:
        name_a, name_b = (a.name, b.name) if a.name != b.name else (f"{a.name} of {first}", f"{b.name} of {second}")
        summary = difference(a, b)
        if summary is None:
            raise InputError(f"{name_a} and {name_b} have no seed in common: train both with the same --seeds")
        sentences.append(verdict(summary, name_a, name_b, "nats/token"))
    return sentences


def _place(model: Measured) -> tuple[Path, str]:
    return model.directory.resolve(), model.name
