"""What a comparison of models says: one paragraph in plain English, or the same as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gam_lm.errors import InputError
from gam_lm.report.compare import Measured, Pair, Place, difference, in_named_order, named_before, named_now, pairs_of, primary_pairs
from gam_lm.report.statistics import Difference, holm, shown

SPLITS = {"val": "validation loss", "test": "test loss"}
"""What the loss on a split is called; that on a further text says its name."""


def loss_on(split: str) -> str:
    """The loss on a split or a further text, in words."""
    return SPLITS.get(split, f"loss on {split}")


Named = Literal["before the runs", "with this command"]
"""When a primary comparison, or a margin, was named."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One pair of models, compared."""

    a: str
    b: str
    found: Difference
    """a − b, its interval at the level that holds for this comparison."""
    primary: Named | None
    p_value: float | None
    """Corrected unless primary; None where one seed describes and compares nothing."""
    margin: float | None
    """The margin that "no loss" of ``a`` against ``b`` is claimed at; None where none is named, or the comparison carries a correction."""
    margin_named: Named

    @property
    def no_loss(self) -> bool | None:
        """Whether the upper end of the interval is below the margin; None where nothing is claimed."""
        return None if self.margin is None else self.found.mean + self.found.half_width < self.margin

    def sentences(self) -> list[str]:
        """The finding, how it was named, and no loss."""
        found, widest = self.found, self.found.widest
        if widest is None:
            return [
                f"{self.a} and {self.b} have one seed in common, on which {self.a} − {self.b} is {found.mean:+.4f} nats per token: "
                "this describes two runs and does not compare the models."
            ]
        level = f"{100 * found.level:.4g} % interval"
        source = f"{found.count} seeds, widest over {widest.over}"
        if shown(found):
            lower, higher = (self.a, self.b) if found.mean < 0 else (self.b, self.a)
            low, high = abs(found.mean) - found.half_width, abs(found.mean) + found.half_width
            said = [f"{lower} is lower than {higher} by {abs(found.mean):.4f} nats per token ({level} {low:.4f} to {high:.4f}; {source})."]
        else:
            ends = f"{found.mean - found.half_width:+.4f} to {found.mean + found.half_width:+.4f}"
            said = [f"No difference is shown between {self.a} and {self.b}: {self.a} − {self.b} is {found.mean:+.4f} nats per token ({level} {ends}; {source})."]
        if self.primary is not None:
            said.append(f"This comparison was named primary {self.primary}.")
        if self.margin is not None and not (shown(found) and found.mean < 0):
            upper = f"the upper end of the interval, {found.mean + found.half_width:+.4f}"
            margin = f"below the margin of {self.margin:g} that was named {self.margin_named}"
            said.append(f"{self.a} shows no loss against {self.b}: {upper}, is {margin}." if self.no_loss else f"No loss of {self.a} cannot be claimed: {upper}, is not {margin}.")
        return said

    def to_json(self) -> dict[str, Any]:
        """The figures; those that are not known are null."""
        found, widest = self.found, self.found.widest
        low, high = (None, None) if widest is None else (found.mean - found.half_width, found.mean + found.half_width)
        return {
            "a": self.a, "b": self.b, "seeds": found.count, "documents": found.documents, "difference": found.mean, "level": found.level, "low": low, "high": high,
            "half_widths": {each.over: each.half_width(found.level) for each in found.estimates}, "widest": None if widest is None else widest.over,
            "p_value": self.p_value, "primary": self.primary, "shown": None if widest is None else shown(found),
            "margin": self.margin, "margin_named": None if self.margin is None else self.margin_named, "no_loss": self.no_loss,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Several comparisons of one command."""

    split: str
    comparisons: Sequence[Comparison]
    corrected: int
    """How many of them carry Holm's correction: more than one."""
    left_out: Sequence[str]
    """Sentences on trainings that diverged."""

    def paragraph(self) -> str:
        """All of it in plain English."""
        said = [sentence for each in self.comparisons for sentence in each.sentences()]
        if self.corrected > 1:
            said.append(f"The intervals of {self.corrected} comparisons that were not named primary are widened by Holm's correction.")
        compared = [each.found for each in self.comparisons if each.found.estimates]
        if compared:
            said.append(f"Differences are of {loss_on(self.split)}, paired by seed. {_method(compared)}")
        return " ".join([*said, *self.left_out])

    def to_json(self) -> dict[str, Any]:
        """The figures, and the paragraph."""
        return {
            "split": self.split, "unit": "nats per token", "comparisons": [each.to_json() for each in self.comparisons],
            "corrected": self.corrected if self.corrected > 1 else 0, "left_out": list(self.left_out), "paragraph": self.paragraph(),
        }  # fmt: skip


def compare(places: Sequence[str], *, primary: Sequence[str] = (), margin: float | None = None, split: str = "val") -> Verdict:
    """Compare results with each other.

    Args:
        places: DIR or DIR:MODEL, as gam_lm.report.compare.pairs_of takes them.
        primary: MODEL:MODEL of comparisons that are primary beside those that the results named before the runs.
        margin: of "no loss" in nats per token, where it is not the one that the results named before the runs.
        split: val, test, or a further text that `gam bench --texts` measured.

    Raises:
        InputError: where there is nothing to compare, models share no seed, or the text was another.
    """
    if margin is not None and not 0 < margin < math.inf:
        raise InputError(f"margin is {margin}: use a number of nats per token above 0")
    pairs = pairs_of(places)
    models = list({each.place: each for pair in pairs for each in pair}.values())
    names = _names(models)
    now = primary_pairs(primary, [name for each in models for name in {each.name, each.rows[0]["model"]}])
    left_out = [sentence for each in models for sentence in _left_out(each, names[each.place], split)] + _of_several(models)
    for pair in now:
        if not any(named_now(a, b, [pair]) for a, b in pairs):
            raise InputError(f"primary is {':'.join(pair)}, which is not compared here: name the results of both")
    pairs = [in_named_order(a, b, now) for a, b in pairs]
    found = [(a, b, _difference(a, b, names, split)) for a, b in pairs if a.compared(split) and b.compared(split)]
    if not found:
        raise InputError(" ".join([f"no two of the models have a finite {loss_on(split)}: train them to the end, or choose another split.", *left_out]))
    named = [_named(a, b, now) for a, b, _ in found]
    others = [i for i, (_, _, each) in enumerate(found) if named[i] is None and each.estimates]
    levels = dict(zip(others, holm([_p(found[i][2]) for i in others]), strict=True))
    comparisons = []
    for i, (a, b, each) in enumerate(found):
        p_value, level = levels.get(i, (each.p_value, 0.95))
        saved = {model.margin for model in (a, b)} - {None}
        wanted = margin if margin is not None else saved.pop() if len(saved) == 1 else None
        # "No loss" of the first of a pair is claimed where the comparison was named, or is the one that this command's margin is for; and with seeds enough.
        claims = each.p_value is not None and (named[i] is not None or (margin is not None and len(others) == 1))
        comparisons.append(Comparison(
            a=names[a.place], b=names[b.place], found=each.at(level), primary=named[i], p_value=p_value, margin=wanted if claims else None,
            margin_named="before the runs" if wanted in (a.margin, b.margin) else "with this command",
        ))  # fmt: skip
    return Verdict(split=split, comparisons=comparisons, corrected=len(others), left_out=left_out)


def _difference(a: Measured, b: Measured, names: dict[Place, str], split: str) -> Difference:
    found = difference(a, b, split)
    if found is None:
        raise InputError(f"{names[a.place]} and {names[b.place]} have no seed in common: train both with the same --seeds")
    return found


def _p(found: Difference) -> float:
    p = found.p_value
    assert p is not None  # it has estimates
    return p


def _named(a: Measured, b: Measured, now: Sequence[Pair]) -> Named | None:
    if named_before(a, b):
        return "before the runs"
    return "with this command" if named_now(a, b, now) else None


def _names(models: Sequence[Measured]) -> dict[Place, str]:
    """What each model is called: its folder is said where another has the same name."""
    names = [each.name for each in models]
    return {each.place: each.name if names.count(each.name) == 1 else f"{each.name} of {each.directory}" for each in models}


def _left_out(model: Measured, name: str, split: str) -> list[str]:
    """Sentences on the trainings of a model that are not compared."""
    said = []
    if seeds := [str(row.get("seed")) for row in model.diverged()]:
        said.append(f"{len(seeds)} of {len(model.rows)} trainings of {name} diverged (seed {', '.join(seeds)}) and {'is' if len(seeds) == 1 else 'are'} not compared.")
    if without := len(model.rows) - len(seeds) - len(model.compared(split)):
        said.append(f"{without} of {len(model.rows)} trainings of {name} {'has' if without == 1 else 'have'} no {loss_on(split)}.")
    return said


def _of_several(models: Sequence[Measured]) -> list[str]:
    """A sentence on each primary comparison that names a model of which a results.json has several variants."""
    named = dict.fromkeys(
        (name, ":".join(pair), str(each.directory)) for each in models for pair in each.primary for name in pair if name == each.rows[0]["model"] and not each.alone
    )
    return [f"{directory} named {pair} primary and has several variants of {name}: their comparisons carry the correction." for name, pair, directory in named]


def _method(compared: Sequence[Difference]) -> str:
    """How the intervals were made, which of their sources were not known included."""
    known = list(dict.fromkeys(each.over for found in compared for each in found.estimates))
    if len(known) == 1:
        said = "The interval is Student's t over seeds: the losses by block are not saved, so the text is not counted."
    else:
        said = f"Each interval is the widest of those over {', over '.join(known[:-1])}, and over {known[-1]}."
    if len(known) == 1:
        return said
    if "documents" not in known:
        whole = any(found.documents == 1 for found in compared)
        why = "the text is one document" if whole else "these results do not say to which document a block belongs"
        said += f" Another document may differ by more: {why}."
    elif any("documents" not in {each.over for each in found.estimates} for found in compared):
        said += " Some of the results lack the losses by block or their documents, and count fewer of these."
    counted = {found.documents for found in compared if found.documents and found.documents > 1}
    return said + (f" The text has {' or '.join(str(n) for n in sorted(counted))} documents." if counted else "")
