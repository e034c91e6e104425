"""The rows of a results.json, sorted for a table: which are trainings of one and the same thing, and what each is called."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from gam_lm.results import CONFIGURATIONS, fields_set

Row = Mapping[str, Any]

OF_ONE_TRAINING = frozenset({"seed", "validate_every", "checkpoint_every"})
"""Fields that may differ between trainings of one and the same thing."""

FOLLOWS = "intermediate_size"
"""The field that equal parameters fill in: it is not said where the others tell variants apart."""


def trained(results: Mapping[str, Any]) -> list[Row]:
    """The rows of models."""
    return [row for row in results["rows"] if not row.get("floor")]


def floors(results: Mapping[str, Any]) -> list[Row]:
    """The rows of what counting, or a compressor, gets."""
    return [row for row in results["rows"] if row.get("floor")]


def floor_name(row: Row) -> str:
    """What a floor is called in a table or a picture."""
    return "xz" if row["model"] == "xz" else f"{row['model']} counts"


def by_model(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by model, in the order in which the models first appear."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["model"], []).append(row)
    return found


def by_variant(rows: Iterable[Row], named: Iterable[str] = (), aside: Callable[[Row], Collection[str]] = lambda row: ()) -> dict[str, list[Row]]:
    """Rows by model and configuration.

    Where a model's rows differ in more than their seed, the name says in which fields: ``full (initialization=paper)``; in the width of the feed-forward
    network, which equal parameters fill in, only where nothing else tells them apart. It says the fields ``named`` in any case, as far as they do not
    have their default value; the fields that are ``aside`` for a row make no difference.
    """
    found: dict[str, list[Row]] = {}

    def fields_of(row: Row) -> dict[str, Any]:
        left_aside = aside(row)
        return {name: value for name, value in _fields(row).items() if name not in left_aside}

    for model, group in by_model(rows).items():
        variants: dict[str, list[Row]] = {}
        for row in group:
            variants.setdefault(json.dumps(fields_of(row), sort_keys=True), []).append(row)
        settings = [fields_of(some[0]) for some in variants.values()]
        said = {*named, *differing(settings)}
        without = [json.dumps({name: value for name, value in fields.items() if name != FOLLOWS}, sort_keys=True) for fields in settings]
        if FOLLOWS not in named and len(set(without)) == len(without):
            said.discard(FOLLOWS)
        for some, fields in zip(variants.values(), settings, strict=True):
            words = [f"{name}={fields[name]}" for name in sorted(said) if name in fields]
            found[f"{model} ({', '.join(words)})" if words else model] = some
    return found


def by_network(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of speed or memory by model and configuration, whatever length of text or positions a row was measured at."""
    return by_variant(rows, aside=lambda row: ("context", "max_position_embeddings"))


def common_curve(group: Iterable[Row]) -> dict[int, list[float]]:
    """The validation losses of several trainings by training tokens, where all of them were validated."""
    curves = [{point["tokens"]: point["val_nats"] for point in row.get("curve", ())} for row in group]
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return {tokens: [curve[tokens] for curve in curves] for tokens in sorted(common)}


def differing(settings: Sequence[Mapping[str, Any]]) -> set[str]:
    """The fields that are not the same in all of several configurations."""
    return {name for each in settings for name in each if any(other.get(name) != each[name] for other in settings)}


def settings_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What each row was made with, as far as it is not the default; fields of one training, as the seed is, are left out."""
    return [_fields(row) for row in rows]


def same_but(row: Row, other: Row, names: Iterable[str]) -> bool:
    """Whether two rows have the same configuration, the fields ``names`` and those of one training left aside."""
    left_aside = {each for name in names for each in (name, name.rpartition(".")[2])}
    first, second = ({name: value for name, value in _fields(each).items() if name not in left_aside} for each in (row, other))
    return first == second


def _fields(row: Row) -> dict[str, Any]:
    """What a row was made with, as far as it is not the default."""
    fields = {name: value for key in CONFIGURATIONS for name, value in fields_set(row, key).items() if name not in OF_ONE_TRAINING}
    return fields | ({"implementation": row["backend"]} if "backend" in row else {})


def by_setting(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by what must be equal for a comparison of times: batch size, number format, eager or compiled."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["batch_size"], row["dtype"], row["variant"]), []).append(row)
    return found


def setting_name(setting: tuple[Any, ...]) -> str:
    """What a setting is called in a table or a picture."""
    batch, dtype, variant = setting
    return f"batch {batch}, {dtype}{' autocast' if dtype not in ('fp32', 'int8') else ''}, {variant}"


def machine_line(results: Mapping[str, Any]) -> str:
    """Where times come from, and what rows say of their models."""
    return f"{_machine(results['environment'])}.{elsewhere(results)}{footnotes(results['rows'])}"


def _machine(machine: Mapping[str, Any]) -> str:
    return f"{machine.get('device')}, {machine.get('processor')}, {machine.get('cores')} cores, torch {machine.get('torch')}"


def elsewhere(results: Mapping[str, Any]) -> str:
    """Which rows were measured on other machines than the file's first, by machine; empty where none was. It follows a sentence."""
    rows: dict[str, dict[str, list[Row]]] = {}
    for row in results["rows"]:
        machine = _machine(row.get("environment", results["environment"]))
        if machine != _machine(results["environment"]):
            rows.setdefault(machine, {}).setdefault(row["model"], []).append(row)
    everywhere = by_model(results["rows"])
    return "".join(f" Measured on {machine}: {', '.join(_which(group, everywhere[name]) for name, group in some.items())}." for machine, some in rows.items())


TELLS = {"seed": "seed", "hidden_size": "width", "sequence_length": "length", "context": "context", "batch_size": "batch", "dtype": "", "variant": ""}
"""What tells the rows of a model apart in a footnote, and the word before it."""


def _which(group: Sequence[Row], whole: Sequence[Row]) -> str:
    """A model's name, and which of its rows are meant where it has more than these."""
    if len(group) == len(whole):
        return str(group[0]["model"])
    told = [{key: {**row.get("model_config", {}), **row}.get(key) for key in TELLS} for row in group]
    all_told = [{key: {**row.get("model_config", {}), **row}.get(key) for key in TELLS} for row in whole]
    words = []
    for key, word in TELLS.items():
        values = list(dict.fromkeys(str(each[key]) for each in told if each[key] is not None))
        if values and len({each[key] for each in all_told}) > len(values):
            words.append(f"{word} {' '.join(values)}".strip())
    return f"{group[0]['model']} ({', '.join(words) or f'{len(group)} of {len(whole)} rows'})"


def footnotes(rows: Iterable[Row]) -> str:
    """What the ``note`` of rows says, with the models of which it says it; empty where none has one. It follows a sentence."""
    models: dict[str, dict[str, None]] = {}
    for row in rows:
        if "note" in row:
            models.setdefault(row["note"], {})[row["model"]] = None
    return "".join(f" {', '.join(names)}: {note}." for note, names in models.items())


ERRORS = "Largest error against fp64: output, state"
"""The head of a column of `errors_of`."""


def errors_of(row: Row) -> str:
    """The largest errors of outputs and state against float64, as far as a row has them."""
    return ", ".join(f"{row[key]:.0e}" for key in ("output_error", "state_error") if key in row)


def three_digits(value: float | None) -> str:
    """A figure with the three digits that count; nothing for None."""
    if value is None:
        return ""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"
