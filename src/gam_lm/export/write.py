"""What `gam export` writes: a folder that stands for itself, checked against the model it was made from.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

import copy
import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gam_lm.checkpoint import load_model, load_tokenizer_of, save_model
from gam_lm.errors import InputError
from gam_lm.export.graphs import TRACED_TOKENS, Graphs, flatten_state, trace
from gam_lm.inference.int8 import is_int8, quantize_int8
from gam_lm.model import LanguageModel
from gam_lm.runtime.files import replacing
from gam_lm.runtime.measure import step_times

Graph = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]
"""Tokens and state in, last logits and state out."""

CPU = torch.device("cpu")
STEPS_CHECKED = 3
ROWS_CHECKED = 3
"""Another number of rows than was traced."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written."""

    bytes_before: int
    """Of the model's own weights file."""
    bytes_after: int
    """Of what carries the weights now."""
    largest_difference: float
    """Largest absolute difference of a logit from the model's, over random texts: prefill and steps of a graph, all tokens of int8."""
    step_ms: tuple[float, float] | None = None
    """Of int8: median time of one step of decoding before and after, taken in turns."""


def export(run_directory: Path, format: str, out: Path) -> Exported:
    """Write ``run_directory`` as "onnx", "torch" or "int8" to the folder ``out``, whole or not at all.

    Raises:
        InputError: where the run cannot be read or exported, or ``out`` exists and is no such folder.
        MissingExtraError: where "onnx" lacks its packages.
    """
    if out.resolve() == run_directory.resolve():
        raise InputError(f"out is {str(out)!r}, the run itself: choose another folder")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out is {str(out)!r}, which is not empty and no earlier export: choose a new folder")
    model = load_model(run_directory)
    tokenizer = load_tokenizer_of(run_directory)
    with replacing(out) as directory, torch.random.fork_rng(devices=[]):
        directory.mkdir()
        torch.manual_seed(0)
        step_ms = None
        if format == "int8":
            difference, step_ms = _quantized(model)
            shutil.copy(run_directory / "tokenizer.json", directory)
            save_model(directory, model, tokenizer)
            for name in ("recipe.json", "tokenizer_config.json"):
                if (run_directory / name).is_file():
                    shutil.copy(run_directory / name, directory)
        else:
            graphs = trace(model)
            difference = _write_graphs(model, graphs, format, directory)
            for name in ("config.json", "tokenizer.json"):
                shutil.copy(run_directory / name, directory)
        return Exported(
            bytes_before=(run_directory / "model.safetensors").stat().st_size,
            bytes_after=sum(path.stat().st_size for path in directory.iterdir() if path.suffix in (".onnx", ".pt2", ".safetensors")),
            largest_difference=difference,
            step_ms=step_ms,
        )


@torch.no_grad()
def _quantized(model: LanguageModel) -> tuple[float, tuple[float, float]]:
    """Take the matrices of ``model`` to 8 bits: the largest difference of a logit, and the times of a step before and after."""
    if is_int8(model):
        raise InputError("format is 'int8' and the run is in int8 already: copy it, or export the run that was trained")
    limit = model.config.max_position_embeddings if model.embed_positions is not None else 256
    tokens_BT = torch.randint(model.config.vocab_size, (2, min(256, limit)))
    plain = copy.deepcopy(model)
    quantize_int8(model)
    difference = float((model.stream(tokens_BT)[0] - plain.stream(tokens_BT)[0]).abs().max())
    _, state = plain.stream(tokens_BT[:1, :-1])
    times = [
        [step_times(partial(each.stream, tokens_BT[:1, -1:], state), CPU, warmup=1, iterations=1)[0] for each in (plain, model)] for _ in range(20)
    ]
    before, after = zip(*times, strict=True)
    return difference, (statistics.median(before), statistics.median(after))


def _write_graphs(model: LanguageModel, graphs: Graphs, format: str, directory: Path) -> float:
    description = {
        "format": format, "prefill_tokens": graphs.prefill_tokens, "state": graphs.state_names,
        "last_position": model.config.max_position_embeddings - 1 if model.embed_positions is not None else None,
    }  # fmt: skip
    (directory / "export.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    if format == "onnx":
        from gam_lm.export.onnx import OnnxGraph, write_onnx

        write_onnx(graphs, directory)
        prefill, step = (OnnxGraph(directory / f"{name}.onnx") for name in ("prefill", "step"))
        return _largest_difference(model, graphs.prefill_tokens, prefill, step)
    loaded = []
    for name, program in (("prefill", graphs.prefill), ("step", graphs.step)):
        program.example_inputs = None  # they alone would be pickled
        torch.export.save(program, directory / f"{name}.pt2")
        loaded.append(torch.export.load(directory / f"{name}.pt2").module())
    return _largest_difference(model, graphs.prefill_tokens, *loaded)


@torch.no_grad()
def _largest_difference(model: LanguageModel, prefill_tokens: int | None, prefill: Graph, step: Graph) -> float:
    """Of the last logits of prefill and of some steps from those of one pass of the model."""
    tokens = prefill_tokens or TRACED_TOKENS - 1
    if model.embed_positions is not None:
        tokens = min(tokens, model.config.max_position_embeddings - STEPS_CHECKED)
    tokens_BT = torch.randint(model.config.vocab_size, (ROWS_CHECKED, tokens + STEPS_CHECKED))
    expected_BTV, _ = model.stream(tokens_BT)
    logits_BV, state = prefill(tokens_BT[:, :tokens], flatten_state(model.initial_state(ROWS_CHECKED)))
    differences = [(logits_BV - expected_BTV[:, tokens - 1]).abs().max()]
    for t in range(tokens, tokens + STEPS_CHECKED):
        logits_BV, state = step(tokens_BT[:, t : t + 1], state)
        differences.append((logits_BV - expected_BTV[:, t]).abs().max())
    return float(max(differences))
