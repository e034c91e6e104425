"""What happened at each token of a text, as JSON, as a page to look through, and as means by layer; a token at a time, so that a long text fits.

A token comes as ``gam_lm.diagnostics.trace.TokenTrace.to_dict`` gives it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from gam_lm.report.page import templates
from gam_lm.report.tables import Table
from gam_lm.runtime.files import replacing

Token = Mapping[str, Any]

SHEET = 256
"""Tokens that the page shows at once. Each sheet is data that the browser reads only when it is turned to."""


class Means:
    """Means by layer of all figures of the tokens that passed through."""

    def __init__(self) -> None:
        self.tokens = 0
        self._sums: list[dict[str, float]] = []
        self._surprise = 0.0
        self._surprises = 0

    def watch(self, tokens: Iterable[Token]) -> Iterator[Token]:
        """Hand the tokens on and count them."""
        for token in tokens:
            self.tokens += 1
            if token["surprise_nats"] is not None:
                self._surprise += token["surprise_nats"]
                self._surprises += 1
            for number, layer in enumerate(token["layers"]):
                if number == len(self._sums):
                    self._sums.append({})
                sums = self._sums[number]
                for name, value in figures(layer).items():
                    sums[name] = sums.get(name, 0.0) + value
            yield token

    @property
    def surprise(self) -> float | None:
        """Mean loss in nats per token, as far as tokens had one."""
        return self._surprise / self._surprises if self._surprises else None

    def table(self) -> Table:
        """A row per layer."""
        columns = list(dict.fromkeys(name for sums in self._sums for name in sums))
        rows = [[str(i), *(f"{sums[name] / self.tokens:.4f}" if name in sums else "" for name in columns)] for i, sums in enumerate(self._sums)]
        loss = "" if self.surprise is None else f" Mean surprise {self.surprise:.4f} nats."
        return Table(columns=["Layer", *columns], rows=rows, title="Means over the text, by layer", note=f"{self.tokens:,} tokens.{loss}")


def figures(layer: Mapping[str, Any]) -> dict[str, float]:
    """The single figures of a layer at a token, by what they are called on a page."""
    found = {"residual": layer["residual"]} | {f"added by {name.replace('_', '-')}": value for name, value in layer["added"].items()}
    found |= {f"gate of {name}": value for name, value in layer["gates"].items()}
    found |= {f"entropy of {name} (nats)": read["entropy_nats"] for name, read in layer["reads"].items()}
    found |= {"write gate": layer["write_gate"], "read from the bank": layer["bank"], "read from before": layer["before"]}
    return {name: value for name, value in found.items() if value is not None}


def write_json(tokens: Iterable[Token], about: Mapping[str, Any], path: Path) -> Means:
    """Write ``about`` with all tokens under ``tokens``, a line each. Returns the means of what was written."""
    means = Means()
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(about)[:-1] + (", " if about else "") + '"tokens": [')
        for number, token in enumerate(means.watch(tokens)):
            file.write((",\n" if number else "\n") + json.dumps(token))
        file.write("\n]}\n")
    return means


def write_page(tokens: Iterable[Token], about: Mapping[str, Any], path: Path, *, sheet: int = SHEET) -> Means:
    """Write a page: hover or focus a token for what it did, choose the layer, turn the sheets.

    Args:
        tokens: at least one.
        about: ``run``, the model's folder, and ``model``, what it is in words.
        path: of the page.
        sheet: tokens shown at once.

    Returns:
        The means, which the page shows as well.
    """
    means = Means()
    passing = iter(means.watch(tokens))
    first = next(passing)
    names = [list(figures(layer)) for layer in first["layers"]]
    parts = templates().get_template("trace.html.j2").generate(
        about=about, names=names, size=sheet, means=means, sheets=_sheets(chain([first], passing), names, sheet)
    )
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(parts)
    return means


def _sheets(tokens: Iterator[Token], names: Sequence[Sequence[str]], size: int) -> Iterator[list[dict[str, Any]]]:
    """The tokens in lists of ``size``: figures in the order of their names, with four digits that count."""
    held: list[dict[str, Any]] = []
    for token in tokens:
        layers = []
        for wanted, layer in zip(names, token["layers"], strict=True):
            values = figures(layer)
            slots = {name: read["slots"] for name, read in layer["reads"].items()}
            layers.append({
                "figures": [values[name] for name in wanted], "slots": slots, **{name: layer[name] for name in ("writes", "taps", "sources", "held") if layer.get(name)}
            })  # fmt: skip
        held.append(_short({key: token[key] for key in ("index", "id", "text", "surprise_nats", "predictions")} | {"layers": layers}))
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _short(each) for key, each in value.items()}
    return [_short(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value
