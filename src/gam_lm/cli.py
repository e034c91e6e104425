"""The command ``gam``: verbs → functions.

A verb is a frozen dataclass whose fields are its flags and whose ``run`` does the work. Heavy imports happen inside ``run``.
Exit codes: 0 done, 2 the user's input (one line), 130 interrupted, 1 our bug.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gam_lm import __version__
from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, unknown_name
from gam_lm.presets import PRESETS, Preset, named_model, preset
from gam_lm.training.recipe import TrainConfig

if TYPE_CHECKING:
    from gam_lm.data.tokens import TokenCorpus
    from gam_lm.training.evaluate import Evaluation

logger = logging.getLogger("gam_lm")

VERBS = {
    "train": "train one model",
    "eval": "measure a trained model on a text",
    "generate": "continue a prompt, token by token",
    "bench": "train several models on the same tokens and compare them (Table 1)",
    "data": "prepare NAME: turn a corpus into token ids ahead of time",
    "report": "--readme FILE: render the tables of a Markdown file from their results.json",
    "env": "what this machine is and which backends it has",
}


class Verb(Protocol):
    """What every verb can do."""

    def run(self) -> None:
        """Do the work."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which text and which tokenizer."""

    data: str | None = None
    """Corpus name (stdlib, gutenberg, wikitext-2, wikitext-103, tinystories) or path (.txt .md .py .jsonl .parquet, or a folder)."""
    tokenizer: str = "bpe"
    """bpe (byte-level, trained on the training split), paper (the paper's protocol), or the path of a tokenizer.json."""
    train_rows: int | None = None
    """Rows of the training split that are used; None uses all."""
    valid_rows: int | None = None
    """Rows of the validation split that are used; None uses all."""

    def prepare(self, vocab_size: int) -> TokenCorpus:
        """The corpus as token ids; ``vocab_size`` is that of a tokenizer that is trained."""
        from gam_lm.data.tokens import prepare

        if self.data is None:
            raise InputError("data is not given: use --data with a corpus name or a path, or --preset")
        limits = {split: rows for split, rows in (("train", self.train_rows), ("valid", self.valid_rows)) if rows is not None}
        return prepare(self.data, tokenizer=self.tokenizer, vocab_size=vocab_size, row_limits=limits or None)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train one model; the same command goes on with a run that was killed."""

    out: Path
    """Run directory to write."""
    preset: str | None = None
    """Setup that gives the defaults of all other flags."""
    model: str = "gam"
    """Name of the model: gives the defaults of the architecture's flags."""
    text: Data = Data()
    architecture: ModelConfig = ModelConfig(vocab_size=10_000)
    recipe: TrainConfig = TrainConfig()
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …"""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where figures go besides metrics.jsonl."""

    def run(self) -> None:
        """Train and print the validation figures."""
        from gam_lm.training.loop import fit, new_model
        from gam_lm.training.precision import choose_device
        from gam_lm.training.trackers import make_tracker

        device = choose_device(self.device)
        corpus = self.text.prepare(self.architecture.vocab_size)
        model = new_model(self.architecture.replace(vocab_size=corpus.vocab_size), self.recipe.seed, device)
        tracker = make_tracker(self.tracker, self.out, model.config.to_dict() | self.recipe.to_dict())
        trained = fit(model, corpus, self.recipe, self.out, tracker=tracker, label=self.model)
        _print_evaluation("validation", trained.validation)
        print(f"run: {self.out}")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure a trained model on a whole split."""

    run_directory: Path
    """Run directory of the model."""
    data: str | None = None
    """Corpus name or path."""
    split: Literal["train", "valid", "test"] = "valid"
    """Which split."""
    context: int | None = None
    """Tokens per block; by default what the model was trained with."""
    batch_size: int = 16
    """Blocks at once; changes no figure."""
    device: str = "auto"
    """auto, cpu, cuda …"""
    json: bool = False
    """Print the figures as JSON on the last line."""

    def run(self) -> None:
        """Evaluate and print."""
        from gam_lm.checkpoint import load_model, load_tokenizer_of, read_json
        from gam_lm.data.tokens import prepare
        from gam_lm.training.evaluate import evaluate
        from gam_lm.training.precision import choose_device

        if self.data is None:
            raise InputError("data is not given: use --data with a corpus name or a path")
        model = load_model(self.run_directory, device=choose_device(self.device))
        load_tokenizer_of(self.run_directory)
        corpus = prepare(self.data, tokenizer=str(self.run_directory / "tokenizer.json"))
        if self.split not in corpus.splits:
            raise InputError(f"split is {self.split!r}: data {corpus.name!r} has {', '.join(corpus.splits)}")
        recipe = self.run_directory / "recipe.json"
        context = self.context or (read_json(recipe)["train_config"]["context"] if recipe.is_file() else model.config.max_position_embeddings)
        if model.config.positions == "learned" and context > model.config.max_position_embeddings:
            raise InputError(f"context is {context}, learned positions end at {model.config.max_position_embeddings}: use a shorter context")
        measured = evaluate(model, corpus.splits[self.split], context=context, batch_size=self.batch_size)
        _print_evaluation(self.split, measured)
        if self.json:
            print(json.dumps(measured.figures(self.split)))


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
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Print the text as it comes."""
        from gam_lm.checkpoint import load_model, load_tokenizer_of
        from gam_lm.generate import generate_text
        from gam_lm.training.precision import choose_device

        model = load_model(self.run_directory, device=choose_device(self.device))
        tokenizer = load_tokenizer_of(self.run_directory)
        pieces = generate_text(
            model, tokenizer, self.prompt, max_new_tokens=self.max_new_tokens or None, temperature=self.temperature, top_k=self.top_k,
            top_p=self.top_p, seed=self.seed,
        )  # fmt: skip
        print(self.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Train several models on the same tokens in the same order and compare them; the same command goes on with what is missing."""

    out: Path
    """Folder for results.json, table.md, loss_curves.svg and .png, and the runs."""
    preset: str | None = None
    """Setup that gives the defaults of all other flags; paper is both paper setups."""
    models: tuple[str, ...] = ("gam", "transformer", "mamba")
    """Names of the models."""
    seeds: tuple[int, ...] = (0,)
    """One row for each seed and model."""
    text: Data = Data()
    architecture: ModelConfig = ModelConfig(vocab_size=10_000, dropout=0.0)
    recipe: TrainConfig = TrainConfig()
    match_parameters: bool = True
    """Size every model to the parameters of the static GAM."""
    test: bool = False
    """Measure the test split of every finished model as well."""
    device: str = "auto"
    """auto, cpu, cuda …"""
    dry_run: bool = False
    """Print the plan, as JSON on the last line, and train nothing."""

    def run(self) -> None:
        """Train what is missing, then write table and plot."""
        from gam_lm.experiments.benchmark import benchmark, describe_plan, plan
        from gam_lm.measure import environment
        from gam_lm.results import Results
        from gam_lm.training.loop import corpus_figures
        from gam_lm.training.precision import choose_device

        device = choose_device(self.device)
        corpus = self.text.prepare(self.architecture.vocab_size)
        contenders = plan(self.models, self.seeds, self.architecture.replace(vocab_size=corpus.vocab_size), self.recipe, match=self.match_parameters)
        if self.dry_run:
            rows = describe_plan(contenders, corpus, device)
            for row in rows:
                print(
                    f"{row['model']}, seed {row['seed']}: {row['parameters']:,} parameters, {row['steps']} steps, about {row['expected_seconds']:.0f} s"
                )
            print(json.dumps(rows))
            return
        path = self.out / "results.json"
        if self.out.is_dir() and any(self.out.iterdir()) and not path.is_file():
            raise InputError(f"out is {str(self.out)!r}, which is not empty and has no results.json: choose a new folder")
        command = shlex.join(["gam", *sys.argv[1:]])
        results = Results.open(path, command=command, environment=environment(), corpus=corpus_figures(corpus))
        benchmark(contenders, corpus, results, self.out, device, test=self.test)
        self._show(path)

    def _show(self, path: Path) -> None:
        from gam_lm.files import write_text
        from gam_lm.report.plots import loss_curves
        from gam_lm.report.tables import quality_table
        from gam_lm.results import read_results

        results = read_results(path)
        table = quality_table(results)
        write_text(self.out / "table.md", table)
        print(table)
        print(f"runs:  {self.out / 'runs'}\ntable: {self.out / 'table.md'}")
        for picture in loss_curves(results, self.out / "loss_curves"):
            print(f"plot:  {picture}")


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn a corpus into token ids ahead of time, where every model will find them."""

    text: Data = Data()
    vocab_size: int = 10_000
    """Entries of a tokenizer that is trained."""

    def run(self) -> None:
        """Prepare and describe."""
        from gam_lm.data.tokens import describe

        print(describe(self.text.prepare(self.vocab_size)))


@dataclass(frozen=True, kw_only=True)
class Report:
    """Render results for people."""

    readme: Path
    """Markdown file whose marked tables are made anew from the results.json files they name."""

    def run(self) -> None:
        """Render in place."""
        from gam_lm.report.readme import update

        print(f"{self.readme}: {'tables made anew' if update(self.readme) else 'up to date'}")


@dataclass(frozen=True, kw_only=True)
class Env:
    """What this machine is and which backends it has."""

    def run(self) -> None:
        """Print it, a line each."""
        from gam_lm.measure import environment
        from gam_lm.mixers import REGISTRY, mixer_class

        for name, value in environment().items():
            print(f"{name}: {value}")
        for name in REGISTRY:
            print(f"mixer {name}: {', '.join(mixer_class(name).backends)}")


COMMANDS: dict[str, type[Any]] = {"train": Train, "eval": Eval, "generate": Generate, "bench": Bench, "data": Prepare, "report": Report, "env": Env}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit."""
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))


def run(arguments: list[str]) -> int:
    """Run one verb and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"gam-lm {__version__}")
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        for verb in parse(arguments):
            verb.run()
    except InputError as error:
        print(f"gam: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stdout = None  # whoever read our output has gone: nothing is left to flush to
    return 0


def parse(arguments: list[str]) -> list[Verb]:
    """The verb that the arguments name, with its flags; several for a preset of several setups."""
    verb, rest = arguments[0], arguments[1:]
    if verb not in COMMANDS:
        raise unknown_name("verb", verb, COMMANDS)
    if verb == "data":
        return [_parse_prepare(rest)]
    chosen = _peek(rest, "--preset")
    if chosen == "paper" and verb == "bench":
        return [_parse_paper_part(rest, name) for name in ("paper-wikitext2", "paper-tinystories")]
    return [_parse(verb, rest, _defaults(verb, rest, preset(chosen) if chosen else None))]


def _parse(verb: str, rest: list[str], default: Verb | None = None) -> Verb:
    import tyro

    # `gam eval RUN`: what has no default is positional; elsewhere everything is a flag.
    positional = (tyro.conf.PositionalRequiredArgs,) if verb in ("eval", "generate") else ()
    return tyro.cli(COMMANDS[verb], args=rest, prog=f"gam {verb}", default=default, config=(tyro.conf.OmitArgPrefixes, *positional))


def _parse_prepare(rest: list[str]) -> Verb:
    """`gam data prepare NAME …`."""
    if not rest or rest[0] != "prepare":
        raise InputError(f"data {rest[0] if rest else ''!r} is no verb: use `gam data prepare NAME`")
    named = rest[1:]
    if named and not named[0].startswith("-"):
        named = ["--data", *named]
    return _parse("data", named)


def _parse_paper_part(rest: list[str], name: str) -> Verb:
    """One of the two setups of `gam bench --preset paper`, in a folder of its own below --out."""
    at = rest.index("--preset") if "--preset" in rest else None
    own = [part for part in rest if part != "--preset=paper"] if at is None else rest[:at] + rest[at + 2 :]
    bench = _parse("bench", ["--preset", name, *own], _defaults("bench", rest, preset(name)))
    assert isinstance(bench, Bench)
    return dataclasses.replace(bench, out=bench.out / name.removeprefix("paper-"))


def _defaults(verb: str, rest: list[str], chosen: Preset | None) -> Verb | None:
    """What a preset, and for `gam train` the model's name, give as the defaults of the other flags."""
    if verb not in ("train", "bench"):
        return None
    import tyro

    out: Any = tyro.MISSING
    text, base, recipe = Data(), Bench.architecture, TrainConfig()
    if chosen is not None:
        limits = chosen.row_limits or {}
        text = Data(data=chosen.data, tokenizer=chosen.tokenizer, train_rows=limits.get("train"), valid_rows=limits.get("valid"))
        base, recipe = ModelConfig(vocab_size=chosen.vocab_size, **chosen.model), chosen.train
    if verb == "train":
        name = _peek(rest, "--model") or (chosen.models[0] if chosen else "gam")
        return Train(out=out, model=name, text=text, architecture=named_model(name, base), recipe=recipe)
    if chosen is None:
        return Bench(out=out, text=text, architecture=base, recipe=recipe)
    return Bench(
        out=out, models=chosen.models, seeds=chosen.seeds, text=text, architecture=base, recipe=recipe, match_parameters=chosen.match_parameters
    )


def _peek(arguments: list[str], flag: str) -> str | None:
    """The value of a flag before the real parsing, which needs its defaults."""
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(flag + "="):
            return argument.split("=", 1)[1]
    return None


def _print_evaluation(split: str, measured: Evaluation) -> None:
    figures = measured.figures(split)
    print(
        f"{split}: {figures[f'{split}_nats_per_token']:.4f} nats/token, PPL {figures[f'{split}_ppl']:.2f}, "
        f"{figures[f'{split}_bits_per_byte']:.4f} bits/byte, word PPL {figures[f'{split}_word_ppl']:.1f}"
    )


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {says}" for verb, says in VERBS.items())
    presets = "\n".join(f"  {name}: {each.summary}" for name, each in PRESETS.items())
    return (
        "gam: Gated Associative Memory language models\n\nusage: gam VERB [flags]; gam VERB --help lists the flags\n\n"
        f"verbs:\n{verbs}\n\npresets (gam train, gam bench; `gam bench --preset paper` is Table 1 whole):\n{presets}"
    )
