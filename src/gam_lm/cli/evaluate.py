"""`gam eval`: the loss of trained models, how much of their context they use, and what they reach in the tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from gam_lm.cli.flags import command_line
from gam_lm.cli.numbers import Count
from gam_lm.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from gam_lm.data.tokens import TokenCorpus
    from gam_lm.model import LanguageModel
    from gam_lm.training.evaluate import Evaluation

logger = logging.getLogger("gam_lm")

STREAMED_AT_ONCE = 4096
"""Tokens per call of a long context: bounds the memory for logits."""


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure trained models on a whole split, or on tasks."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Model and text": ("run_directory", "data", "split"),
        "What is measured": ("context", "context_use", "stream", "tasks", "harness"),
        "Output": ("out", "json", "device"),
    }

    run_directory: tuple[Path, ...]
    """Run directory of the model, or of several."""
    data: str | None = None
    """Corpus name or path; with --tasks the text that the floors count."""
    split: Literal["train", "valid", "test"] = "valid"
    """Which split."""
    context: Count | None = None
    """Tokens per block; by default what the model was trained with."""
    context_use: tuple[Count, ...] = ()
    """Also the loss of the same targets from only so many tokens before them, e.g. 4 13 64 256 1024: what text further back is worth."""
    targets: Count = 2048
    """Targets of --context-use."""
    stream: bool = False
    """Also the loss over the whole split as one text, the state carried over all block borders."""
    tasks: tuple[str, ...] = ()
    """blimp lambada arc_easy piqa instead of a text, from files under $GAM_DATA/eval: one table of all models, beside counts of --data."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, e.g. wikitext lambada_openai blimp, instead of a text."""
    harness_tasks: Path | None = None
    """Folder of own task descriptions in YAML for --harness."""
    examples: Count | None = None
    """Of each task of --tasks or --harness the first so many, to try it out."""
    out: Path | None = None
    """Folder for results.json, table.md and the plots; further models are added to what is there."""
    batch_size: Count = 16
    """Blocks at once, or requests of --context tokens; changes no figure."""
    start: Path | None = None
    """Initial memory that `gam tune-state` wrote for this run."""
    device: str = "auto"
    """auto, cpu, cuda …"""
    json: bool = False
    """Print the figures as JSON on the last line."""

    def run(self) -> None:
        """Evaluate, print, and with --out write."""
        if not self.run_directory:  # a list may be empty for the parser
            raise InputError("RUN_DIRECTORY is missing: give it (Run directory of the model, or of several)")
        if self.tasks and self.harness:
            raise InputError("tasks and harness are both given: use one, --tasks for files under $GAM_DATA/eval")
        if not self.tasks and not self.harness and self.data is None:
            raise InputError("data is not given: use --data with a corpus name or a path, --tasks or --harness with tasks")
        found: Any
        if self.tasks:
            found = self._tasks()
        else:
            measure = self._harness if self.harness else self._text
            each = [measure(path, name) for path, name in zip(self.run_directory, distinct_names(self.run_directory), strict=True)]
            found = each[0] if len(each) == 1 else each
        if self.json:
            print(json.dumps(found))

    def _text(self, path: Path, name: str) -> dict[str, Any]:
        """Measure one model, which the results call ``name``, on the split."""
        from gam_lm.checkpoint import load_tokenizer_of
        from gam_lm.cli.starting import load_started
        from gam_lm.data.tokens import prepare
        from gam_lm.training.directory import trained_with
        from gam_lm.training.evaluate import evaluate

        assert self.data is not None
        model = load_started(path, self.start, self.device)
        load_tokenizer_of(path)
        corpus = prepare(self.data, tokenizer=str(path / "tokenizer.json"))
        if self.split not in corpus.splits:
            raise InputError(f"split is {self.split!r}: data {corpus.name!r} has {', '.join(corpus.splits)}")
        recipe = trained_with(path)
        context = self.context or (recipe and recipe.context) or model.config.max_position_embeddings
        model.config.check_length("context", context)

        measured = evaluate(model, corpus.splits[self.split], context=context, batch_size=self.batch_size)
        if len(self.run_directory) > 1:
            print(f"{path}: ", end="")
        print_evaluation(self.split, measured)
        row: dict[str, Any] = {"model": name, "seed": recipe and recipe.seed, "split": self.split, "context": context}
        row |= measured.figures(self.split) | {"position_nats": measured.position_nats.tolist()}
        if self.context_use:
            row["context_use"] = self._context_use(model, corpus, context)
        if self.stream:
            row["stream_nats_per_token"] = self._stream(model, corpus)
        if self.out is not None:
            self._keep(row, model, corpus)
        return row if self.context_use or self.stream else dict(measured.figures(self.split))

    def _context_use(self, model: LanguageModel, corpus: TokenCorpus, context: int) -> dict[str, Any]:
        from gam_lm.data.tokenizer import END_OF_TEXT
        from gam_lm.diagnostics.context_use import context_use
        from gam_lm.runtime.progress import progress

        separator = corpus.tokenizer.token_to_id(END_OF_TEXT)
        with progress("context use", None, "sequences") as bar:
            used = context_use(
                model, corpus.splits[self.split].ids, separator, self.context_use, context=context, targets=self.targets, advance=bar.advance
            )
        print(f"context use, {used.targets} targets, {used.context} tokens before each; what the text before the last d is worth:")
        for d, gain in used.gains.items():
            print(f"  d = {d:5}: " + ("not measurable with its positions" if gain is None else f"{gain:+.4f} ± {used.half_widths[d]:.4f} nats/token"))
        by_d = {
            str(d): None if nats is None else {"nats": nats, "gain": used.gains[d], "half_width": used.half_widths[d]} for d, nats in used.nats.items()
        }
        return {"context": used.context, "targets": used.targets, "by_distance": by_d}

    def _stream(self, model: LanguageModel, corpus: TokenCorpus) -> float | None:
        from gam_lm.training.evaluate import evaluate

        split = corpus.splits[self.split]
        length = split.tokens - 1
        if model.config.longest is not None and length > model.config.longest:
            print(f"one stream: not measurable, learned positions end at {model.config.longest}")
            return None
        nats = evaluate(model, split, context=length, batch_size=1, window=STREAMED_AT_ONCE).nats_per_token
        print(f"one stream: {nats:.4f} nats/token")
        return nats

    def _keep(self, row: dict[str, Any], model: LanguageModel, corpus: TokenCorpus) -> None:
        from gam_lm.experiments.models import described
        from gam_lm.report.plots import context_plots
        from gam_lm.report.tables import context_table
        from gam_lm.results import Results, read_results, results_file
        from gam_lm.runtime.files import write_text
        from gam_lm.runtime.measure import environment
        from gam_lm.training.loop import corpus_figures

        assert self.out is not None
        path = results_file(self.out)
        command = command_line()
        results = Results.open(path, command=command, environment=environment(), corpus=corpus_figures(corpus))
        results.add(row | described(model.config, next(model.parameters()).device) | {"command": command})
        write_text(self.out / "table.md", context_table(read_results(path)))
        for picture in context_plots(read_results(path), self.out):
            print(f"plot: {picture}")

    def _tasks(self) -> list[dict[str, Any]]:
        """Measure all models on the library's own tasks."""
        from gam_lm.cli.terminal import show
        from gam_lm.experiments.downstream import Downstream, downstream, words
        from gam_lm.report.downstream import write_downstream
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.training.precision import choose_device

        wanted = Downstream(
            runs=self.run_directory, tasks=self.tasks, data=self.data, context=self.context, examples=self.examples, batch_size=self.batch_size
        )
        results = None if self.out is None else Results.open(results_file(self.out), command=command_line(), environment=environment(), corpus=None)
        rows = downstream(wanted, results, choose_device(self.device))
        if self.out is None:
            for row in rows:
                print(f"{row['model']}: {words(row)}")
        else:
            show(write_downstream(self.out))
            print(f"table: {self.out / 'table.md'}")
        return rows

    def _harness(self, path: Path, name: str) -> dict[str, Any]:
        """Measure one model, which the results call ``name``, on tasks of the harness."""
        from gam_lm.checkpoint import read_json
        from gam_lm.results import Results, results_file
        from gam_lm.runtime.measure import environment
        from gam_lm.training.directory import trained_with
        from gam_lm.training.precision import choose_device

        try:
            from gam_lm.hf.harness import harness
        except MissingExtraError as error:
            raise MissingExtraError("lm_eval", "eval", "harness") from error
        if not (path / "config.json").is_file():
            raise InputError(f"run directory {str(path)!r} does not exist or has no config.json: name a folder that `gam train` wrote")
        config = read_json(path / "config.json")
        recipe = trained_with(path)
        longest = config.get("max_position_embeddings", 1024)
        context = self.context or (recipe and recipe.context) or longest
        if config.get("positions") == "learned" and context > longest:
            raise InputError(f"context is {context}, learned positions end at {longest}: use a shorter context")
        device = choose_device(self.device)
        figures = harness(
            path, self.harness, context=context, own_tasks=self.harness_tasks, examples=self.examples, batch_size=self.batch_size, device=device,
        )  # fmt: skip
        before = f"{path}, " if len(self.run_directory) > 1 else ""
        for task, values in figures.items():
            print(f"{before}{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))
        if self.out is not None:
            results = Results.open(results_file(self.out), command=command_line(), environment=environment(), corpus=None)
            row = {"model": name, "seed": recipe and recipe.seed, "model_config": config, "context": context, "examples": self.examples}
            for task, values in figures.items():
                results.add(row | {"task": task, **values})
        return figures


def distinct_names(runs: Sequence[Path]) -> list[str]:
    """What the results call each run: the name of its folder, with the folders above it where another run would be called the same."""
    paths = [run.resolve() for run in runs]
    found = []
    for path in paths:
        lengths = range(1, len(path.parts) + 1)
        alone = (length for length in lengths if all(other.parts[-length:] != path.parts[-length:] for other in paths if other != path))
        found.append("/".join(path.parts[-next(alone, 1) :]))
    return found


def print_evaluation(split: str, measured: Evaluation) -> None:
    """The figures of an evaluation in one line."""
    figures = measured.figures(split)
    print(
        f"{split}: {figures[f'{split}_nats_per_token']:.4f} nats/token, PPL {figures[f'{split}_ppl']:.2f}, "
        f"{figures[f'{split}_bits_per_byte']:.4f} bits/byte, word PPL {figures[f'{split}_word_ppl']:.1f}"
    )
