"""`report.html` in a run directory: made anew at every validation that it shows, from metrics.jsonl alone, so that a run that goes on has it right."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from gam_lm.cli.outcome import floors_in_bits, meaning
from gam_lm.data.tokenizer import END_OF_TEXT
from gam_lm.diagnostics.memory_use import memory_use
from gam_lm.inference.generation import generate, generate_text
from gam_lm.report.run_page import RunFacts, read_metrics, write_run_page
from gam_lm.training.evaluate import targets_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gam_lm.cli.training_job import Job
    from gam_lm.model import LanguageModel
    from gam_lm.training.evaluate import Evaluation
    from gam_lm.training.trackers import Tracker

FILE = "report.html"

SAMPLE: Mapping[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 0}

SAMPLE_TOKENS = 80

MEMORY_TOKENS = 128

MOST_LOOKS = 12
"""A run that validates more often is looked at in every n-th validation alone, so that samples take no time that can be felt."""


class RunPage:
    """Looks at the model after a validation, and is the run's tracker: it hands the figures on to another and writes the page.

    Args:
        model: that is trained; None where it is spread over processes, which would all have to ask it: then the page shows curves and losses, and takes
            a sample of the finished model, which is to be given here.
        job: the run.
        plan: the lines of its plan.
        steps: of the whole run.
        tracker: of the user.
    """

    def __init__(self, model: LanguageModel | None, job: Job, plan: Sequence[str], steps: int, tracker: Tracker) -> None:
        self.model, self.job, self.plan, self.steps, self.tracker = model, job, plan, steps, tracker
        self.path = job.out / FILE

    def look(self, step: int, validation: Evaluation) -> dict[str, object]:
        """A sample, the memory's use, and the loss by the tokens read before: what one line of metrics.jsonl says for the page."""
        if not self._is_shown(step):
            return {}
        valid, chat, model = self.job.corpus.splits["valid"], self.job.plan.chat, self.model
        found: dict[str, object] = {}
        if model is not None:
            was_training = model.training
            model.eval()
            try:
                found["memory"] = _rounded(memory_use(model, [int(each) for each in valid.ids[:MEMORY_TOKENS]]))
                found["sample"] = self.sample()
            finally:
                model.train(was_training)
        if not chat:
            found["by_place"] = by_octave(validation.position_nats)
        return found

    def _is_shown(self, step: int) -> bool:
        """Of many validations every n-th, and the last: a function of the step, so that a run that goes on shows the same ones."""
        every = self.job.recipe.validate_every
        return every is None or step == self.steps or step // every % math.ceil(self.steps / every / MOST_LOOKS) == 0

    def sample(self) -> str:
        """What the model writes from an empty start, or from the first token of the validation text where its tokenizer has no start; of a chat its answer to
        the first conversation that is held out."""
        assert self.model is not None  # whoever asks has given a whole one
        if self.job.plan.chat:
            return self._answer()
        job, tokenizer = self.job, self.job.corpus.tokenizer
        prompt = "" if tokenizer.token_to_id(END_OF_TEXT) is not None else tokenizer.decode([int(job.corpus.splits["valid"].ids[0])])
        most = min(SAMPLE_TOKENS, self.model.config.longest or SAMPLE_TOKENS)
        return (prompt + "".join(generate_text(self.model.eval(), tokenizer, prompt, max_new_tokens=most, **SAMPLE))).strip()

    def _answer(self) -> str:
        """The beginning of that conversation with what the model says in place of its first answer."""
        assert self.model is not None
        tokenizer, valid = self.job.corpus.tokenizer, self.job.corpus.splits["valid"]
        assert valid.marks is not None  # it is a chat
        counted = valid.marks.counted
        start = int(counted.argmax())
        end = start + int((~counted[start:]).argmax()) - 1
        prompt = valid.ids[start - int((valid.marks.segments[:start] == valid.marks.segments[start]).sum()) : start].tolist()
        longest = self.model.config.longest or len(prompt) + SAMPLE_TOKENS
        most = min(SAMPLE_TOKENS, longest // 2)
        prompt = prompt[max(0, len(prompt) + most - longest) :]  # of a longer one its end
        stop = frozenset({int(valid.ids[end])})  # what ends an answer
        said = list(generate(self.model.eval(), prompt, max_new_tokens=most, stop=stop, **SAMPLE))
        return tokenizer.decode(prompt + said).strip()

    @cached_property
    def floors(self) -> dict[str, float]:
        """Bits per byte of what takes no model."""
        return floors_in_bits(self.job)

    def start(self, step: int) -> None:
        """Begin, or go on after ``step``."""
        self.tracker.start(step)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Hand on, and write the page after a validation that it shows."""
        self.tracker.log(figures, step)
        if "val_nats" in figures and self._is_shown(step):
            self.write()

    def finish(self) -> None:
        """Write out what is still held."""
        self.tracker.finish()

    def write(self, kept_step: int | None = None) -> bool:
        """Write the page as far as the run is; a finished one keeps the weights of ``kept_step``.

        Returns:
            Whether there is a page: it takes a validation to show, and jinja2, which training works without.
        """
        if find_spec("jinja2") is None:
            return False
        lines = read_metrics(self.job.out / "metrics.jsonl")
        validations = [line for line in lines if "val_nats" in line]
        if not validations:
            return False
        write_run_page(self.path, lines, self._facts(validations, kept_step))
        return True

    def _facts(self, validations: Sequence[Mapping[str, Any]], kept_step: int | None) -> RunFacts:
        job = self.job
        facts = RunFacts(
            name=job.out.name, model=job.plan.model, plan=self.plan, kept_step=kept_step, steps=self.steps,
            command=f"gam train --config {shlex.quote(str(job.out / 'run.toml'))} --out NEW_FOLDER",
        )  # fmt: skip
        valid = job.corpus.splits["valid"]
        per_nat = targets_of(valid) / math.log(2) / valid.bytes
        shown = next((line for line in validations if line["step"] == kept_step), validations[-1])
        floors = {name: bits / per_nat for name, bits in self.floors.items()}
        return dataclasses.replace(facts, bits_per_nat=per_nat, floors=floors, meaning=meaning(shown["val_nats"] * per_nat, self.floors))


def by_octave(position_nats: np.ndarray) -> list[list[float]]:
    """Mean losses where 1, 2 to 3, 4 to 7 … tokens were read before: pairs of the geometric middle of such a range and the mean.

    Args:
        position_nats: mean loss by place in the block (context,), as an evaluation has it; the first place is left out, which nothing precedes.
    """
    starts = [2**k for k in range(len(position_nats).bit_length()) if 2**k < len(position_nats)]
    ends = [*starts, len(position_nats)][1:]
    return [
        [round(math.sqrt(start * (end - 1)), 2), round(float(position_nats[start:end].mean()), 4)] for start, end in zip(starts, ends, strict=True)
    ]  # fmt: skip


def _rounded(memory: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    return [{name: round(value, 4) for name, value in layer.items()} for layer in memory]
