"""What a report says of each kind of results.json: its tables, its pictures, and the published figures beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from gam_lm.report.ablation import ablation, ablation_plot
from gam_lm.report.compare import NO_DIFFERENCE, corrected, difference, measured, named_before
from gam_lm.report.decode import decode_plots, decoding
from gam_lm.report.downstream import downstream
from gam_lm.report.ladder import ladder_table
from gam_lm.report.law import law_plots, law_tables
from gam_lm.report.plots import context_plots, loss_curves
from gam_lm.report.published import TABLE_1, TABLE_2, TABLE_3
from gam_lm.report.recall import recall, recall_by_gap, recall_by_length, recall_differences, recall_plots
from gam_lm.report.rows import Row, trained
from gam_lm.report.scaling import scaling, scaling_plots
from gam_lm.report.speed import speed, speed_plot
from gam_lm.report.state_tuning import state_tuning_table
from gam_lm.report.statistics import Difference, shown
from gam_lm.report.tables import Table, context_lengths, context_use, curves, evaluations, quality, text_tables
from gam_lm.report.tune import study_plot, study_table

Results = Mapping[str, Any]

PUBLISHED = "As published (arXiv 2509.00605)"

CAPTIONS = {
    "loss_curves": "Validation loss against training tokens: the mean over the seeds, with their range as a band",
    "loss_by_tokens": "Validation loss at the end of each run against its training tokens",
    "loss_by_seconds": "Validation loss at the end of each run against its time, at the speed that was measured in turns",
    "compute_time": "Time of a forward and backward pass of one block against the length of the sequence",
    "peak_memory": "Peak memory of one block against the length of the sequence",
    "decode": "Time of one more token against the tokens before it",
    "training_speed": "Training tokens per second of each model, from the plain step to the compiled one",
    "ablation": "Validation loss of each row above the full model, with its 95 % interval",
    "recall_gap": "Right answers against the tokens between pair and question, at the greatest length",
    "recall_length": "Right answers against the length of the sequence: of one training tested at several lengths, or of a training at each",
    "recall_state": "Right answers against the bytes that a model carries from token to token, where most models were measured",
    "recall": "Right answers against the number of pairs: the mean over the seeds, with their range as a band",
    "context_use": "What the text before the last d tokens is worth, with its 95 % interval over the targets",
    "position": "Loss against the tokens read before",
    "length": "Loss against the context length in evaluation",
    "tune": "Validation loss of every trial against the value that was tried",
}
"""What a picture shows, by the start of its file's name."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of results.json."""

    title: str
    question: str
    """What a reader asks who wants these results."""
    intro: str
    belongs: Callable[[Row], bool]
    """Whether a row is of this kind."""
    tables: Callable[[Results, Path], list[Table]]
    """From the results and their folder."""
    pictures: Callable[[Results, Path, Path], list[Path]] = lambda results, directory, into: []
    """From the results and their folder, written into another."""
    published: Table | None = None


def differences(results: Results, directory: Path) -> Table:
    """Every pair of models: the difference in loss, paired by seed, block and document, and what it shows."""
    pairs = {(a.name, b.name): (a, b) for a, b in combinations(measured(results, directory), 2)}
    found = {names: difference(a, b) for names, (a, b) in pairs.items()}
    primary = [names for names, (a, b) in pairs.items() if named_before(a, b)]
    known = corrected({names: each for names, each in found.items() if each is not None}, primary)
    lines = []
    for a, b in pairs:
        each = known.get((a, b))
        if each is None:
            lines.append([f"{a} − {b}", "", "0", "no seed in common"])
            continue
        width = f" ± {each.half_width:.4f}" if math.isfinite(each.half_width) else ""
        lines.append([f"{a} − {b}", f"{each.mean:+.4f}{width}", str(each.count), _finding(each, a, b)])
    note = (
        "Lower is better. ± is a 95 % interval, the widest over seeds, blocks and documents. It carries Holm's correction unless the comparison was named before "
        "the runs."
    )
    return Table(columns=["Models", "Difference (nats/token)", "Seeds", "Finding"], rows=lines, title="Paired differences", note=note)


def _finding(found: Difference, a: str, b: str) -> str:
    if not found.estimates:
        return "one seed does not compare models"
    return f"{a if found.mean < 0 else b} is lower" if shown(found) else NO_DIFFERENCE


def _quality(results: Results, directory: Path) -> list[Table]:
    return [quality(results, directory), *text_tables(results), *law_tables(results), differences(results, directory), curves(results)]


def _context(results: Results, directory: Path) -> list[Table]:
    return [evaluations(results), context_use(results), context_lengths(results)]


def _other(results: Results, directory: Path) -> list[Table]:
    """The plain figures of each row."""
    rows = [{key: value for key, value in row.items() if isinstance(value, str | int | float)} for row in results["rows"]]
    columns = list(dict.fromkeys(key for row in rows for key in row)) or ["row"]
    return [Table(columns=columns, rows=[[_plain(row.get(key, "")) for key in columns] for row in rows], title="Figures")]


def _plain(value: str | int | float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _table_1() -> Table:
    lines = [
        [line.model, line.corpus, "" if line.millions is None else f"{line.millions:.1f} M", f"{line.epoch_seconds:.1f}", f"{line.val_nats:.4f}", f"{line.val_ppl:,.2f}"]
        for line in TABLE_1
    ]  # fmt: skip
    columns = ["Model", "Corpus", "Parameters", "s/epoch", "Val loss (nats)", "PPL"]
    return Table(columns=columns, rows=lines, title=f"Table 1. {PUBLISHED}", note="One run each, no seed set, on a machine that is not ours.")


def _table_2() -> Table:
    lines = [
        [f"{line.sequence_length:,}", f"{line.gam_ms:.2f}", f"{line.gam_mb:,.2f}", *(
            ["out of memory", ""] if line.transformer_ms is None else [f"{line.transformer_ms:.2f}", f"{line.transformer_mb:,.2f}"]
        )]
        for line in TABLE_2
    ]  # fmt: skip
    columns = ["Length", "GAM time (ms)", "GAM memory (MB)", "Transformer time (ms)", "Transformer memory (MB)"]
    return Table(columns=columns, rows=lines, title=f"Table 2. {PUBLISHED}", note="On a GPU, which need not be ours; their Transformer materialises T × T scores.")


def _table_3() -> Table:
    lines = [[name, f"{line.parameters:,}", f"{line.val_ppl:.2f}"] for name, line in TABLE_3.items()]
    return Table(columns=["Row", "Parameters", "PPL (WikiText-2)"], rows=lines, title=f"Table 3. {PUBLISHED}", note="One run each, no seed set.")


KINDS: Mapping[str, Kind] = {
    "tuning": Kind(
        title="Tuning on another text", question="What is another text worth to the memory's initial values alone?",
        intro="What a text is worth to the initial memory alone, to adapters of the same size, and to all weights.",
        belongs=lambda row: "trained_parameters" in row, tables=lambda results, directory: [state_tuning_table(results)],
    ),
    "ladder": Kind(
        question="Which size and batch suit a text?",
        title="The ladder of `gam train`", intro="Models of several sizes on texts of several lengths, each for so many minutes: what the plan's rules rest on.",
        belongs=lambda row: "text_bytes" in row, tables=lambda results, directory: [ladder_table(results)],
    ),
    "study": Kind(
        title="Tuning", question="Which recipe suits each model?", intro="Every model gets the same trials over the same ranges.",
        belongs=lambda row: "tuned" in row and "trial" in row and "pairs" not in row, tables=lambda results, directory: [study_table(results)],
        pictures=lambda results, directory, into: study_plot(results, into / "tune"),
    ),
    "quality": Kind(
        title="Quality (Table 1)", question="Which model has the lowest loss?",
        intro="Every model reads the same tokens in the same order. The floors take no model: what does not beat them has learned no context.",
        belongs=lambda row: "val_nats_per_token" in row and "changes" not in row, tables=_quality,
        pictures=lambda results, directory, into: loss_curves(results, into / "loss_curves") + law_plots(results, into), published=_table_1(),
    ),
    "scaling": Kind(
        title="Time and memory (Table 2)", question="How do time and memory grow with the length?",
        intro="One block against the length of the sequence, each cell in a process of its own.",
        belongs=lambda row: "outcome" in row and "sequence_length" in row, tables=lambda results, directory: scaling(results),
        pictures=lambda results, directory, into: scaling_plots(results, into), published=_table_2(),
    ),
    "decode": Kind(
        title="Decoding", question="What does one more token cost?",
        intro="One more token after long contexts, beside the time that reading the weights takes.",
        belongs=lambda row: "share_of_bandwidth" in row, tables=lambda results, directory: decoding(results),
        pictures=lambda results, directory, into: decode_plots(results, into),
    ),
    "speed": Kind(
        title="Training speed", question="How fast is training?",
        intro="Whole training steps in turns, the plain way and this library's, beside the machine's own peak.",
        belongs=lambda row: "flops_per_second" in row, tables=lambda results, directory: speed(results),
        pictures=lambda results, directory, into: speed_plot(results, into / "training_speed"),
    ),
    "ablation": Kind(
        title="Ablation (Table 3)", question="What is each part of the published model worth?",
        intro="The full model taken apart, one thing at a time, on the same tokens in the same order.",
        belongs=lambda row: "changes" in row, tables=lambda results, directory: [ablation(results, directory)],
        pictures=lambda results, directory, into: ablation_plot(results, directory, into / "ablation"), published=_table_3(),
    ),
    "recall": Kind(
        title="Recall", question="What can a model recall?",
        intro="Synthetic tasks whose answer stands in the context and nowhere else.",
        belongs=lambda row: "pairs" in row, tables=lambda results, directory: [
            recall(results), recall_differences(results), *recall_by_length(results), recall_by_gap(results)],
        pictures=lambda results, directory, into: recall_plots(results, into),
    ),
    "downstream": Kind(
        title="Downstream tasks", question="What does a model know of grammar and of what comes next?",
        intro="BLiMP, LAMBADA, ARC-easy and PIQA through lm-evaluation-harness. The floors are counts of the training text: they know no more than pairs of tokens.",
        belongs=lambda row: "lm_eval" in row, tables=lambda results, directory: downstream(results),
    ),
    "context": Kind(
        title="Context use", question="How much of the text before does a model use?",
        intro="How much of the text before a token a trained model draws on.",
        belongs=lambda row: "position_nats" in row, tables=_context, pictures=lambda results, directory, into: context_plots(results, into),
    ),
    "other": Kind(title="Other results", question="What else was measured?",
        intro="Rows of a kind that has no table of its own.", belongs=lambda row: True, tables=_other),
}  # fmt: skip
"""In the order of the report."""


def kind_of(results: Results) -> str:
    """The kind of a results.json: the first that a row of it, floors aside, belongs to."""
    return next((name for name, kind in KINDS.items() if any(kind.belongs(row) for row in trained(results))), "other")
