"""What LAMBADA measures of each passage, and over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence


def figures(passage: Mapping[str, str], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Of the log-likelihood of a last word, in nats, and of whether each token of it was the likeliest: the harness's ``process_results``."""
    ((log_likelihood, likeliest),) = results
    return {"acc": float(likeliest), "nats": -log_likelihood, "perplexity": log_likelihood}


def perplexity(log_likelihoods: Sequence[float]) -> float:
    """exp of the mean negative log-likelihood, as the harness has it; not its function, whose standard error it would draw 100,000 samples for."""
    return math.exp(min(690.0, -sum(log_likelihoods) / len(log_likelihoods)))  # a float64 ends at exp(709)
