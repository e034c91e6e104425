"""ONNX graphs in ONNX Runtime: how long the export takes, a prompt, and one more token, as one graph and as the portable two.

Both forms of a model are exported and timed in one process; the calls take turns, so that what else the machine does meets them alike.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gam_lm.config import ModelConfig
from gam_lm.experiments.models import build, described
from gam_lm.export.graphs import trace
from gam_lm.export.onnx import OnnxGraph, write_onnx, write_program
from gam_lm.export.stream import trace_stream
from gam_lm.inference.context import state_tensors
from gam_lm.model import LanguageModel
from gam_lm.presets.models import Fields, named_model
from gam_lm.results import Results
from gam_lm.runtime.measure import interleaved_times
from gam_lm.runtime.progress import progress

logger = logging.getLogger("gam_lm")

ONE, PORTABLE = "one graph", "portable"
FORMS = (ONE, PORTABLE)
"""The values of a row's ``variant``."""

Feed = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]
"""Reads tokens (1, T) after a state: the logits after the last (1, V), and the new state."""


def bench_export(models: Sequence[str], base: Fields, prompt_tokens: int, rounds: int, warmup: int, results: Results) -> None:
    """Measure what is missing in ``results``, both forms of a model at once.

    Args:
        models: names of gam_lm.presets.models that both forms hold.
        base: what the models share.
        prompt_tokens: tokens of the prompt.
        rounds: calls that are timed; their median counts.
        warmup: calls before those.
        results: an open results.json.

    Raises:
        InputError: for an unknown name, or a model that is not exported.
        MissingExtraError: where the packages of ONNX are missing.
    """
    with progress("exports", len(models), "models") as bar:
        for name in models:
            bar.now(name)
            _bench_model(name, named_model(name, base), prompt_tokens, rounds, warmup, results)
            bar.advance()


def _bench_model(name: str, config: ModelConfig, prompt_tokens: int, rounds: int, warmup: int, results: Results) -> None:
    rows = [{"model": name, **described(config, torch.device("cpu")), "sequence_length": prompt_tokens, "batch_size": 1, "variant": form} for form in FORMS]
    if all(results.find(row) is not None for row in rows):
        return
    for row, figures in zip(rows, measure_forms(config, prompt_tokens, rounds, warmup), strict=True):
        results.add({**row, **figures})
        logger.info("%s, %s: export %.1f s, prompt %.1f ms", name, row["variant"], figures["export_seconds"], figures["prompt_ms"])


@torch.no_grad()
def measure_forms(config: ModelConfig, prompt_tokens: int, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """For each of FORMS ``export_seconds``, ``prompt_ms``, ``step_ms`` (medians), ``largest_difference`` of the prompt's logits from PyTorch's, ``file_mb``."""
    torch.manual_seed(0)
    model = build(config, 0, torch.device("cpu")).eval()
    assert isinstance(model, LanguageModel)
    tokens_1T = torch.randint(config.vocab_size, (1, prompt_tokens))
    expected = model.stream(tokens_1T)[0][:, -1]
    state = state_tensors(model.initial_state(1))
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, dict[str, Any]] = {}
        feeds: dict[str, Feed] = {}
        for form in FORMS:
            directory = Path(folder) / form.replace(" ", "-")
            directory.mkdir()
            started = time.perf_counter()
            feeds[form] = _exported(model, form, directory)
            found[form] = {"export_seconds": time.perf_counter() - started}
            found[form]["file_mb"] = sum(path.stat().st_size for path in directory.iterdir()) / 2**20
            found[form]["largest_difference"] = float((feeds[form](tokens_1T, state)[0] - expected).abs().max())
        after = feeds[ONE](tokens_1T, state)[1]
        for figure, tokens, before in (("prompt_ms", tokens_1T, state), ("step_ms", tokens_1T[:, :1], after)):
            times = interleaved_times({form: partial(feeds[form], tokens, before) for form in FORMS}, torch.device("cpu"), warmup=warmup, rounds=rounds)
            for form in FORMS:
                found[form][figure] = statistics.median(times[form])
    return [found[form] for form in FORMS]


def _exported(model: LanguageModel, form: str, directory: Path) -> Feed:
    """Export ``model`` to a folder that is there; what then reads tokens, as the examples do."""
    if form == ONE:
        graph = trace_stream(model)
        write_program(graph.program, graph.state_names, directory / "model.onnx")
        return OnnxGraph(directory / "model.onnx")
    graphs = trace(model)
    write_onnx(graphs, directory)
    prefill, step = (OnnxGraph(directory / f"{name}.onnx") for name in ("prefill", "step"))

    def feed(tokens_1T: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits = torch.empty(0)
        block = graphs.prefill_tokens or max(2, tokens_1T.shape[1])
        while tokens_1T.shape[1]:  # whole blocks through prefill, what is left token by token
            size = block if tokens_1T.shape[1] >= block else 1
            logits, state = (prefill if size > 1 else step)(tokens_1T[:, :size], state)
            tokens_1T = tokens_1T[:, size:]
        return logits, state

    return feed
