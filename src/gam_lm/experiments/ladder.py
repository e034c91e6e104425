"""The ladder that the rules of gam_lm.training.plan rest on: models of several sizes on texts of several lengths, each for so many minutes."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gam_lm.checkpoint import read_json
from gam_lm.config import ModelConfig
from gam_lm.data.corpora import Corpus, Documents
from gam_lm.data.first_part import with_first_tokens
from gam_lm.data.tokenizer import END_OF_TEXT
from gam_lm.data.tokens import TokenCorpus, prepare
from gam_lm.errors import DivergedError, InputError
from gam_lm.experiments.floors import bigram_nats, unigram_nats
from gam_lm.model import count_parameters
from gam_lm.presets.models import named_model
from gam_lm.results import Results
from gam_lm.runtime.files import write_text
from gam_lm.runtime.progress import progress
from gam_lm.training.directory import corpus_figures
from gam_lm.training.evaluate import evaluate
from gam_lm.training.loop import fit, new_model
from gam_lm.training.plan import Plan, Size, learning_rate_for, recipe_for
from gam_lm.training.planning import Planner
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

VALID_TOKENS = 60_000
"""Most tokens of the validation text, of which every run of a text reads the same."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One run of the ladder."""

    text_bytes: int
    """Of the training text: so many from its start."""
    minutes: float
    """Of training."""
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    rate: float
    """Times the learning rates of the rule."""
    batch_size: int | None = None
    """Sequences in a batch; None takes the rule's."""
    seed: int
    model: str
    """Name of the model."""
    precision: str = "auto"
    """Number format of the matrix products."""

    @property
    def label(self) -> str:
        """Its run's folder."""
        size = f"{self.hidden_size}x{self.num_hidden_layers}"
        batch = "" if self.batch_size is None else f"-b{self.batch_size}"
        precision = "" if self.precision == "auto" else f"-{self.precision}"
        return f"{self.model}-{self.text_bytes}B-{self.minutes:g}min-{size}-v{self.vocab_size}-r{self.rate:g}{batch}-seed{self.seed}{precision}"


def climb(rungs: Sequence[Rung], source: Corpus, results: Results, out: Path, device: torch.device) -> None:
    """Train every rung that ``results`` does not have, and write its row.

    Args:
        rungs: what is wanted, in this order.
        source: a text of at least as many bytes as the longest rung wants.
        results: an open results.json.
        out: folder for the texts and the runs; a run that was interrupted goes on.
        device: where to train.

    Raises:
        InputError: for a text that is too short.
    """
    with progress("ladder", len(rungs), "runs") as bar:
        for rung in rungs:
            if not any(row.get("variant") == rung.label for row in results.rows):
                bar.now(rung.label)
                results.add({"variant": rung.label, **_row(rung, source, out, device)})
            bar.advance()


def _row(rung: Rung, source: Corpus, out: Path, device: torch.device) -> dict[str, Any]:
    whole = with_first_tokens(prepare(str(_text(source, rung.text_bytes, out / "texts")), vocab_size=rung.vocab_size), "valid", VALID_TOKENS)
    run = out / "runs" / rung.label
    config, recipe, valid_tokens, expected = _decided(rung, whole, run, device)
    corpus = with_first_tokens(whole, "valid", valid_tokens)
    train, valid = whole.splits["train"], corpus.splits["valid"]
    own = {
        "model": rung.model, "seed": rung.seed, "model_config": config.to_dict(), "train_config": recipe.to_dict(), "text_bytes": rung.text_bytes,
        "minutes": rung.minutes, "vocab_size": rung.vocab_size, "rate": rung.rate, "parameters": count_parameters(config), "corpus": corpus_figures(corpus),
        "text_passes": (recipe.steps or 0) * recipe.batch_size * recipe.context / train.tokens, "expected_seconds": expected,
        **_floors(whole),
    }  # fmt: skip
    plan = Plan(
        texts=(source.name,), minutes=rung.minutes, vocab_size=rung.vocab_size, tokenizer="bpe", model=rung.model, valid_tokens=valid.tokens, seconds=expected
    )
    try:
        model = new_model(config, rung.seed, device)
        trained = fit(model, corpus, recipe, run, label=rung.label, plan=plan.to_dict())
    except DivergedError as error:
        logger.warning("%s: %s", rung.label, error)
        return own | {"diverged": True}
    shutil.rmtree(run / "state", ignore_errors=True)
    # The same text for all, however much of it each had the time to look at.
    measured = evaluate(model, whole.splits["valid"], context=recipe.context)
    return own | measured.figures("val") | {
        "last_val_nats_per_token": trained.curve[-1]["val_nats"], "best_val_nats_per_token": trained.validation.nats_per_token,
        "precision": trained.precision, "threads": torch.get_num_threads(), "kept_step": trained.kept_step, "steps": trained.steps,
        "train_tokens": trained.tokens, "train_seconds": trained.seconds, "curve": trained.curve,
    }  # fmt: skip


def _decided(rung: Rung, corpus: TokenCorpus, run: Path, device: torch.device) -> tuple[ModelConfig, TrainConfig, int, float]:
    """Model, recipe, validated tokens and expected seconds: as they were, where the run was interrupted."""
    if (run / "recipe.json").is_file():
        saved = read_json(run / "recipe.json")
        plan = Plan.from_dict(saved.get("plan"))
        return ModelConfig.from_dict(saved["model_config"]), TrainConfig.from_dict(saved["train_config"]), plan.valid_tokens, plan.seconds
    size = Size(rung.hidden_size, rung.num_hidden_layers, 0, 0)

    def config_at(size: Size, dropout: float) -> ModelConfig:
        base = {"vocab_size": corpus.vocab_size, "hidden_size": size.hidden_size, "num_hidden_layers": size.num_hidden_layers, "dropout": dropout or 0.0}
        return named_model(rung.model, base)

    muon = recipe_for(hidden_size=rung.hidden_size, tokens_seen=0).muon_learning_rate or 0.0
    rates = {"learning_rate": rung.rate * learning_rate_for(rung.hidden_size), "muon_learning_rate": rung.rate * muon}
    fixed: dict[str, Any] = {"seed": rung.seed, "precision": rung.precision, **rates}
    if rung.batch_size is not None:
        fixed["batch_size"] = rung.batch_size
    planner = Planner(corpus=corpus, device=device, minutes=rung.minutes, config_at=config_at, fixed=fixed, sizes=(size,), most_passes=math.inf)
    config, recipe, schedule = planner.plan()
    return config, recipe, schedule.valid_tokens, schedule.seconds


def _floors(corpus: TokenCorpus) -> dict[str, float]:
    train, valid = corpus.splits["train"].ids, corpus.splits["valid"]
    per_byte = (valid.tokens - 1) / math.log(2) / valid.bytes
    return {
        "unigram_bits_per_byte": unigram_nats(train, valid.ids, corpus.vocab_size) * per_byte,
        "bigram_bits_per_byte": bigram_nats(train, valid.ids, corpus.vocab_size) * per_byte,
    }


def _text(source: Corpus, text_bytes: int, folder: Path) -> Path:
    """A file with the first bytes of the training text, which is split as anybody's text is: what is validated is of the same books."""
    found = folder / f"{text_bytes}.txt"
    if not found.is_file():
        text = END_OF_TEXT.join(_first_bytes(source.splits["train"], text_bytes))
        if len(text.encode()) < 0.95 * text_bytes:
            raise InputError(f"bytes is {text_bytes}, the training text of {source.name} has {len(text.encode())}: use a longer text or fewer bytes")
        write_text(found, text)
    return found


def _first_bytes(documents: Documents, limit: int) -> Iterator[str]:
    left = limit
    for document in documents():
        raw = document.encode()[:left]
        yield raw.decode(errors="ignore")  # a character that was cut is left out
        left -= len(raw)
        if left <= 0:
            return
