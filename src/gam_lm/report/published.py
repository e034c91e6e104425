"""The published figures (arXiv 2509.00605), which stand beside ours and are labelled as what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Quality(NamedTuple):
    """A line of the published Table 1."""

    corpus: str
    model: str
    millions: float | None
    """Parameters in millions."""
    epoch_seconds: float
    val_nats: float
    val_ppl: float


TABLE_1 = (
    Quality("wikitext-2", "transformer-paper", 24.2, 131.9, 6.8233, 918.99),
    Quality("wikitext-2", "mamba-paper", 20.5, 127.1, 6.9251, 1017.54),
    Quality("wikitext-2", "gam-paper", 22.6, 117.2, 6.7828, 882.57),
    Quality("tinystories", "transformer-paper", None, 671.6, 3.1591, 23.55),
    Quality("tinystories", "gam-paper", None, 601.4, 3.1418, 23.15),
)


class Scaling(NamedTuple):
    """A line of the published Table 2: forward and backward milliseconds and peak memory in MB; None is out of memory."""

    sequence_length: int
    gam_ms: float
    gam_mb: float
    transformer_ms: float | None
    transformer_mb: float | None


TABLE_2 = (
    Scaling(256, 8.97, 179.42, 8.90, 216.03),
    Scaling(512, 13.09, 325.48, 23.86, 552.98),
    Scaling(1024, 25.86, 617.60, 74.19, 1964.79),
    Scaling(2048, 51.94, 1201.85, 279.37, 7483.92),
    Scaling(4096, 105.03, 2370.35, None, None),
    Scaling(8192, 217.30, 4707.35, None, None),
)


class Ablation(NamedTuple):
    """A line of the published Table 3, on WikiText-2."""

    parameters: int
    """Exact, counted from the published code."""
    val_ppl: float


TABLE_3: Mapping[str, Ablation] = {
    "full": Ablation(22_599_680, 900.84),
    "global": Ablation(19_435_520, 905.45),
    "sum": Ablation(19_447_808, 942.59),
    "local": Ablation(17_874_944, 944.70),
}
"""By row, in the published order."""
