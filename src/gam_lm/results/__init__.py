"""results.json: what every measuring command writes as it goes, and every table and plot is made from. Imports no torch.

    {"command", "commands": ["gam bench …", …], "environment": {device, processor, cores, memory_gb, python, torch, commit, dirty},
     "corpus": {name, sha256, tokens, bytes, tokenizer, …}, "primary": [["gam", "llama"], …], "margin": 0.02, "rows": [{…}, …]}

``command`` is the last one that added a row, ``commands`` are all of them where there were several, in files of before they were kept the last one alone.
``primary`` and ``margin`` are there where they were named before the runs. The losses by block of a row's ``val_blocks`` and ``test_blocks`` lie in files beside it.
A row of a training that diverged says ``"diverged": true``.

A row is known by IDENTITY together with the corpus: a repeated command skips the rows that are there. Figures carry their unit in the name.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.registry import options_class
from gam_lm.results.blocks import measured_on, read_blocks, read_documents, write_blocks
from gam_lm.results.schema import checked_content
from gam_lm.runtime.files import explained, write_text
from gam_lm.training.recipe import BEFORE_MUON, TrainConfig, free_to_change

__all__ = [
    "CONFIGURATIONS", "IDENTITY", "MOST_PRIMARY", "OF_NO_INFLUENCE", "Results", "fields_set", "identity", "measured_on", "read_blocks", "read_documents", "read_results",
    "results_file", "write_blocks",
]  # fmt: skip

IDENTITY = (
    "model", "seed", "backend", "model_config", "train_config", "sequence_length", "batch_size", "task", "pairs", "vocab", "gap_power", "filler", "stop_at",
    "split", "context", "dtype", "variant",
)  # fmt: skip
"""The keys of a row that tell it from the others, as far as it has them."""

CONFIGURATIONS: Mapping[str, type[Any]] = {"model_config": ModelConfig, "train_config": TrainConfig}
"""The keys of a row that hold a configuration, and its class."""

MOST_PRIMARY = 3
"""Primary comparisons are few, for none of them carries a correction."""

Row = Mapping[str, Any]


class Results:
    """One results.json; made by `open`. A row is on the disk when `add` returns."""

    def __init__(self, path: Path, content: dict[str, Any], environment: dict[str, Any], command: str) -> None:
        self.path = path
        self._command = command
        self._content = content
        self._environment = environment

    @classmethod
    def open(cls, path: Path, *, command: str, environment: Mapping[str, Any], corpus: Mapping[str, Any] | None) -> Results:
        """Start a file, or go on with the one that is there.

        Raises:
            InputError: where the file is broken, of another corpus, or cannot be written.
        """
        if not path.exists():
            content = {"command": command, "environment": _plain(environment), "corpus": _plain(corpus), "rows": []}
            with explained(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                if not path.exists():  # another process may have begun, and added rows
                    write_text(path, json.dumps(content, indent=1) + "\n")
        content = read_results(path)
        if content["corpus"] != _plain(corpus):
            raise InputError(f"{path} holds results of another corpus or tokenizer: choose a new folder, or give the same data")
        return cls(path, content, _plain(environment), command)

    def name_primary(self, pairs: Sequence[tuple[str, str]], margin: float | None) -> None:
        """Write down the primary comparisons and the margin of "no loss" before the first model is trained.

        What was named before stays. Where trainings are there already, a comparison may be added of a model that was not trained yet; the margin stays.

        Raises:
            InputError: where a comparison is named after both of its models were trained, or the margin after the first training; or for more than
                three comparisons in all.
        """
        with _locked(self.path):
            self._content = read_results(self.path)
            trained = {row["model"] for row in self._content["rows"] if not row.get("floor")}
            before, held = self._content.get("primary", []), self._content.get("margin")
            added = [list(pair) for pair in pairs if list(pair) not in before]
            late = [f"primary is {a}:{b}, and both were trained" for a, b in added if {a, b} <= trained]
            if margin is not None and margin != held and trained:
                late.append(f"margin is {margin}, and {'none was named' if held is None else f'{held} was named'}")
            if late:
                raise InputError(f"{self.path} has trainings: {late[0]}: it is named before the runs, choose a new folder or leave the flag out")
            named = [*before, *added] if trained or not pairs else [list(pair) for pair in pairs]
            if len(named) > MOST_PRIMARY:
                raise InputError(f"primary names {len(named)} comparisons in {self.path}: name at most {MOST_PRIMARY}, the others carry Holm's correction")
            new: dict[str, Any] = ({} if named == before else {"primary": named}) | ({} if margin in (None, held) else {"margin": margin})
            if new:
                rows = self._content.pop("rows")
                self._content |= new | {"rows": rows}
                write_text(self.path, json.dumps(self._content, indent=1) + "\n")

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return list(self._content["rows"])

    def reread(self) -> None:
        """Take in what other processes have added."""
        with _locked(self.path):
            self._content = read_results(self.path)

    def find(self, wanted: Row) -> dict[str, Any] | None:
        """The row with the identity of ``wanted``, or None."""
        key = identity(wanted)
        return next((row for row in self._content["rows"] if identity(row) == key), None)

    def add(self, row: Row) -> None:
        """Write a row, in place of one with the same identity. Another process may be adding to the same file.

        A row measured elsewhere than the file's first carries its own ``environment``.

        Raises:
            ValueError: for a figure that is not finite.
        """
        new: dict[str, Any] = _plain(row)
        _check_finite(new, str(new.get("model", "row")))
        with _locked(self.path):
            self._content = read_results(self.path)
            self._content = _with_command(self._content, self._command)
            if self._environment != self._content["environment"]:
                new["environment"] = self._environment
            key = identity(new)
            rows = self._content["rows"]
            same = [i for i, other in enumerate(rows) if identity(other) == key]
            if same:
                rows[same[0]] = new
            else:
                rows.append(new)
            write_text(self.path, json.dumps(self._content, indent=1) + "\n")

    def amend(self, row: Row, figures: Mapping[str, Any]) -> None:
        """Write further figures into a row that is there. Raises ValueError for a figure that is not finite, KeyError where there is no such row."""
        new: dict[str, Any] = _plain(figures)
        _check_finite(new, str(row.get("model", "row")))
        with _locked(self.path):
            self._content = read_results(self.path)
            there = self.find(row)
            if there is None:
                raise KeyError(identity(row))
            there |= new
            write_text(self.path, json.dumps(self._content, indent=1) + "\n")


def _with_command(content: Mapping[str, Any], command: str) -> dict[str, Any]:
    """``content`` with the command that adds a row now, and with all that did where there are several; a file of before says its last one alone."""
    before = content.get("commands", [content["command"]] if content["rows"] else [])
    said = [*(each for each in before if each != command), command]
    rest = {key: value for key, value in content.items() if key not in ("command", "commands")}
    return {"command": command, **({"commands": said} if len(said) > 1 else {}), **rest}


def identity(row: Row) -> str:
    """What tells a row from the others, as text. A configuration's fields that are younger than the row have their default values."""
    return json.dumps({key: fields_set(row, key) if key in CONFIGURATIONS else row[key] for key in IDENTITY if key in row}, sort_keys=True)


def fields_set(row: Row, key: str) -> dict[str, Any]:
    """The fields of a row's ``model_config`` or ``train_config`` that do not have their default value, those aside that change no figure.

    The options of a model's mixer stand among them under their own names, those of several mixers as ``mixer.option``.
    """
    values = dict(row.get(key, {}))
    if key == "train_config" and values:
        values = {**BEFORE_MUON, **values}
    options: Mapping[str, Mapping[str, Any]] = values.pop("options", {})
    defaults = {field.name: field.default for field in dataclasses.fields(CONFIGURATIONS[key]) if field.default is not dataclasses.MISSING}
    found = {
        name: value for name, value in values.items()
        if name not in free_to_change(row.get("train_config", {})) and (name not in defaults or value != _plain(defaults[name]))
    }  # fmt: skip
    for mixer, fields in options.items():
        own = _options_set(mixer, json.dumps(fields, sort_keys=True), values.get("hidden_size"))
        found |= {name if len(options) == 1 else f"{mixer}.{name}": fields[name] for name in own}
    return found


@lru_cache(maxsize=4096)
def _options_set(mixer: str, fields: str, hidden_size: int | None) -> tuple[str, ...]:
    """The names of a mixer's options, given as JSON, that neither have their default value nor follow from the width and from the other options."""
    given: dict[str, Any] = json.loads(fields)
    try:
        kind = options_class(mixer)
    except InputError:  # registered elsewhere: all is said
        return tuple(given)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}

    def follows(name: str) -> bool:
        try:
            others = kind(**{each: value for each, value in given.items() if each != name})
            return hidden_size is not None and bool(getattr(others.resolved(hidden_size), name) == given[name])
        except (InputError, TypeError):
            return False

    return tuple(name for name, value in given.items() if name not in defaults or (value != defaults[name] and not follows(name)))


def results_file(out: Path) -> Path:
    """The results.json of an output folder. Raises InputError for a folder that holds something else."""
    path = out / "results.json"
    if (out / "recipe.json").is_file():
        raise InputError(f"out is {str(out)!r}, which is the run directory of a training: choose a new folder")
    if out.is_dir() and any(out.iterdir()) and not path.is_file():
        raise InputError(f"out is {str(out)!r}, which is not empty and has no results.json: choose a new folder")
    return path


def read_results(path: Path | str) -> dict[str, Any]:
    """The content of a results.json. Raises InputError where it is missing or broken."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"results {str(path)!r}: there is no such file") from error
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"results {str(path)!r} cannot be read ({error}): restore the file, or move it away to start anew") from error
    if not isinstance(content, dict) or not {"command", "environment", "corpus", "rows"} <= content.keys():
        raise InputError(f"results {str(path)!r} is no results.json of this library: it needs command, environment, corpus and rows")
    return checked_content(content, path)


def _plain(value: Any) -> Any:
    """``value`` as JSON gives it back."""
    return json.loads(json.dumps(value))


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: a row holds finite figures only")
    if isinstance(value, dict):
        for key, each in value.items():
            _check_finite(each, f"{where}.{key}")
    elif isinstance(value, list):
        for each in value:
            _check_finite(each, where)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the file against other processes and threads."""
    try:
        import fcntl
    except ImportError:  # Windows
        with explained(path), FileLock(path.with_name(".results.lock")):
            yield
        return
    with explained(path), path.with_name(".results.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
