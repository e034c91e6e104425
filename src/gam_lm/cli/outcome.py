"""What `gam train` tells at the end: the figure beside what takes no model, what it means, a sample, and what can be done next."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

import numpy as np

from gam_lm.cli.evaluate import print_evaluation
from gam_lm.data.first_part import text_of
from gam_lm.experiments.floors import bigram_nats, unigram_nats, xz_bytes
from gam_lm.inference.generation import generate_text

if TYPE_CHECKING:
    from gam_lm.cli.training_job import Job
    from gam_lm.model import LanguageModel
    from gam_lm.training.loop import Trained

MOST_COUNTED = 20_000_000
"""Training tokens that the counts are taken of: of a longer text they hardly change."""

SAMPLE_TOKENS = 80


def tell(trained: Trained, model: LanguageModel, job: Job) -> None:
    """Print it all."""
    valid = job.corpus.splits["valid"]
    print_evaluation("validation", trained.validation)
    if trained.last is not None:
        bits, last = (each.figures("v")["v_bits_per_byte"] for each in (trained.validation, trained.last))
        print(
            f"kept: the state of step {trained.kept_step:,} of {trained.steps:,}, the best validation ({bits:.3f} bits a byte); "
            f"the last state has {last:.3f}: validation rose after that, as the text is small"
        )
    if not job.plan.chat:
        bits = trained.validation.figures("v")["v_bits_per_byte"]
        found = floors_in_bits(job)
        print(f"bits per byte: {bits:.3f}; without a model: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
        print(meaning(bits, found))
        print("\nA sample:\n" + "".join(generate_text(model.eval(), job.corpus.tokenizer, "", max_new_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=0)).strip())
    out = shlex.quote(str(job.out))
    print(f"\nrun: {job.out} ({valid.tokens:,} validation tokens)\nnext:")
    for command, what in (
        (f"gam chat {out}" if job.plan.chat else f'gam generate {out} --prompt "…"', "talk to it" if job.plan.chat else "let it write"),
        (f"gam eval {out} --data TEXT", "measure it on another text"),
        (f"gam train OTHER_TEXT --from {out}", "go on with another text"),
        (f"gam train --chat CONVERSATIONS.jsonl --from {out}", "teach it to answer"),
        (f"gam serve {out}", "let others use it"),
    ):  # fmt: skip
        print(f"  {command}  # {what}")


def floors_in_bits(job: Job) -> dict[str, float]:
    """Bits per byte of the measured validation text from counts of the training tokens, and from xz, which sees the validation text alone."""
    train, valid = np.asarray(job.corpus.splits["train"].ids[:MOST_COUNTED]), np.asarray(job.corpus.splits["valid"].ids)
    size, raw = job.corpus.vocab_size, job.corpus.splits["valid"].bytes
    per_byte = (len(valid) - 1) / math.log(2) / raw
    text = [text_of(job.corpus.tokenizer, valid)]
    return {
        "unigram": unigram_nats(train, valid, size) * per_byte, "bigram": bigram_nats(train, valid, size) * per_byte, "xz": 8 * xz_bytes(text) / raw,
    }  # fmt: skip


def meaning(bits: float, floors: dict[str, float]) -> str:
    """One sentence on a figure beside the floors, each in bits per byte."""
    if bits < floors["bigram"]:
        more = "" if bits < floors["xz"] else ", and xz, which looks for longer repetitions, still packs this text smaller"
        return f"It is below bigram counts: the model has learned more than word pairs{more}."
    if bits < floors["unigram"]:
        return "It is between unigram and bigram counts: the model knows which words are frequent and little of what follows what; more --minutes or more text help."
    return "It is not below unigram counts: the model has learned next to nothing yet; give it more --minutes."
