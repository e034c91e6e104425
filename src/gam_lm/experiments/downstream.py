"""BLiMP, LAMBADA, ARC-easy and PIQA for trained models and for counts, through lm-evaluation-harness: row by row into results.json."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import numpy as np
import torch

from gam_lm.checkpoint import needed, read_json
from gam_lm.data.task_files import FORMS, find
from gam_lm.data.tokens import TokenCorpus, prepare
from gam_lm.errors import InputError, MissingExtraError, unknown_name
from gam_lm.experiments.floors import COUNTED, Counts
from gam_lm.results import Results, identity
from gam_lm.runtime.progress import progress
from gam_lm.training.directory import corpus_figures, trained_with

logger = logging.getLogger("gam_lm")

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Downstream:
    """What is measured, and how."""

    runs: Sequence[Path]
    """Run directories, also of baselines."""
    tasks: Sequence[str]
    """Of gam_lm.data.task_files.FORMS."""
    data: str | None = None
    """Text whose training split is counted for the floors; None leaves the floors out."""
    context: int | None = None
    """Most tokens of a request; by default what each model was trained with. A longer passage loses its beginning."""
    examples: int | None = None
    """Of each task, and of each paradigm of BLiMP, the first so many."""
    batch_size: int = 16
    """Requests of ``context`` tokens at once."""


def downstream(wanted: Downstream, results: Results | None, device: torch.device) -> list[Row]:
    """Measure what ``results`` does not have. Each row is written as soon as it comes; a run whose weights have changed is measured anew.

    A row has the harness's figures of a task: ``acc`` and its standard error ``acc_stderr``; for LAMBADA also ``perplexity`` (of a last word) and ``nats``; for
    ARC-easy and PIQA ``acc_norm``. BLiMP's ``acc`` is the mean over its paradigms; ``phenomena`` and ``paradigms`` have the parts.

    Returns:
        All rows that were wanted, those that were there among them.

    Raises:
        InputError: for an unknown task, a file that is missing, or a run that cannot be measured; before anything is.
        MissingExtraError: without lm_eval.
    """
    for task in wanted.tasks:
        if task not in FORMS:
            raise unknown_name("task", task, FORMS)
    runs = [_run(path, wanted) for path in wanted.runs]
    _check_apart([(path, row) for path, row in zip(wanted.runs, runs, strict=True)])
    for task in wanted.tasks:
        for part in _harness().own_tasks(task):
            find(task, part.file)

    measured: list[Row] = []
    floors = list(_floors(wanted))
    with progress("tasks", len(wanted.tasks) * (len(runs) + len(floors)), "rows") as bar:

        def measure(row: Row, scored: Callable[[], Any]) -> None:
            for task in wanted.tasks:
                full = row | {"task": task, "examples": wanted.examples, "lm_eval": version("lm_eval")}
                there = None if results is None else results.find(full)
                if there is None or any(there.get(key) != value for key, value in full.items() if key in ("weights_sha256", "corpus", "examples")):
                    bar.now(f"{row['model']}, {task}")
                    there = full | _figures(task, scored(), wanted.examples)
                    logger.info("%s: %s", row["model"], words(there))
                    if results is not None:
                        results.add(there)
                measured.append(there)
                bar.advance()

        for row, scored in floors:
            measure(row, scored)
        for path, row in zip(wanted.runs, runs, strict=True):
            measure(row, cache(lambda path=path, row=row: _model(path, row["context"], wanted.batch_size, device)))
    return measured


def words(row: Mapping[str, Any]) -> str:
    """A row's task with its figures."""
    found = [f"{key} {row[key]:.4g} ± {row[f'{key}_stderr']:.2g}" for key in ("acc", "acc_norm", "perplexity") if f"{key}_stderr" in row]
    return f"{row['task']} {', '.join(found)}"


def _run(path: Path, wanted: Downstream) -> Row:
    """What tells a run's rows from others. Raises InputError where the run cannot be measured."""
    config = read_json(needed(path, "config.json"))
    recipe = trained_with(path)
    described = read_json(path / "recipe.json").get("model_config", config) if recipe else config
    longest = config.get("max_position_embeddings", 1024)
    context = wanted.context or (recipe and recipe.context) or longest
    if config.get("positions") == "learned" and context > longest:
        raise InputError(f"context is {context}, learned positions end at {longest}: use a shorter context")
    name, seed = path.resolve().name, None if recipe is None else recipe.seed
    row = {"model": name.removesuffix(f"-seed{seed}"), "seed": seed, "model_config": described, "context": context, "weights_sha256": _weights(path)}
    return row if recipe is None else row | {"train_config": recipe.to_dict()}


def _weights(path: Path) -> str:
    """The checksum of a run's weights."""
    digest = hashlib.sha256()
    for file in sorted(path.glob("model*.safetensors")) or [needed(path, "model.safetensors")]:
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _check_apart(runs: Sequence[tuple[Path, Row]]) -> None:
    """Raise InputError where two runs would make the same row."""
    seen: dict[str, Path] = {}
    for path, row in runs:
        other = seen.setdefault(identity(row), path)
        if other is not path:
            raise InputError(f"runs {str(other)!r} and {str(path)!r} have the same name, model and recipe: give each once, or rename one")


def _floors(wanted: Downstream) -> Iterable[tuple[Row, Callable[[], Any]]]:
    """The floors under each of the runs' tokenizers."""
    if wanted.data is None:
        logger.info("the floors are left out: --data names the text to count")
        return
    seen = set()
    for path in wanted.runs:
        corpus = prepare(wanted.data, tokenizer=str(needed(path, "tokenizer.json")), only=("train",))
        if corpus.tokenizer_sha256 in seen:
            continue
        seen.add(corpus.tokenizer_sha256)
        counts = cache(lambda corpus=corpus: _counts(corpus))
        for name, kind in COUNTED.items():
            # the tokenizer in the variant: it changes what is counted, and rows are told apart by it
            row = {"model": name, "seed": None, "floor": True, "variant": f"{corpus.name} {corpus.tokenizer_sha256[:8]}", "corpus": corpus_figures(corpus)}
            yield row, cache(lambda kind=kind, counts=counts, path=path: _harness().scored_counts(kind(counts()), path))


def _counts(corpus: TokenCorpus) -> Counts:
    return Counts.of(np.asarray(corpus.splits["train"].ids), corpus.vocab_size)


def _model(path: Path, context: int, batch_size: int, device: torch.device) -> Any:
    return _harness().scored_model(path, context=context, batch_size=batch_size, device=device)


def _figures(task: str, scored: Any, examples: int | None) -> Row:
    """A row's figures."""
    harness = _harness()
    parts = harness.own_tasks(task)
    found = harness.run_tasks(scored, [task], own_tasks=harness.OWN_TASKS, examples=examples)
    figures: Row = dict(found[task])
    if "nats" in figures and "nats_stderr" in figures:
        figures["perplexity_stderr"] = figures["perplexity"] * figures["nats_stderr"]  # by the delta method
    by_phenomenon: defaultdict[str, list[float]] = defaultdict(list)
    for part in parts:
        if part.phenomenon is not None:
            by_phenomenon[part.phenomenon].append(found[part.name]["acc"])
    if by_phenomenon:
        figures["phenomena"] = {name: fmean(shares) for name, shares in by_phenomenon.items()}
        figures["paradigms"] = {part.name.removeprefix(f"{task}_"): found[part.name]["acc"] for part in parts}
    model = getattr(scored, "model", None)
    return figures if model is None else figures | {"parameters": sum(each.numel() for each in model.parameters())}


def _harness() -> ModuleType:
    """The room that knows transformers, entered only here."""
    try:
        return import_module("gam_lm.hf.harness")
    except MissingExtraError as error:
        raise MissingExtraError("lm_eval", "eval", "--tasks") from error
