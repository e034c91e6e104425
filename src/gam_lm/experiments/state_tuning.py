"""What a text is worth to the initial memory alone, beside low-rank adapters of the same size and the training of all weights.

A low-rank adapter (LoRA, arXiv 2106.09685) adds B A to a frozen matrix, with A (r, in) drawn and B (out, r) at zero.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gam_lm.checkpoint import load_model
from gam_lm.data.first_part import with_first_tokens
from gam_lm.data.tokens import TokenCorpus, prepare
from gam_lm.inference.start_file import initial_memory
from gam_lm.model import LanguageModel
from gam_lm.results import Results
from gam_lm.runtime.progress import progress
from gam_lm.training.batches import Batches
from gam_lm.training.directory import corpus_figures
from gam_lm.training.evaluate import evaluate
from gam_lm.training.initial_memory import only_trains
from gam_lm.training.optimizers import make_optimizer
from gam_lm.training.precision import choose_dtype
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.step import train_step

logger = logging.getLogger("gam_lm")

UNTUNED = "untuned"
INITIAL, LORA, ALL = "initial memory", "LoRA", "all weights"
METHODS = (INITIAL, LORA, ALL)
"""What is trained."""


class LowRank(nn.Module):
    """W + B A, of a Linear's weight (out, in)."""

    def __init__(self, weight_OI: Tensor, rank: int) -> None:
        super().__init__()
        outputs, inputs = weight_OI.shape
        self.a_RI = nn.Parameter(torch.randn(rank, inputs, device=weight_OI.device) / math.sqrt(inputs))
        self.b_OR = nn.Parameter(torch.zeros(outputs, rank, device=weight_OI.device))

    def forward(self, weight_OI: Tensor) -> Tensor:
        """The adapted weight."""
        return weight_OI + self.b_OR @ self.a_RI


def adapted(model: LanguageModel, numbers: int) -> list[nn.Parameter]:
    """Put adapters on the matrices of the mixers that are as wide as high, of the largest rank at which they have at most ``numbers`` numbers together.

    Those are the projections into and out of the memory. Rank 1 is the least.

    Returns:
        The adapters' parameters.
    """
    D = model.config.hidden_size
    found = [part for layer in model.layers for part in layer.mixer.modules() if isinstance(part, nn.Linear) and part.weight.shape == (D, D)]
    rank = max(1, numbers // sum(sum(part.weight.shape) for part in found))
    parts = [LowRank(part.weight, rank) for part in found]
    for part, adapter in zip(found, parts, strict=True):
        parametrize.register_parametrization(part, "weight", adapter)
    return [parameter for adapter in parts for parameter in adapter.parameters()]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The runs that are wanted: every text × method × learning rate × seed."""

    run: Path
    """Run directory of the model."""
    texts: Sequence[str]
    """Corpus names or paths."""
    rates: Sequence[float]
    """Learning rates, the same for every method."""
    seeds: Sequence[int]
    """Of the order of the blocks, and of the adapters."""
    recipe: TrainConfig
    """All else of the training."""
    valid_tokens: int
    """Tokens of each validation split, from its start."""

    def measure(self, results: Results, device: torch.device) -> None:
        """Train what ``results`` does not have; each row is written as soon as it is there."""
        corpora = [self._corpus(text) for text in self.texts]
        wanted: list[tuple[TokenCorpus, str, float, int]] = []
        for corpus in corpora:
            wanted += [(corpus, UNTUNED, 0.0, 0), *((corpus, *each) for each in product(METHODS, self.rates, self.seeds))]
        with progress("tuning", len(wanted), "runs") as bar:
            for corpus, method, rate, seed in wanted:
                recipe = self.recipe if method == UNTUNED else dataclasses.replace(self.recipe, learning_rate=rate, seed=seed)
                row = {"model": self.run.resolve().name, "task": corpus.name, "variant": method, "seed": seed, "train_config": recipe.to_dict()}
                if results.find(row) is None:
                    results.add(row | {"corpus": corpus_figures(corpus)} | self._row(corpus, method, recipe, device))
                bar.advance(1, f"{corpus.name}, {method}")

    def _corpus(self, text: str) -> TokenCorpus:
        corpus = prepare(text, tokenizer=str(self.run / "tokenizer.json"))
        return with_first_tokens(corpus, "valid", min(self.valid_tokens, corpus.splits["valid"].tokens))

    def _row(self, corpus: TokenCorpus, method: str, recipe: TrainConfig, device: torch.device) -> dict[str, Any]:
        model = load_model(self.run, device=device)
        tokens = 0
        parameters: list[nn.Parameter] = []
        if method != UNTUNED:
            memory = list(initial_memory(model).values())
            torch.manual_seed(recipe.seed)
            numbers = sum(parameter.numel() for parameter in memory)
            parameters = {INITIAL: lambda: memory, LORA: lambda: adapted(model, numbers), ALL: lambda: list(model.parameters())}[method]()
            tokens = _trained(model, parameters, corpus, recipe)
        measured = evaluate(model.eval(), corpus.splits["valid"], context=recipe.context)
        figures = {"trained_parameters": sum(parameter.numel() for parameter in parameters), "train_tokens": tokens, **measured.figures("val")}
        logger.info("%s, %s, %g: %.4f bits per byte", corpus.name, method, recipe.learning_rate, figures["val_bits_per_byte"])
        return figures


def _trained(model: LanguageModel, parameters: list[nn.Parameter], corpus: TokenCorpus, recipe: TrainConfig) -> int:
    """Train ``parameters`` in place, and return the number of predicted tokens."""
    batches, tokens = Batches(corpus, recipe), 0
    total = recipe.total_steps(batches.steps_per_epoch)
    model.train()
    with only_trains(model, parameters):
        optimizer = make_optimizer(model, recipe)
        dtype = choose_dtype(recipe.precision, model.embed_tokens.weight.device)
        for step in range(total):
            _, _, counted = train_step(model, optimizer, batches.batch(step), recipe, recipe.rate(step, total), dtype)
            tokens += counted
    return tokens
