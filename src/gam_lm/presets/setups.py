"""Named setups: what each command compares, on which data, by which recipe, and what to expect. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gam_lm.errors import unknown_name
from gam_lm.presets.models import DEFAULT_MODEL
from gam_lm.training.recipe import TrainConfig

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A setup with what to expect of it."""

    summary: str
    """Command, machine, minutes and the number to expect."""
    data: str
    """Name of a corpus."""
    models: tuple[str, ...]
    """What ``gam bench`` compares; the first is what ``gam train`` trains."""
    model: Mapping[str, Any]
    """Fields of ModelConfig besides vocab_size."""
    train: TrainConfig
    """The recipe."""
    vocab_size: int = 10_000
    """Entries of the tokenizer."""
    tokenizer: str = "bpe"
    """Kind of tokenizer, or a tokenizer.json."""
    row_limits: Mapping[str, int] | None = field(default=None)
    """Rows per split that are used, where not all are."""
    match_parameters: bool = True
    """Whether ``gam bench`` sizes every model to the parameters of the static GAM."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of ``gam bench``."""
    full: str = DEFAULT_MODEL
    """The model that ``gam ablate`` takes apart."""


ADAMW: Mapping[str, Any] = {"optimizer": "adamw", "clip": 1.0}
"""What the paper trains with, and so what takes its model apart; and what older figures were made with that are to be repeated."""

PAPER_TRAIN = TrainConfig(
    **ADAMW,
    epochs=5,
    batch_size=32,
    context=256,
    learning_rate=3e-4,
    warmup_steps=100,
    paper_warmup=True,
    decay="everything",
    precision="fp32",
    blocks="paper",
)
PAPER_SIZE: Mapping[str, Any] = {"hidden_size": 512, "num_hidden_layers": 6, "dropout": 0.1, "options": {"gam": {"num_memory_slots": 512}}}
PAPER_MODELS = ("gam-paper", "transformer-paper", "mamba-paper")

PRESETS: Mapping[str, Preset] = {
    "laptop": Preset(
        summary="gam bench --preset laptop --out runs/laptop · 2 CPU cores, 6 minutes · see README for the losses to expect (this is `make run`)",
        data="stdlib",
        models=("gam", "gam-static", "transformer", "mamba"),
        model={"hidden_size": 128, "num_hidden_layers": 4},
        # Twice the usual rates: in so few steps gam ends at 4.617 with those, at 4.475 with these, at 4.496 with three times them (docs/log.md).
        train=TrainConfig(steps=200, batch_size=8, context=256, learning_rate=2.4e-2, muon_learning_rate=4e-2, validate_every=100, precision="fp32"),
        vocab_size=4096,
    ),
    "small-cpu": Preset(
        summary="gam train --preset small-cpu --out runs/small · 2 CPU cores, about 20 minutes · novels, 5.4 M parameters · AdamW at 8e-3 reached 4.19 nats per token",
        data="gutenberg",
        models=("gam", "gam-static", "transformer", "mamba"),
        model={"hidden_size": 256, "num_hidden_layers": 4},
        train=TrainConfig(steps=1200, batch_size=16, context=256, validate_every=300),
    ),
    "gpu": Preset(
        summary="gam bench --preset gpu --data carried/ids --out results/gpu/train · one GPU, minutes · no losses known yet; make bench-gpu-train tunes each model first",
        data="books",
        models=("gam", "gam-attention", "gam-hybrid", "llama", "mamba"),
        model={"hidden_size": 256, "num_hidden_layers": 6},
        train=TrainConfig(
            steps=2441, batch_size=32, context=256, learning_rate=8e-3, muon_learning_rate=0.03, precision="bf16", compile="off", validate_every=611,
        ),
        vocab_size=4096,
    ),
    "paper-wikitext2": Preset(
        summary="gam bench --preset paper-wikitext2 --out runs/paper-wikitext2 · one GPU · published PPL: 882.57 GAM, 918.99 Transformer, 1017.54 Mamba",
        data="wikitext-2",
        models=PAPER_MODELS,
        model=PAPER_SIZE,
        train=PAPER_TRAIN,
        tokenizer="paper",
        match_parameters=False,
    ),
    "paper-tinystories": Preset(
        summary="gam bench --preset paper-tinystories --out runs/paper-tinystories · one GPU · published PPL: 23.15 GAM, 23.55 Transformer",
        data="tinystories",
        models=PAPER_MODELS,
        model=PAPER_SIZE,
        train=PAPER_TRAIN,
        tokenizer="paper",
        row_limits={"train": 50_000, "valid": 5_000},
        match_parameters=False,
    ),
}
"""Setups by name; ``paper`` is both paper setups, one after the other."""


@dataclass(frozen=True, kw_only=True)
class RecallPreset:
    """A setup of `gam recall`."""

    summary: str
    """Command, machine, minutes and what to expect."""
    models: tuple[str, ...]
    """Names of the models."""
    pairs: tuple[int, ...]
    """Pairs per sequence."""
    length: tuple[int, ...]
    """Tokens per sequence, one for each number of pairs."""
    model: Mapping[str, Any]
    """Fields of ModelConfig besides vocab_size."""
    train: TrainConfig
    """The recipe."""
    vocab_size: int
    """Token ids: the lower half keys, the upper half values."""


RECALL: Mapping[str, RecallPreset] = {
    "minutes": RecallPreset(
        summary="gam recall --preset minutes --out runs/recall · 2 CPU cores, a few minutes · see docs/memory.md for the accuracies to expect",
        models=("gam-static", "gam", "gam-mean", "transformer", "mamba"),
        pairs=(8,),
        length=(64,),
        model={"hidden_size": 64, "num_hidden_layers": 2},
        train=TrainConfig(steps=250, batch_size=64, context=64, **ADAMW, learning_rate=5e-3, warmup_steps=25, precision="fp32"),
        vocab_size=512,
    ),
    "zoology": RecallPreset(
        summary="gam recall --preset zoology --out runs/zoology · one GPU · the sizes of arXiv 2312.04927",
        models=("gam-static", "gam", "gam-mean", "transformer", "mamba"),
        pairs=(4, 8, 16, 32, 64),
        length=(64, 64, 128, 256, 512),
        model={"hidden_size": 128, "num_hidden_layers": 2, "options": {"gam": {"num_memory_slots": 256}}},
        train=TrainConfig(steps=20_000, batch_size=256, context=64, **ADAMW, learning_rate=1e-3, warmup_steps=2_000),
        vocab_size=8_192,
    ),
}
"""Setups of `gam recall` by name."""

SCALING_MODELS = ("gam-static", "gam", "gam-mean", "gam-slots", "transformer-learned+backend=materialised", "transformer", "mamba")
POWERS = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)


@dataclass(frozen=True, kw_only=True)
class ScalePreset:
    """A setup of `gam scale`."""

    summary: str
    """Command, machine, minutes and what to expect."""
    models: tuple[str, ...]
    """Names of the models."""
    lengths: tuple[int, ...]
    """Tokens per sequence."""
    batch_size: int
    """Sequences at once."""
    precision: str
    """auto, fp32, bf16 or fp16."""
    warmup: int
    """Passes that are not timed."""
    iterations: int
    """Passes that are timed."""
    seconds: float | None
    """The most that the passes of a kind may take."""
    limit_seconds: float
    """The most that a cell may take."""


SCALING: Mapping[str, ScalePreset] = {
    "cpu": ScalePreset(
        summary="gam scale --preset cpu --out runs/scaling · 2 CPU cores, under 10 minutes · straight lines for every model but attention",
        models=SCALING_MODELS,
        lengths=POWERS[:7],
        batch_size=1,
        precision="auto",
        warmup=5,
        iterations=20,
        seconds=1.5,
        limit_seconds=40,
    ),
    "cpu-long": ScalePreset(
        summary="gam scale --preset cpu-long --out runs/scaling · the same up to 131,072 tokens, an hour or so",
        models=SCALING_MODELS,
        lengths=POWERS,
        batch_size=1,
        precision="auto",
        warmup=5,
        iterations=20,
        seconds=12,
        limit_seconds=400,
    ),
    "table-2": ScalePreset(
        summary="gam scale --preset table-2 --out runs/table-2 · one GPU · the paper's Table 2: batch 16, fp16 autocast, 5 + 20 passes",
        models=SCALING_MODELS,
        lengths=POWERS[:6],
        batch_size=16,
        precision="fp16",
        warmup=5,
        iterations=20,
        seconds=None,
        limit_seconds=120,
    ),
}
"""Setups of `gam scale` by name; width, heads and slots are the published ones."""


ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "full": {"fusion": "gate"},
    "sum": {"fusion": "sum"},
    "global": {"fusion": "global"},
    "local": {"fusion": "local"},
    "global-gated": {"fusion": "global", "keep_gate": True},
    "local-gated": {"fusion": "local", "keep_gate": True},
}
"""Rows of `gam ablate`: what each changes in the full model. Summing the two paths with their gates is the full model."""

ABLATION_GROUPS: Mapping[str, tuple[str, ...]] = {
    "published": ("full", "sum", "global", "local"),
    "gated": ("global-gated", "local-gated"),
    "library": (
        "initialization=paper", "initialization=scaled", "positions=learned", "positions=none", "write=mean", "write=delta",
        "conv_kernel_size=2", "conv_kernel_size=5", "num_memory_slots=64", "num_memory_slots=1024",
    ),
}  # fmt: skip
"""Names for several rows at once: Table 3; its single paths with their gates kept; what this library adds or lets vary. A row FIELD=VALUE
changes that one field of the full model; it is left out where the full model has that value."""

ABLATION: Mapping[str, Preset] = {
    "minutes": Preset(
        summary="gam ablate --preset minutes --out runs/ablation · 2 CPU cores, under 20 minutes · differences of about 0.1 nats show with 2 seeds",
        data="stdlib",
        models=("published", "gated"),
        full="gam-static+gate_activation=sigmoid+positions=learned",
        model={"hidden_size": 128, "num_hidden_layers": 4},
        train=TrainConfig(steps=200, batch_size=8, context=256, **ADAMW, learning_rate=3e-3, warmup_steps=20, validate_every=100),
        vocab_size=4096,
        seeds=(0, 1),
    ),
    "small-cpu": Preset(
        summary="gam ablate --preset small-cpu --out results/ablation · 2 CPU cores, about 2 hours · 5 M parameters on novels, 5 seeds",
        data="gutenberg",
        models=("published",),
        full="gam-static+gate_activation=sigmoid+positions=learned",
        model={"hidden_size": 256, "num_hidden_layers": 4},
        train=TrainConfig(steps=300, batch_size=16, context=256, **ADAMW, learning_rate=1e-3, validate_every=150),
        seeds=(0, 1, 2, 3, 4),
    ),
    "paper": Preset(
        summary="gam ablate --preset paper --out runs/paper-ablation · one GPU · published PPL: 900.84 full, 905.45 global, 942.59 sum, 944.70 local",
        data="wikitext-2",
        models=("published",),
        full="gam-paper",
        model=PAPER_SIZE,
        train=PAPER_TRAIN,
        tokenizer="paper",
        seeds=(0, 1, 2),
    ),
}
"""Setups of `gam ablate` by name; ``models`` names rows."""


def preset(name: str) -> Preset:
    """The setup called ``name``. Raises InputError with the nearest name."""
    return _named(PRESETS, name)


def recall_preset(name: str) -> RecallPreset:
    """The setup of `gam recall` called ``name``. Raises InputError with the nearest name."""
    return _named(RECALL, name)


def ablation_preset(name: str) -> Preset:
    """The setup of `gam ablate` called ``name``. Raises InputError with the nearest name."""
    return _named(ABLATION, name)


def scale_preset(name: str) -> ScalePreset:
    """The setup of `gam scale` called ``name``. Raises InputError with the nearest name."""
    return _named(SCALING, name)


def _named(setups: Mapping[str, S], name: str) -> S:
    if name not in setups:
        raise unknown_name("preset", name, setups)
    return setups[name]
