"""Train one model: the same tokens in the same order for every model, and a killed run goes on as the same run."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gam_lm.checkpoint import load_state, read_json, save_model, save_state
from gam_lm.config import ModelConfig
from gam_lm.data.blocks import check_length
from gam_lm.data.tokens import TokenCorpus
from gam_lm.errors import InputError
from gam_lm.model import LanguageModel
from gam_lm.ops.cross_entropy import IGNORE
from gam_lm.runtime.files import explained, write_text
from gam_lm.runtime.progress import progress
from gam_lm.training.averaging import Average
from gam_lm.training.batches import Batches
from gam_lm.training.compiled import compile_for_training, make_eager
from gam_lm.training.evaluate import Evaluation, evaluate
from gam_lm.training.optimizers import make_optimizer as make_optimizer
from gam_lm.training.optimizers import set_rate
from gam_lm.training.precision import autocast, choose_dtype
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.trackers import NoTracker, Tracker

logger = logging.getLogger("gam_lm")

LOG_EVERY = 10


@dataclass(kw_only=True)
class Trained:
    """What a finished run knows of itself."""

    steps: int
    """Optimiser steps."""
    tokens: int
    """Predicted tokens of training."""
    seconds: float
    """Seconds of training, validation and checkpoints left out."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """Validations: step, tokens, seconds, train_nats, val_nats."""
    precision: str
    """Number format of the matrix products."""
    compiled: bool
    """Whether the blocks ran through torch.compile."""
    validation: Evaluation
    """The last validation, over the whole split."""


def new_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> LanguageModel:
    """A model whose start values are a function of ``seed`` alone."""
    torch.manual_seed(seed)
    return LanguageModel(config).to(device)


def fit(
    model: LanguageModel,
    corpus: TokenCorpus,
    recipe: TrainConfig,
    directory: Path,
    *,
    tracker: Tracker | None = None,
    label: str = "train",
) -> Trained:
    """Train ``model`` in place and write its run directory as it goes.

    Args:
        model: freshly built by :func:`new_model`; where ``directory`` holds the state of a killed run it is put back to that.
        corpus: prepared tokens with the splits train and valid.
        recipe: how to train.
        directory: the run directory; see gam_lm.checkpoint.
        tracker: takes the figures besides metrics.jsonl.
        label: names the run on the progress bar.

    Raises:
        InputError: for a directory of another run, a context longer than the model's positions, or a split shorter than one block.
        KeyboardInterrupt: after the state has been saved.
    """
    _check(model, corpus, recipe)
    device = model.embed_tokens.weight.device
    dtype = choose_dtype(recipe.precision, device)
    blocks = Batches(corpus, recipe)
    claim_directory(directory, model.config, recipe, corpus)
    total = recipe.total_steps(blocks.steps_per_epoch)
    optimizer = make_optimizer(model, recipe)
    average = Average(model, recipe.ema) if recipe.ema else None
    compiled = compile_for_training(model, recipe, total)
    tracker = tracker or NoTracker()
    tokenizer = corpus.tokenizer

    reached = load_state(directory, model, optimizer, None if average is None else average.tensors) or {"step": 0, "tokens": 0, "seconds": 0.0, "curve": [], "pending": []}
    step, tokens, seconds, curve = reached["step"], reached["tokens"], reached["seconds"], reached["curve"]
    _forget_after(directory / "metrics.jsonl", step)
    validation: Evaluation | None = None
    pending: list[Tensor] = [torch.tensor(loss, device=device) for loss in reached["pending"]]  # losses since the last line of metrics
    note = ""

    def averaged() -> AbstractContextManager[None]:
        return average.in_place() if average is not None else nullcontext()

    def save() -> None:
        with averaged():
            save_model(directory, model, tokenizer)
        reached = {"tokens": tokens, "seconds": seconds, "curve": curve, "pending": [float(x) for x in pending]}
        save_state(directory, step, model, optimizer, reached, None if average is None else average.tensors)

    def validate(last: bool) -> Evaluation:
        """Within the run in the format of the products, at its end in that of the weights."""
        # Batches of other shapes would be compiled anew.
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with averaged(), eager, progress(f"{label}: validation", None, "blocks") as bar:
            return evaluate(
                model, corpus.splits["valid"], context=recipe.context, overlap=recipe.blocks == "overlapping",
                dtype=torch.float32 if last else dtype, advance=bar.advance,
            )  # fmt: skip

    model.train()
    try:
        with progress(label, total, "steps") as bar:
            bar.advance(step)
            while step < total:
                started = time.perf_counter()
                rate = recipe.rate(step, total)
                loss, norm, counted = train_step(model, optimizer, blocks.batch(step), recipe, rate, dtype)
                pending.append(loss)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                step += 1
                if average is not None:
                    average.update(step)
                tokens, seconds = tokens + counted, seconds + time.perf_counter() - started
                last = step == total
                measures = last or (recipe.validate_every is not None and step % recipe.validate_every == 0)
                if measures or step % LOG_EVERY == 0:
                    figures = {"train_nats": float(torch.stack(pending).mean()), "learning_rate": rate, "gradient_norm": float(norm)}
                    pending.clear()
                    if measures:
                        validation = validate(last)
                        figures["val_nats"] = validation.nats_per_token
                        point = {
                            "step": step,
                            "tokens": tokens,
                            "seconds": round(seconds, 3),
                            "train_nats": figures["train_nats"],
                            "val_nats": figures["val_nats"],
                        }
                        curve.append(point)
                        logger.info(
                            "%s: step %d/%d, train %.4f, validation %.4f nats/token", label, step, total, point["train_nats"], point["val_nats"]
                        )
                    _append(directory / "metrics.jsonl", {"step": step, "tokens": tokens, "seconds": round(seconds, 3), **figures})
                    tracker.log(figures, step)
                    note = f"loss {figures['train_nats']:.3f}"
                bar.advance(1, note)
                if step % recipe.checkpoint_every == 0 and not last:
                    save()
    except KeyboardInterrupt:
        save()
        logger.info("interrupted after step %d of %d; the same command goes on from there", step, total)
        raise
    finally:
        make_eager(compiled)
    tracker.finish()
    if validation is None:  # killed between the last step and its end
        validation = validate(last=True)
    save()
    if average is not None:
        average.hand_over()
    return Trained(
        steps=step, tokens=tokens, seconds=seconds, curve=curve, validation=validation, precision=str(dtype).removeprefix("torch."),
        compiled=bool(compiled),
    )  # fmt: skip


def train_step(
    model: LanguageModel, optimizer: torch.optim.Optimizer, batch: tuple[Any, Any], recipe: TrainConfig, rate: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, int]:
    """One optimiser step over a batch, in ``recipe.accumulate`` parts that each weigh by their counted targets.

    Returns:
        The mean loss in nats per token and the norm of the gradient before clipping, both on the model's device, and the counted targets.
    """
    device = model.embed_tokens.weight.device
    tokens, targets = (torch.from_numpy(part) for part in batch)
    counted = int((targets != IGNORE).sum())
    total = torch.zeros((), device=device)
    for tokens_BT, targets_BT in zip(tokens.chunk(recipe.accumulate), targets.chunk(recipe.accumulate), strict=True):
        share = int((targets_BT != IGNORE).sum()) / counted
        with autocast(device, dtype):
            _, loss = model(tokens_BT.to(device, non_blocking=True), targets_BT.to(device, non_blocking=True), return_logits=False)
        (loss * share).backward()
        total += loss.detach() * share
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip or float("inf"))
    set_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm, counted


def claim_directory(directory: Path, config: ModelConfig, recipe: TrainConfig, corpus: TokenCorpus) -> None:
    """Write recipe.json, or see that the one that is there is the same. Raises InputError for a folder that holds something else."""
    described = {"model_config": config.to_dict(), "train_config": recipe.to_dict(), "corpus": corpus_figures(corpus)}
    path = directory / "recipe.json"
    if path.is_file():
        if not _same_run(read_json(path), config, recipe, corpus):
            raise InputError(
                f"out is {str(directory)!r}, which holds another run: choose a new folder, or give the same model, recipe and data to go on with it"
            )
        return
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise InputError(f"out is {str(directory)!r}, which is not empty and no run directory: choose a new folder")
    write_text(path, json.dumps(described, indent=2) + "\n")


def _same_run(found: dict[str, Any], config: ModelConfig, recipe: TrainConfig, corpus: TokenCorpus) -> bool:
    """Whether a recipe.json describes this run; a field that is younger than the file has its default."""
    if found.get("corpus") != corpus_figures(corpus):
        return False
    return ModelConfig.from_dict(found["model_config"]) == config and TrainConfig.from_dict(found["train_config"]).same_run(recipe)


def corpus_figures(corpus: TokenCorpus) -> dict[str, Any]:
    """What identifies a corpus in recipe.json and results.json."""
    train = corpus.splits["train"]
    return {
        "name": corpus.name, "sha256": corpus.sha256, "tokens": train.tokens, "bytes": train.bytes, "tokenizer": corpus.tokenizer_name,
        "tokenizer_sha256": corpus.tokenizer_sha256, "vocab_size": corpus.vocab_size,
    }  # fmt: skip


def _check(model: LanguageModel, corpus: TokenCorpus, recipe: TrainConfig) -> None:
    config = model.config
    if config.positions == "learned" and recipe.context > config.max_position_embeddings:
        raise InputError(
            f"context is {recipe.context}, learned positions end at {config.max_position_embeddings}: "
            'use a larger max_position_embeddings, positions="none", or a shorter context'
        )
    if corpus.vocab_size > config.vocab_size:
        raise InputError(f"vocab_size is {config.vocab_size}, the tokenizer has {corpus.vocab_size} entries: use a model of at least as many")
    for split in ("train", "valid"):
        if split not in corpus.splits:
            raise InputError(f"data {corpus.name!r} has no {split} split: training needs train and valid")
    check_length(corpus.splits["valid"].ids, recipe.context)


def _append(path: Path, figures: dict[str, Any]) -> None:
    with explained(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(figures) + "\n")


def _forget_after(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint."""
    if not path.is_file():
        return
    lines: Iterable[str] = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_text(path, "".join(line + "\n" for line in kept))
