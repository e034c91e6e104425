"""Table 1: train every model on the same tokens in the same order and compare."""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from gam_lm.checkpoint import load_model
from gam_lm.config import ModelConfig
from gam_lm.data.blocks import TrainingBlocks, document_of_blocks
from gam_lm.data.evaluation import EVALUATION_TEXTS, evaluation_texts
from gam_lm.data.tokenizer import END_OF_TEXT
from gam_lm.data.tokens import TokenCorpus
from gam_lm.errors import DivergedError, InputError
from gam_lm.experiments.floors import FLOORS, floors
from gam_lm.experiments.models import build, contender, described, parameters, state_bytes
from gam_lm.model import LanguageModel
from gam_lm.presets.models import Fields
from gam_lm.results import Results, write_blocks
from gam_lm.runtime.measure import interleaved_times, step_times
from gam_lm.runtime.progress import progress
from gam_lm.runtime.workers import claimed, is_worker
from gam_lm.training.compiled import compile_for_training
from gam_lm.training.directory import trained_with
from gam_lm.training.evaluate import Evaluation, evaluate
from gam_lm.training.loop import Trained, fit, make_optimizer, train_step
from gam_lm.training.precision import choose_dtype
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.trackers import Tracker

logger = logging.getLogger("gam_lm")

TIMED_ROUNDS = 7
"""Steps of each model that the speed columns are the median of."""


OF_A_STEP = ("batch_size", "context", "accumulate", "optimizer", "precision", "compile", "blocks", "clip", "ema", "steps", "epochs")
"""Fields of a recipe that a step's time depends on; the length of a run decides whether it is compiled."""


@dataclass(frozen=True)
class Contender:
    """One row to be: a model and its recipe."""

    name: str
    config: ModelConfig
    recipe: TrainConfig
    variant: str = ""
    """Tells apart the folders of rows that share a name and differ in their configuration."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What the row says besides what is measured."""

    @property
    def label(self) -> str:
        """Name of the run's folder and progress bar."""
        return "-".join(part for part in (self.name.replace(":", "-"), self.variant, f"seed{self.recipe.seed}") if part)


def plan(names: Sequence[str], seeds: Sequence[int], base: Fields, recipe: TrainConfig, *, match: bool) -> list[Contender]:
    """All rows, seed by seed, so that an interrupted comparison has whole seeds."""
    models = [contender(name, base, match=match) for name in dict.fromkeys(names)]
    return [Contender(name, config, recipe.replace(seed=seed)) for seed in dict.fromkeys(seeds) for name, config in models]


def describe_plan(contenders: Sequence[Contender], corpus: TokenCorpus, device: torch.device) -> list[dict[str, Any]]:
    """What each row will take: parameters, tokens, steps, and the seconds expected from three timed steps of a model that is thrown away."""
    seconds: dict[str, float] = {}
    rows = []
    for each in contenders:
        kind = _timed(each)
        if kind not in seconds:
            seconds[kind] = _step_seconds(each, corpus, device)
        steps = each.recipe.total_steps(blocks_of(each.recipe, corpus).steps_per_epoch)
        rows.append({
            "model": each.name, **each.columns, "seed": each.recipe.seed, "parameters": parameters(each.config), "steps": steps,
            "train_tokens": steps * each.recipe.batch_size * each.recipe.context, "expected_seconds": round(steps * seconds[kind], 1),
        })  # fmt: skip
    return rows


def benchmark(
    contenders: Sequence[Contender], corpus: TokenCorpus, results: Results, directory: Path, device: torch.device, *, test: bool = False,
    texts: Sequence[str] = (), timed: bool = True,
) -> None:  # fmt: skip
    """Train what is missing in ``results``, a row at a time; each finished row is written at once. Processes that share the folder share the rows.

    Args:
        contenders: as `plan` made them.
        corpus: prepared tokens.
        results: the open results.json of ``directory``.
        directory: gets a run directory for each row under runs/.
        device: where to train.
        test: measure the test split as well, also of finished rows whose run directory is there.
        texts: of gam_lm.data.evaluation to measure as well, likewise.
        timed: measure the speed columns at the end, where rows lack them; False leaves that to a quiet machine.
    """
    elsewhere = 0
    before = {each.label for each in contenders if results.find(identity_of(each, device)) is not None}
    with progress("models", len(contenders), "trainings", done=len(before)) as bar:
        for each in contenders:
            with claimed(directory, each.label) as ours:
                results.reread()
                if (row := results.find(identity_of(each, device))) is not None:
                    logger.info("%s: already in %s", each.label, results.path)
                    without_test = test and "test" in corpus.splits and "test_nats_per_token" not in row
                    missing = [name for name in texts if name not in row.get("texts", {})]
                    if ours and (without_test or missing) and not row.get("diverged"):
                        _measure_finished(each, row, corpus, results, directory, device, test=without_test, texts=missing)
                elif ours:
                    bar.now(f"{each.label}, {parameters(each.config):,} parameters")
                    train_row(each, corpus, results, directory, device, test=test, texts=texts)
                else:
                    logger.info("%s: another process trains it", each.label)
                    elsewhere += 1
            bar.advance(each.label not in before)
    if not is_worker():  # they take a minute of a large corpus
        _add_floors(corpus, results)
    if elsewhere:
        logger.info("%d rows are trained by other processes; the same command goes on with what they leave", elsewhere)
    elif timed:
        _time_steps(contenders, corpus, results, device)


def train_row(
    each: Contender, corpus: TokenCorpus, results: Results, directory: Path, device: torch.device, *, test: bool = False, texts: Sequence[str] = (),
    tracker: Tracker | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train one model, measure it, and write its row; arguments as of `benchmark`. Returns the row."""
    run = directory / "runs" / each.label
    model = build(each.config, each.recipe.seed, device)
    try:
        trained = fit(model, corpus, each.recipe, run, label=each.label, tracker=tracker)
    except DivergedError as error:
        logger.warning("%s: %s", each.label, error)
        row = {**identity_of(each, device), **each.columns, "parameters": parameters(each.config), "diverged": True, "divergence": error.figures()}
        results.add(row)
        return row
    measured = evaluations(model, trained, corpus, each.recipe, test=test)
    blocks = {f"{split}_blocks": _keep_blocks(directory, each, split, evaluation, corpus) for split, evaluation in measured.items()}
    row = {**identity_of(each, device), **each.columns, **figures(model, trained, measured, each.recipe), **blocks, **_on_texts(model, each, texts, directory)}
    results.add(row)
    shutil.rmtree(run / "state", ignore_errors=True)
    return row


def _measure_finished(
    each: Contender, row: Mapping[str, Any], corpus: TokenCorpus, results: Results, directory: Path, device: torch.device, *, test: bool, texts: Sequence[str]
) -> None:
    """Add the test split and texts to a row that was finished without them, by the model that its run saved; why they cannot be added is logged."""
    run = directory / "runs" / each.label
    try:
        recipe = trained_with(run)
        if recipe is None or not recipe.same_run(each.recipe):
            raise InputError(f"{run} is not there or of another recipe: train into a new folder")
        model = load_model(run, device=device)
    except InputError as error:
        what = " and ".join((["test loss"] if test else []) + (["loss on further texts"] if texts else []))
        logger.warning("%s has no %s, and its run cannot be measured: %s", each.label, what, error)
        return
    new: dict[str, Any] = _on_texts(model, each, texts, directory, row.get("texts", {}))
    if test:
        evaluation = evaluate(model, corpus.splits["test"], context=each.recipe.context)
        new |= {**evaluation.figures("test"), "test_blocks": _keep_blocks(directory, each, "test", evaluation, corpus)}
    results.amend(row, new)
    logger.info("%s: %s measured", each.label, ", ".join((["test split"] if test else []) + list(texts)))


def _on_texts(model: LanguageModel, each: Contender, names: Sequence[str], directory: Path, before: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The column of a row's losses on further texts, besides those that were measured ``before``."""
    found = dict(before)
    for name, text in evaluation_texts(directory / "runs" / each.label / "tokenizer.json", names):
        split = EVALUATION_TEXTS[name]
        measured = evaluate(model, text.splits[split], context=each.recipe.context)
        figures = measured.figures("text")
        found[name] = {
            "nats_per_token": figures["text_nats_per_token"], "bits_per_byte": figures["text_bits_per_byte"], "sha256": text.sha256,
            "blocks": _keep_blocks(directory, each, name, measured, text, of=split),
        }  # fmt: skip
    return {"texts": found} if found else {}


def _time_steps(contenders: Sequence[Contender], corpus: TokenCorpus, results: Results, device: torch.device) -> None:
    """The speed columns, where rows lack them: the training steps of all models in turns, so that what else the machine does meets all alike."""
    rows = [(each, row) for each in contenders if (row := results.find(identity_of(each, device))) is not None]
    if all("step_ms" in row for _, row in rows):
        return
    of_model = {_timed(each): each for each, _ in rows}
    logger.info("timing the steps of %d models in turns", len(of_model))
    steps = {name: _training_step(each, corpus, device) for name, each in of_model.items()}
    times = interleaved_times(steps, device, rounds=TIMED_ROUNDS)
    for each, row in rows:
        step_ms = statistics.median(times[_timed(each)])
        recipe = each.recipe
        results.amend(row, {
            "step_ms": step_ms, "tokens_per_second": 1000 * recipe.batch_size * recipe.context / step_ms,
            "epoch_seconds": step_ms / 1000 * blocks_of(recipe, corpus).steps_per_epoch,
        })  # fmt: skip


def _timed(each: Contender) -> str:
    """What the time of a training step depends on: the model, and those fields of the recipe that make a step another one."""
    return json.dumps([each.config.to_dict(), *(getattr(each.recipe, name) for name in OF_A_STEP)], sort_keys=True)


def identity_of(each: Contender, device: torch.device) -> dict[str, Any]:
    """What tells a row from the others; where it is trained decides the backends."""
    return {"model": each.name, "seed": each.recipe.seed, **described(each.config, device), "train_config": each.recipe.to_dict()}


def evaluations(model: LanguageModel, trained: Trained, corpus: TokenCorpus, recipe: TrainConfig, *, test: bool) -> dict[str, Evaluation]:
    """A finished model on each split, every token but the first predicted once: ``val`` (after the paper's protocol, measured anew) and ``test``."""
    found = {"val": evaluate(model, corpus.splits["valid"], context=recipe.context) if recipe.blocks == "paper" else trained.validation}
    if test and "test" in corpus.splits:
        found["test"] = evaluate(model, corpus.splits["test"], context=recipe.context)
    return found


def figures(model: LanguageModel, trained: Trained, measured: Mapping[str, Evaluation], recipe: TrainConfig) -> dict[str, Any]:
    """The measured columns of a finished row."""
    own: dict[str, Any] = {
        "parameters": model.count_parameters(),
        "train_tokens": trained.tokens,
        "precision": trained.precision,
        "compiled": trained.compiled,
    }
    if recipe.blocks == "paper":  # the paper's figure, and ours beside it
        own["paper_val_nats"] = float(trained.validation.batch_means.mean())
        own["paper_val_ppl"] = math.exp(min(700.0, own["paper_val_nats"]))
    for split, evaluation in measured.items():
        own |= evaluation.figures(split)
    return own | {
        "train_seconds": trained.seconds,
        "state_bytes": state_bytes(model.config, recipe.context),
        "curve": trained.curve,
    }


def _keep_blocks(directory: Path, each: Contender, split: str, evaluation: Evaluation, corpus: TokenCorpus, *, of: str | None = None) -> str:
    """Keep the losses by block of a split, or of the split ``of`` a text, with the document of each block where the tokenizer marks a document's end."""
    end = corpus.tokenizer.token_to_id(END_OF_TEXT)
    ids = corpus.splits[of or ("valid" if split == "val" else split)].ids
    documents = None if end is None else document_of_blocks(ids, end, each.recipe.context)
    label = each.label if split == "val" else f"{each.label}-{split}"
    return write_blocks(directory, label, evaluation.block_nats, evaluation.block_tokens, documents)


def _add_floors(corpus: TokenCorpus, results: Results) -> None:
    """Rows of what takes no model, which every table shows."""
    if all(results.find({"model": name}) for name in FLOORS):
        return
    valid = corpus.splits["valid"]
    for name, nats in floors(corpus).items():
        total = nats * (valid.tokens - 1)
        results.add({
            "model": name, "floor": True, "val_nats_per_token": nats, "val_ppl": math.exp(min(700.0, nats)), "val_bits_per_byte": total / math.log(2) / valid.bytes,
            "val_word_ppl": math.exp(min(700.0, total / valid.words)),
        })  # fmt: skip


def blocks_of(recipe: TrainConfig, corpus: TokenCorpus) -> TrainingBlocks:
    """The blocks that a run of ``recipe`` reads."""
    ids = corpus.splits["train"].ids
    return TrainingBlocks(ids, context=recipe.context, batch_size=recipe.batch_size, seed=recipe.seed, overlap=recipe.blocks == "overlapping")


def _training_step(each: Contender, corpus: TokenCorpus, device: torch.device) -> Callable[[], float]:
    """A training step as the row's run takes it, over the same tokens at every call, of a model that is thrown away."""
    recipe = each.recipe
    model = build(each.config, 0, device).train()
    blocks = blocks_of(recipe, corpus)
    compile_for_training(model, recipe, recipe.total_steps(blocks.steps_per_epoch))
    optimizer, dtype = make_optimizer(model, recipe), choose_dtype(recipe.precision, device)
    batch = blocks.batch(0)
    return lambda: float(train_step(model, optimizer, batch, recipe, 0.0, dtype)[0])


def _step_seconds(each: Contender, corpus: TokenCorpus, device: torch.device) -> float:
    step = _training_step(each, corpus, device)
    return statistics.median(step_times(step, device, warmup=1, iterations=3)) / 1000
