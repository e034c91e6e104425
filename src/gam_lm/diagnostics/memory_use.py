"""How far back the written memory of each layer reaches on a text, in a few shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gam_lm.diagnostics.trace import trace
from gam_lm.model import LanguageModel

DISTANCES = {"this token": 1, "1 to 3 tokens back": 4, "4 to 15 tokens back": 16}
"""Name of each class of distances, and the distance where it ends; what is farther is ``FARTHER``."""

FARTHER, BANK = "16 or more tokens back", "learned bank"


def memory_use(model: LanguageModel, ids: Sequence[int], *, tokens: int = 128) -> list[dict[str, float]]:
    """Where the reads of each layer's memory come from, and how strongly tokens are written, as means over the second half of a text.

    The shares are those of `gam_lm.diagnostics.trace.trace`: lengths of what each earlier token's write, and the learned bank, contribute to a read.

    Args:
        model: its training mode is restored.
        ids: the text; with learned positions no more of it is read than those allow.
        tokens: of its start that are read.

    Returns:
        A dict for each layer: the names of ``DISTANCES``, ``FARTHER`` and ``BANK`` with shares that add up to 1, and ``write gate``. It is empty for a layer
        that has no written memory, or none whose writes can be told apart.

    Raises:
        InputError: for an empty text.
    """
    read = ids[: min(tokens, model.config.longest or tokens)]
    found = list(trace(model, read, window=len(read) or 1, top=len(read) or 1, predictions=1))
    counted = found[len(found) // 2 :]
    layers: list[dict[str, float]] = []
    for number in range(len(model.layers)):
        each = [(token.index, token.layers[number]) for token in counted]
        if any(layer.bank is None for _, layer in each):
            layers.append({})
            continue
        sums = dict.fromkeys([*DISTANCES, FARTHER, BANK, "write gate"], 0.0)
        for index, layer in each:
            for place, share in layer.sources:
                sums[_distance(index - place)] += share
            sums[FARTHER] += layer.before or 0.0
            sums[BANK] += layer.bank or 0.0
            sums["write gate"] += layer.write_gate or 0.0
        layers.append(_means(sums, len(each)))
    return layers


def _distance(tokens: int) -> str:
    return next((name for name, end in DISTANCES.items() if tokens < end), FARTHER)


def _means(sums: Mapping[str, float], count: int) -> dict[str, float]:
    return {name: value / count for name, value in sums.items()}
