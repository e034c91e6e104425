"""The plan and the figures of a run in its directory: recipe.json and metrics.jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gam_lm.checkpoint import read_json
from gam_lm.config import ModelConfig
from gam_lm.data.tokens import TokenCorpus
from gam_lm.errors import InputError
from gam_lm.runtime.files import explained, remove_leftovers, write_text
from gam_lm.runtime.ownership import is_bookkeeping
from gam_lm.training.recipe import TrainConfig, free_to_change


def check_claimable(directory: Path) -> None:
    """Raise InputError for a place that holds something else than a run, before anything is written there."""
    with explained(directory):
        if (directory / "recipe.json").exists():
            return
        if directory.is_file() or (directory.is_dir() and not all(is_bookkeeping(path) for path in directory.iterdir())):
            raise InputError(f"out is {str(directory)!r}, which is not empty and no run directory: choose a new folder")


def claim(directory: Path, config: ModelConfig, recipe: TrainConfig, corpus: TokenCorpus, plan: Mapping[str, object] | None = None) -> None:
    """Write recipe.json, or see that the one that is there is of the same run. Its owner calls this (see gam_lm.runtime.ownership).

    A ``plan`` is written as well; one that is there stays where none is given.

    Raises:
        InputError: for a folder that holds something else, or a broken recipe.json.
    """
    check_claimable(directory)
    remove_leftovers(directory / "state")
    path = directory / "recipe.json"
    described = {"model_config": config.to_dict(), "train_config": recipe.to_dict(), "corpus": corpus_figures(corpus)}
    if plan is not None:
        described["plan"] = dict(plan)
    if path.exists():
        found = read_json(path)
        if plan is None and "plan" in found:
            described["plan"] = found["plan"]
        try:
            differs = _differences(found, config, recipe, corpus)
        except (KeyError, TypeError, AttributeError, ValueError, InputError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise InputError(f"{path} is broken ({reason}): copy it again or choose a new folder") from error
        if differs:
            raise InputError(
                f"out is {str(directory)!r}, which holds another run ({'; '.join(differs)}): choose a new folder, "
                "or give the same model, recipe and data to go on with it"
            )
    text = json.dumps(described, indent=2) + "\n"
    if path.exists():
        with explained(path, "read"):
            if path.read_text(encoding="utf-8") == text:
                return
    write_text(path, text)


def _differences(found: dict[str, Any], config: ModelConfig, recipe: TrainConfig, corpus: TokenCorpus) -> list[str]:
    """What of the run in recipe.json is not as it is asked for, the first fields of each kind."""
    kept_recipe = TrainConfig.from_dict(found["train_config"])
    kept = {
        "model": ModelConfig.from_dict(found["model_config"]).to_dict(),
        "recipe": {} if kept_recipe.same_run(recipe) else kept_recipe.to_dict(),
        "data": dict(found["corpus"]),
    }
    asked = {"model": config.to_dict(), "recipe": recipe.to_dict() if kept["recipe"] else {}, "data": corpus_figures(corpus)}
    says = []
    for kind, values in kept.items():
        fields = [key for key in {**values, **asked[kind]} if key not in free_to_change(values) and values.get(key) != asked[kind].get(key)]
        if fields:
            first = fields[0]
            more = f" and {len(fields) - 1} more" if len(fields) > 1 else ""
            says.append(f"its {kind} has {first} {values.get(first)!r}, not {asked[kind].get(first)!r}{more}")
    return says


def trained_with(directory: Path) -> TrainConfig | None:
    """The recipe that a run directory's model was trained with, None where recipe.json is not there. Raises InputError where it is broken."""
    path = directory / "recipe.json"
    if not path.is_file():
        return None
    found = read_json(path).get("train_config")
    try:
        return TrainConfig.from_dict(found)  # type: ignore[arg-type]
    except InputError as error:
        raise InputError(f"{path} is broken ({error}): copy it again, or remove it") from error


def corpus_figures(corpus: TokenCorpus) -> dict[str, Any]:
    """What identifies a corpus in recipe.json and results.json."""
    train = corpus.splits["train"]
    return {
        "name": corpus.name, "sha256": corpus.sha256, "tokens": train.tokens, "bytes": train.bytes, "tokenizer": corpus.tokenizer_name,
        "tokenizer_sha256": corpus.tokenizer_sha256, "vocab_size": corpus.vocab_size,
    }  # fmt: skip


class Metrics:
    """metrics.jsonl: one line for each record of a run.

    Args:
        path: of the file.
        step: the last step whose line is kept; later ones are of a killed run and come again.

    Raises:
        InputError: for a line that is broken, other than the last, which a kill may have cut.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        with explained(path, "read"):
            content = path.read_bytes() if path.exists() else b""
        kept = []
        for number, line in enumerate(content.split(b"\n")[:-1], 1):  # what follows the last line break is nothing, or a line that was cut
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + b"\n")
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"{path} is broken in line {number}: remove the line or start a new run") from error
        if b"".join(kept) != content:
            write_text(path, b"".join(kept).decode())

    def append(self, figures: dict[str, Any]) -> None:
        """Add a line. Raises InputError where there is no room."""
        with explained(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(figures, allow_nan=False) + "\n")

    def sync(self) -> None:
        """Bring all lines onto the disk, as a state that counts on them must."""
        if self._path.exists():
            with explained(self._path), self._path.open("rb+") as file:
                os.fsync(file.fileno())
