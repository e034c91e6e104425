"""Whether trials are of the study that is asked for, or of the runs that take its recipes. What a study is of stands in its rows. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, shortened
from gam_lm.experiments.search import Numbered, Point, Range, best_rows, key_of, points
from gam_lm.results import fields_set
from gam_lm.training.recipe import TrainConfig

Row = Mapping[str, Any]


def trials_of(rows: Sequence[Row]) -> list[Row]:
    """The rows that are trials of a study."""
    return [row for row in rows if "trial" in row and "tuned" in row]


def check_rows(rows: Sequence[Row], space: Sequence[Range], recipe: TrainConfig, models: Mapping[str, ModelConfig], out: Path) -> None:
    """Raise InputError where a trial has another recipe, other searched fields or another model of its name than the study; further models are no matter."""
    fields = sorted(each.field for each in space)
    for row in trials_of(rows):
        if sorted(row["tuned"]) != fields:
            raise InputError(f"search is of {', '.join(fields)}, and the trials in {out} are of {', '.join(sorted(row['tuned']))}: choose a new folder")
        _same("recipe", "train_config", recipe.to_dict(), row, fields, out)
        if row["model"] in models:
            _same(row["model"], "model_config", models[row["model"]].to_dict(), row, (), out)


def check_points(known: Sequence[Numbered], space: Sequence[Range], recipe: TrainConfig, out: Path) -> None:
    """Raise InputError where the first trial that is known is not the first of the study: its ranges, or its seed, were others."""
    first = [values for index, values in known if index == 0]
    wanted = points(space, 1, recipe.seed)[0]
    if first and key_of(wanted) not in {key_of(values) for values in first}:
        asked = " ".join(f"{each.field}={each.low:g}:{each.high:g}" for each in space)
        raise InputError(f"search is {asked}, and the study in {out} began with {_said(first[0])}, of other ranges or another seed: choose a new folder")


def check_finished(finished: Sequence[tuple[str, Point]], rows: Sequence[Row], out: Path, storage: str) -> None:
    """Raise InputError where a database has finished trials, as (model, values), whose rows are not in the folder: its table would lack them."""
    there = {(row["model"], key_of(row["tuned"])) for row in trials_of(rows)}
    lost = [name for name, values in finished if (name, key_of(values)) not in there]
    if lost:
        raise InputError(
            f"storage is {storage}, with {len(lost)} finished trials ({', '.join(dict.fromkeys(lost))}) that {out / 'results.json'} does not have: "
            "give the --out that they were made with, or another --storage"
        )


def check_corpus(study: Mapping[str, Any], corpus: Mapping[str, Any], tuned: Path) -> None:
    """Raise InputError where a study was made on another text than the runs that take its recipes; its ``corpus`` and theirs as of results.json."""
    if study["corpus"].get("sha256") != corpus.get("sha256"):
        raise InputError(f"tuned is {str(tuned)!r}, a study on another text ({study['corpus'].get('name')}): give the same --data, or tune on this text")


def check_not_tuned(rows: Sequence[Row], swept: Mapping[str, Sequence[float]], tuned: Path) -> None:
    """Raise InputError where a number that has several values is one that the study found: the best of it would be put in the place of each."""
    for field in swept:
        if any(field in row["tuned"] for row in trials_of(rows)):
            raise InputError(f"{field} has several values, and --tuned {tuned} gives one: give none of it, or leave --tuned out")


def told_apart(rows: Sequence[Row], models: Mapping[str, tuple[ModelConfig, TrainConfig]], swept: Collection[str] = ()) -> list[str]:
    """In what the best trial of each model differs from the run that takes its recipe, as "steps is 3 in the study and 20 here (gam)", seeds and what is swept aside.

    A longer horizon may be meant; another width rarely is.
    """
    said: dict[str, list[str]] = {}
    for name, row in best_rows(rows).items():
        if name in models:
            config, recipe = models[name]
            for key, wanted in (("model_config", config.to_dict()), ("train_config", recipe.to_dict())):
                for field, here, there in _differing(key, wanted, row, (*row["tuned"], "seed", *swept)):
                    said.setdefault(f"{field} is {there} in the study and {here} here", []).append(name)
    return [f"{each} ({', '.join(names)})" for each, names in said.items()]


def _same(what: str, key: str, wanted: Mapping[str, Any], row: Row, aside: Sequence[str], out: Path) -> None:
    for field, here, there in _differing(key, wanted, row, aside):
        raise InputError(f"{field} of the {what} is {here}, and the trials in {out} have {there}: give the same, or choose a new folder")


def _differing(key: str, wanted: Mapping[str, Any], row: Row, aside: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """The fields of a configuration in which ``wanted`` and a row differ, with both values in words."""
    asked, there = fields_set({key: wanted}, key), fields_set(row, key)
    for field in sorted({*asked, *there} - {*aside}):
        if asked.get(field) != there.get(field):
            here, before = (shortened(each[field]) if field in each else "the default" for each in (asked, there))
            yield field, here, before


def _said(values: Point) -> str:
    return ", ".join(f"{field} {value:g}" for field, value in values.items())
