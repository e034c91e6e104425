"""`gam tune-state`: the memory's initial values, trained on a text while the model stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gam_lm.cli.numbers import Above, Count, Seed


@dataclass(frozen=True, kw_only=True)
class TuneState:
    """Train what the memory holds before the first token, and nothing else, on another text. The file of some KB goes to --start of generate, chat, read,
    eval and serve. The same command goes on with a training that was stopped.
    """

    run_directory: Path
    """Run directory of the model; it is not changed."""
    data: str | None = None
    """Corpus name or path of the text."""
    out: Path | None = None
    """File to write; by default the text's name with .start, in the run directory."""
    steps: Count = 200
    """Optimiser steps."""
    batch_size: Count = 8
    """Sequences per step."""
    context: Count | None = None
    """Tokens per sequence; by default what the model was trained with."""
    learning_rate: Above = 0.02
    """Highest learning rate of AdamW."""
    valid_tokens: Count = 32_768
    """Tokens of the validation split, from its start, that are measured before and after."""
    seed: Seed = 0
    """Of the order of the blocks."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Train, write the file and say what it is worth."""
        from gam_lm.checkpoint import load_model, load_tokenizer_of
        from gam_lm.cli.evaluate import print_evaluation
        from gam_lm.data.first_part import with_first_tokens
        from gam_lm.data.tokens import prepare
        from gam_lm.errors import InputError
        from gam_lm.inference.int8 import is_int8
        from gam_lm.inference.start_file import initial_memory
        from gam_lm.presets.setups import ADAMW
        from gam_lm.training.directory import trained_with
        from gam_lm.training.evaluate import evaluate
        from gam_lm.training.initial_memory import tune_initial_memory
        from gam_lm.training.precision import choose_device
        from gam_lm.training.recipe import TrainConfig

        if self.data is None:
            raise InputError("data is not given: use --data with a corpus name or a path")
        model = load_model(self.run_directory, device=choose_device(self.device))
        if is_int8(model):
            raise InputError(f"run directory {str(self.run_directory)!r} is in int8: tune the run that it was exported from")
        memory = initial_memory(model)
        load_tokenizer_of(self.run_directory)
        corpus = prepare(self.data, tokenizer=str(self.run_directory / "tokenizer.json"))
        if missing := [split for split in ("train", "valid") if split not in corpus.splits]:
            raise InputError(f"data is {self.data!r}, which has no {missing[0]} split: use a text to train on")
        corpus = with_first_tokens(corpus, "valid", min(self.valid_tokens, corpus.splits["valid"].tokens))
        trained_at = trained_with(self.run_directory)
        context = self.context or (trained_at and trained_at.context) or model.config.max_position_embeddings
        recipe = TrainConfig(
            steps=self.steps, batch_size=self.batch_size, context=context, **ADAMW, learning_rate=self.learning_rate, warmup_steps=10, weight_decay=0.0,
            seed=self.seed,
        )
        out = self.out or self.run_directory / f"{Path(corpus.name).stem}.start"
        before = evaluate(model, corpus.splits["valid"], context=context)
        trained = tune_initial_memory(model, corpus, recipe, out)
        print_evaluation("before", before)
        print_evaluation("after", trained.validation)
        numbers = sum(parameter.numel() for parameter in memory.values())
        print(f"{numbers:,} numbers trained on {trained.tokens:,} tokens, {out.stat().st_size:,} bytes: --start {out}")
