"""Two models on the same text: is one better, and by how much?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

from gam_lm.errors import InputError, unknown_name
from gam_lm.report.rows import Row, by_variant, trained
from gam_lm.report.statistics import Difference, Summary, holm, paired_blocks, paired_seeds
from gam_lm.results import MOST_PRIMARY, measured_on, read_blocks, read_documents, read_results

NO_DIFFERENCE = "no difference shown"

Pair = tuple[str, str]
Place = tuple[Path, str]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The trainings of one model in one results.json."""

    name: str
    rows: Sequence[Row]
    directory: Path
    corpus: Mapping[str, Any]
    primary: Sequence[Pair] = ()
    """The comparisons that its results.json named before the runs."""
    margin: float | None = None
    """The margin of "no loss" in nats per token that its results.json named before the runs."""
    alone: bool = True
    """Whether its results.json has no other variant of the model: what was named there says the model's name, and of several variants it tells none."""

    def compared(self, split: str = "val") -> list[Row]:
        """The rows that a comparison counts."""
        return [row for row in self.rows if comparable(row, split)]

    def diverged(self) -> list[Row]:
        """The rows of trainings that diverged."""
        return [row for row in self.rows if diverged(row)]

    @property
    def place(self) -> Place:
        """What tells it from every other."""
        return self.directory.resolve(), self.name

    def was_called(self, name: str) -> bool:
        """Whether a results.json that says ``name`` before the runs means this model, which is the only one of that name there."""
        return self.alone and name == self.rows[0]["model"]

    def is_called(self, name: str) -> bool:
        """Whether ``name`` is the model's: with its variant, or without where there is no other variant."""
        return name == self.name or self.was_called(name)


def diverged(row: Row) -> bool:
    """Whether a training diverged: it says so, or its validation loss is not finite."""
    return bool(row.get("diverged")) or not math.isfinite(row.get("val_nats_per_token", 0.0))


def comparable(row: Row, split: str = "val") -> bool:
    """Whether a training ended with a finite loss on the split: what diverged is never compared."""
    return not diverged(row) and "seed" in row and math.isfinite(measured_on(row, split).get("nats_per_token", math.nan))


def difference(a: Measured, b: Measured, split: str = "val") -> Difference | None:
    """The difference a − b in nats per token on the split (val, test) or further text, over the seeds that both have.

    By seed, block and document as far as the losses by block are there, else by seed alone. None where no seed is common.

    Raises:
        InputError: where the two were measured on different tokens.
    """
    for key, what in (("sha256", "text"), ("tokenizer_sha256", "tokenizer")):
        if a.corpus.get(key) != b.corpus.get(key):
            raise InputError(f"{a.name} and {b.name} were measured with another {what} ({a.corpus['name']}, {b.corpus['name']}): a difference says nothing")
    rows_a, rows_b = ({row["seed"]: row for row in each.compared(split)} for each in (a, b))
    seeds = sorted(rows_a.keys() & rows_b.keys())
    if not seeds:
        return None
    sources = [(each.directory, rows[seed]) for each, rows in ((a, rows_a), (b, rows_b)) for seed in seeds]
    found = [measured_on(row, split) for _, row in sources]
    if len({each.get("sha256") for each in found}) > 1:
        raise InputError(f"{a.name} and {b.name} were measured with another text of the name {split}: a difference says nothing")
    if all("blocks" in each and (directory / each["blocks"]).is_file() for each, (directory, _) in zip(found, sources, strict=True)):
        blocks = [read_blocks(directory, row, split) for directory, row in sources]
        if all(len(each[1]) == len(blocks[0][1]) and (each[1] == blocks[0][1]).all() for each in blocks):
            # The same blocks of the same text lie in the same documents: one row that tells is enough.
            documents = next((some for source in sources if (some := read_documents(*source, split)) is not None), None)
            return paired_blocks(blocks[: len(seeds)], blocks[len(seeds) :], documents)
    return paired_seeds(*([measured_on(rows[seed], split)["nats_per_token"] for seed in seeds] for rows in (rows_a, rows_b)))


def corrected(differences: Mapping[Key, Difference], primary: Sequence[Key] = ()) -> dict[Key, Difference]:
    """The differences, with Holm's correction of the intervals of those that are not ``primary`` and have two seeds or more."""
    tested = {key: p for key, each in differences.items() if key not in primary and (p := each.p_value) is not None}
    levels = {key: level for key, (_, level) in zip(tested, holm(list(tested.values())), strict=True)}
    return {key: each.at(levels[key]) if key in levels else each for key, each in differences.items()}


def measured(results: Mapping[str, Any], directory: Path) -> list[Measured]:
    """The models of the results.json in ``directory`` that were trained to be compared; a model all of whose trainings diverged has no row to compare."""
    primary = [(first, second) for first, second in results.get("primary", ())]
    groups = by_variant(trained(results))
    variants = Counter(group[0]["model"] for group in groups.values())
    found = [
        Measured(
            name=name, rows=group, directory=directory, corpus=results["corpus"], primary=primary, margin=results.get("margin"),
            alone=variants[group[0]["model"]] == 1,
        )
        for name, group in groups.items()
    ]  # fmt: skip
    return [each for each in found if each.diverged() or each.compared()]


def named_before(a: Measured, b: Measured) -> Pair | None:
    """The comparison of two models as it was named before the runs: by the results.json that has both, or by those of both. None where it was not."""
    one_file = a.place[0] == b.place[0]
    for x, y in a.primary:
        if not (one_file or (x, y) in b.primary or (y, x) in b.primary):
            continue
        if (a.was_called(x) and b.was_called(y)) or (a.was_called(y) and b.was_called(x)):
            return x, y
    return None


def named_now(a: Measured, b: Measured, pairs: Sequence[Pair]) -> Pair | None:
    """The one of ``pairs`` that is the comparison of two models, in either order."""
    return next(((x, y) for x, y in pairs if (a.is_called(x) and b.is_called(y)) or (a.is_called(y) and b.is_called(x))), None)


def in_named_order(a: Measured, b: Measured, now: Sequence[Pair]) -> tuple[Measured, Measured]:
    """The two models, the one first that is named first, before the runs or ``now``: "no loss" is claimed of it."""
    pair = named_before(a, b) or named_now(a, b, now)
    return (a, b) if pair is None or a.is_called(pair[0]) else (b, a)


def ranked(models: Sequence[Measured]) -> list[Measured]:
    """The models with a finite loss, from the lowest mean on."""
    finite = [each for each in models if each.compared()]
    return sorted(finite, key=lambda each: math.fsum(row["val_nats_per_token"] for row in each.compared()) / len(each.compared()))


def over_the_first(models: Sequence[Measured]) -> dict[Place, Difference]:
    """How far each of the `ranked` models is above the first, by place, as far as they have a seed in common.

    Holm's correction counts every pair of the models that was not named primary: which one is the lowest was not known before.
    """
    pairs = {(a.place, b.place): (a, b) for b, a in combinations(models, 2)}
    found = {key: summary for key, (a, b) in pairs.items() if (summary := difference(a, b)) is not None}
    known = corrected(found, [key for key, (a, b) in pairs.items() if named_before(a, b)])
    return {above: each for (above, below), each in known.items() if below == models[0].place}


def over_the_lowest(models: Sequence[Measured]) -> tuple[str, dict[str, Difference]]:
    """The model of the lowest mean loss, and how far the others of its results.json are above it, as `over_the_first` counts it.

    Returns:
        Its name, empty where no training ended with a finite loss, and the differences by name.
    """
    finite = ranked(models)
    return (finite[0].name, {name: each for (_, name), each in over_the_first(finite).items()}) if finite else ("", {})


def difference_words(difference: Summary | None, digits: int = 4) -> str:
    """A difference with its interval as a table's cell; empty for None."""
    if difference is None:
        return ""
    if difference.half_width == math.inf:
        return f"{difference.mean:+.{digits}f} (one seed)"
    return with_interval(difference.mean, difference.half_width, digits)


def with_interval(value: float, half_width: float, digits: int = 4) -> str:
    """A difference and half its interval, and a plain word where that holds zero."""
    said = f"{value:+.{digits}f} ± {half_width:.{digits}f}"
    return said if abs(value) > half_width else f"{said}: {NO_DIFFERENCE}"


def primary_pairs(given: Sequence[str], known: Sequence[str]) -> list[Pair]:
    """``a:b`` for each primary comparison; where names hold a colon themselves (hf:llama), it is split where both sides are known.

    Raises:
        InputError: for an unknown name, a model with itself, or more than three comparisons.
    """
    found: list[Pair] = []
    for text in given:
        places = [i for i, character in enumerate(text) if character == ":"]
        halves = [(text[:i], text[i + 1 :]) for i in places]
        fitting = [(a, b) for a, b in halves if a in known and b in known]
        if not fitting:
            if len(halves) == 1:
                raise unknown_name("model of primary", next(name for name in halves[0] if name not in known), known)
            raise InputError(f"primary is {text!r}: use MODEL:MODEL, of {', '.join(dict.fromkeys(known))}")
        if fitting[0][0] == fitting[0][1] and known.count(fitting[0][0]) < 2:
            raise InputError(f"primary is {text!r}, a model with itself: name two models")
        found.append(fitting[0])
    if len(found) > MOST_PRIMARY:
        raise InputError(f"primary names {len(found)} comparisons: name at most {MOST_PRIMARY}, the others carry Holm's correction")
    return found


def find(place: str) -> list[Measured]:
    """The models of ``DIR``, ``DIR:MODEL``, or the same with a results.json in place of its folder.

    Raises:
        InputError: where there is no such file or model.
    """
    path, model = Path(place), None
    if not path.exists() and ":" in place:
        # The folder is the shortest that exists: a model's name may hold a colon itself.
        halves = [(place[:i], place[i + 1 :]) for i, character in enumerate(place) if character == ":"]
        before, model = next((half for half in halves if Path(half[0]).exists()), halves[-1])
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


def pairs_of(places: Sequence[str]) -> list[tuple[Measured, Measured]]:
    """What to compare: within one place every pair of its models; of two places one with every other, or where both hold several, those of one name.

    More than two places are compared two by two. No pair comes twice.

    Raises:
        InputError: where there is nothing to compare.
    """
    if not places:
        raise InputError("results is empty: name two or more DIR or DIR:MODEL, or one DIR of several models")
    found = [find(place) for place in places]
    if len(found) == 1:
        wanted = list(combinations(found[0], 2))
        if not wanted:
            raise InputError(f"{places[0]} has {found[0][0].name} alone: name a second DIR or DIR:MODEL")
        return wanted
    pairs: dict[frozenset[Place], tuple[Measured, Measured]] = {}
    for first, second in combinations(range(len(found)), 2):
        one_with_all = len(found[first]) == 1 or len(found[second]) == 1
        some = [(a, b) for a in found[first] for b in found[second] if a.place != b.place and (one_with_all or a.name == b.name)]
        if not some:
            names = [" ".join(each.name for each in found[i]) for i in (first, second)]
            raise InputError(f"{places[first]} has {names[0]}, {places[second]} has {names[1]}: name one model of each, as DIR:MODEL")
        for a, b in some:
            pairs.setdefault(frozenset((a.place, b.place)), (a, b))
    return list(pairs.values())

