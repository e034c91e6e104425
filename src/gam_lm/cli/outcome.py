"""What `gam train` tells at the end: the figure beside what takes no model, what it means, a sample, and what can be done next."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

import numpy as np

from gam_lm.cli.evaluate import print_evaluation
from gam_lm.cli.flags import command_line
from gam_lm.data.first_part import text_of
from gam_lm.experiments.benchmark import evaluations, figures
from gam_lm.experiments.floors import bigram_nats, unigram_nats, xz_bytes
from gam_lm.experiments.models import described
from gam_lm.results import Results
from gam_lm.runtime.measure import environment
from gam_lm.training.directory import corpus_figures
from gam_lm.training.plan_words import duration

if TYPE_CHECKING:
    from gam_lm.cli.run_page import RunPage
    from gam_lm.cli.training_job import Job
    from gam_lm.model import LanguageModel
    from gam_lm.training.evaluate import Evaluation
    from gam_lm.training.loop import Trained

MOST_COUNTED = 20_000_000
"""Training tokens that the counts are taken of: of a longer text they hardly change."""


def tell(trained: Trained, model: LanguageModel, job: Job, seconds: float | None, page: RunPage) -> None:
    """Print it all, and write results.json and the last form of the page.

    Args:
        trained: what the run knows of itself.
        model: with the weights that are kept.
        job: what was run.
        seconds: of the whole run with its validations and states; None where it was stopped and went on.
        page: of the run.
    """
    valid = job.corpus.splits["valid"]
    measured = evaluations(model, trained, job.corpus, job.recipe, test=False)["val"]
    print_evaluation("validation", measured)
    if seconds is not None:
        print(f"time: {duration(seconds)}, {duration(job.plan.seconds)} were planned; in {trained.precision.replace('float', 'fp').replace('bfp', 'bf')}")
    if trained.last is not None:
        bits, last = (each.figures("v")["v_bits_per_byte"] for each in (trained.validation, trained.last))
        print(
            f"kept: the state of step {trained.kept_step:,} of {trained.steps:,}, the best validation ({bits:.3f} bits a byte); "
            f"the last state has {last:.3f}: validation rose after that, as the text is small"
        )
    bits = measured.figures("v")["v_bits_per_byte"]
    print(f"bits per byte: {bits:.3f}; without a model: " + ", ".join(f"{name} {value:.3f}" for name, value in page.floors.items()))
    print(meaning(bits, page.floors))
    keep_figures(trained, measured, model, job, page.floors, seconds)
    written = page.write(trained.kept_step)
    print(f"\nA sample:\n{page.sample()}")
    out = shlex.quote(str(job.out))
    where = f"{page.path} (curves, samples, the memory's use; open it in a browser)" if written else "none; pip install 'gam-lm[plot]' for report.html"
    print(f"\nrun: {job.out} ({valid.tokens:,} validation tokens)\npage: {where}\nnext:")
    for command, what in (
        (f"gam chat {out}" if job.plan.chat else f'gam generate {out} --prompt "…"', "talk to it" if job.plan.chat else "let it write"),
        (f"gam eval {out} --data TEXT", "measure it on another text"),
        (f"gam train OTHER_TEXT --from {out}", "go on with another text"),
        (f"gam train --chat CONVERSATIONS.jsonl --from {out}", "teach it to answer"),
        (f"gam serve {out}", "let others use it"),
    ):  # fmt: skip
        print(f"  {command}  # {what}")


def keep_figures(trained: Trained, measured: Evaluation, model: LanguageModel, job: Job, floors: dict[str, float], seconds: float | None) -> None:
    """Write the figures of a finished run into the results.json of its directory, with the floors in rows of their own."""
    results = Results.open(job.out / "results.json", command=command_line(), environment=environment(), corpus=corpus_figures(job.corpus))
    valid = job.corpus.splits["valid"]
    for name, bits in floors.items():
        nats = bits * math.log(2) * valid.bytes / measured.targets
        results.add({"model": name, "floor": True, "val_nats_per_token": nats, "val_ppl": math.exp(min(700.0, nats)), "val_bits_per_byte": bits})
    row = {"model": job.plan.model, "seed": job.recipe.seed, **described(job.config, next(model.parameters()).device), "train_config": job.recipe.to_dict()}
    before = results.find(row) or {}
    row |= figures(model, trained, {"val": measured}, job.recipe)
    row |= {
        "minutes": job.plan.minutes, "expected_seconds": job.plan.seconds, "run_seconds": before.get("run_seconds") if seconds is None else round(seconds, 2),
        "steps": trained.steps, "kept_step": trained.kept_step, "valid_tokens": valid.tokens, "chat": job.plan.chat,
    }  # fmt: skip
    if trained.last is not None:
        row |= trained.last.figures("last")
    results.add({key: value for key, value in row.items() if value is not None})


def floors_in_bits(job: Job) -> dict[str, float]:
    """Bits per byte of the measured validation text from counts of the training tokens, and from xz, which sees the validation text alone.

    Of conversations all three are of what the assistant says.
    """
    parts = job.corpus.splits["train"], job.corpus.splits["valid"]
    train, valid = np.asarray(parts[0].ids[:MOST_COUNTED]), np.asarray(parts[1].ids)
    size, raw, said, predicted = job.corpus.vocab_size, parts[1].bytes, valid, len(valid) - 1
    counted = None
    if parts[0].marks is not None and parts[1].marks is not None:
        counted = parts[0].marks.counted[:MOST_COUNTED], parts[1].marks.counted
        said, predicted = valid[counted[1]], int(counted[1].sum())
    per_byte = predicted / math.log(2) / raw
    return {
        "unigram": unigram_nats(train, valid, size, counted) * per_byte, "bigram": bigram_nats(train, valid, size, counted) * per_byte,
        "xz": 8 * xz_bytes([text_of(job.corpus.tokenizer, said)]) / raw,
    }  # fmt: skip


def meaning(bits: float, floors: dict[str, float]) -> str:
    """One sentence on a figure beside the floors, each in bits per byte."""
    if bits < floors["bigram"]:
        more = "" if bits < floors["xz"] else ", and xz, which looks for longer repetitions, still packs this text smaller"
        return f"It is below bigram counts: the model has learned more than word pairs{more}."
    if bits < floors["unigram"]:
        return "It is between unigram and bigram counts: the model knows which words are frequent and little of what follows what; more --minutes or more text help."
    return "It is not below unigram counts: the model has learned next to nothing yet; give it more --minutes."
