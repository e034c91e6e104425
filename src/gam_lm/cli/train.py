"""`gam train` and `gam generate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from gam_lm.cli.architecture import Architecture, config_of_flags, model_on_flags
from gam_lm.cli.data import Data
from gam_lm.cli.flags import FLAT, peek
from gam_lm.presets.models import DEFAULT_MODEL
from gam_lm.presets.setups import preset
from gam_lm.training.recipe import TrainConfig

if TYPE_CHECKING:
    from gam_lm.data.tokens import TokenCorpus


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one model; the same command goes on with a run that was killed."""

    out: Path
    """Run directory to write."""
    preset: str | None = None
    """Setup that gives the defaults of all other flags."""
    model: str = DEFAULT_MODEL
    """Name of the model: gives the defaults of the architecture's flags."""
    text: Annotated[Data, FLAT] = Data()
    architecture: Architecture
    recipe: Annotated[TrainConfig, FLAT] = TrainConfig()
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where figures go besides metrics.jsonl."""

    @classmethod
    def defaults(cls, arguments: list[str]) -> list[Train]:
        """A preset gives the defaults of the other flags, and the model's name those of the architecture's."""
        chosen, name = peek(arguments, "--preset"), peek(arguments, "--model")
        if chosen is None:
            name = name or DEFAULT_MODEL
            return [cls(out=tyro.MISSING, model=name, architecture=model_on_flags(name, {"vocab_size": 10_000}))]
        setup = preset(chosen)
        name = name or setup.models[0]
        architecture = model_on_flags(name, {"vocab_size": setup.vocab_size, **setup.model})
        return [cls(out=tyro.MISSING, model=name, text=Data.of(setup), architecture=architecture, recipe=setup.train)]

    def run(self) -> None:
        """Train and print the validation figures."""
        from gam_lm.cli.evaluate import print_evaluation
        from gam_lm.training.distributed import joined
        from gam_lm.training.loop import fit, new_model
        from gam_lm.training.precision import choose_device
        from gam_lm.training.trackers import make_tracker

        def prepare() -> TokenCorpus:
            return self.text.prepare(self.architecture.vocab_size)

        with joined(self.device) as (world, name):
            device = choose_device(name)
            corpus = world.first(prepare, then=prepare)
            assert corpus is not None  # each rank prepared it
            model = new_model(config_of_flags(self.architecture, vocab_size=corpus.vocab_size), self.recipe.seed, device)
            tracker = make_tracker("none" if world.rank else self.tracker, self.out, model.config.to_dict() | self.recipe.to_dict())
            trained = fit(model, corpus, self.recipe, self.out, tracker=tracker, label=self.model)
            if world.rank == 0:
                print_evaluation("validation", trained.validation)
                print(f"run: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a prompt; GAM and Mamba take the same time and memory for every token."""

    run_directory: Path
    """Run directory of the model."""
    prompt: str = ""
    """Text to go on from; empty starts a new document."""
    max_new_tokens: int = 256
    """Where to end; 0 goes on until interrupted."""
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens."""
    top_p: float = 0.95
    """Draw from the likeliest tokens that together have this probability."""
    seed: int | None = None
    """Of the draws; the same seed gives the same text."""
    compile: bool = False
    """Compile the step of one token first: some seconds, then faster."""
    state: Path | None = None
    """Go on from the text that `gam read` has read, at once."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Print the text as it comes."""
        from gam_lm.checkpoint import load_model, load_tokenizer_of
        from gam_lm.inference.generation import generate_text
        from gam_lm.training.precision import choose_device

        model = load_model(self.run_directory, device=choose_device(self.device))
        tokenizer = load_tokenizer_of(self.run_directory)
        if self.state is not None:
            self._from_state(model, tokenizer, self.state)
            return
        pieces = generate_text(
            model, tokenizer, self.prompt, max_new_tokens=self.max_new_tokens or None, temperature=self.temperature, top_k=self.top_k,
            top_p=self.top_p, seed=self.seed, compiled=self.compile,
        )  # fmt: skip
        print(self.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()

    def _from_state(self, model: Any, tokenizer: Any, state: Path) -> None:
        from gam_lm.errors import InputError
        from gam_lm.inference.context import Context
        from gam_lm.inference.continuation import Sampling, continue_text

        if self.compile:
            raise InputError("compile is true: leave out --compile or --state, a saved state is continued step by step")
        sampling = Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)
        context = Context.load(state, model, tokenizer)
        if ids := tokenizer.encode(self.prompt).ids:
            context.read(ids)
        print(self.prompt, end="", flush=True)
        for piece in continue_text(context, tokenizer, sampling, max_new_tokens=self.max_new_tokens or None):
            print(piece, end="", flush=True)
        print()
