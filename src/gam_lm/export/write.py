"""What `gam export` writes: a folder that stands for itself, checked against the model it was made from.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gam_lm.checkpoint import load_model, load_tokenizer_of, save_model
from gam_lm.errors import InputError
from gam_lm.export.graphs import TRACED_TOKENS, Graphs, trace
from gam_lm.inference.context import state_tensors
from gam_lm.inference.int8 import is_int8, quantize_int8
from gam_lm.model import LanguageModel
from gam_lm.runtime.files import replacing
from gam_lm.runtime.measure import step_times

logger = logging.getLogger("gam_lm")

Graph = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]
"""Tokens and state in, last logits and state out."""

CPU = torch.device("cpu")
WEIGHTS = {"onnx": ("fp32", "int8"), "page": ("int8", "fp16")}
"""Formats of the weights by format of the export, its usual one first."""

LENGTHS_CHECKED = (1, 2, 37, 512, 4096)
"""Numbers of tokens in one call of the one graph; what learned positions forbid is left out."""

MARKER = "export.json"
"""What every export holds and no run does: only a folder with it is replaced."""

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
    largest_difference: float | None
    """Largest absolute difference of a logit from the model's, over random texts: prefill and steps of a graph, all tokens of int8; None of a page, whose
    numbers a browser computes."""
    step_ms: tuple[float, float] | None = None
    """Of int8: median time of one step of decoding before and after, taken in turns."""


def export(run_directory: Path, format: str, out: Path, *, portable: bool = False, weights: str | None = None, note: str = "") -> Exported:
    """Write ``run_directory`` as "onnx", "torch" or "int8" to the folder ``out``, whole or not at all, or as "page" to the file ``out``.

    Args:
        run_directory: of the model.
        format: what to write.
        out: where to.
        portable: of "onnx": two graphs of plain operators in place of one.
        weights: of "onnx": fp32 or int8; of "page": int8 or fp16. None is the first.
        note: of "page": a sentence under the title.

    Raises:
        InputError: where the run cannot be read or exported, or ``out`` exists and is no earlier export, or holds the run.
        MissingExtraError: where "onnx" lacks its packages.
    """
    allowed = WEIGHTS.get(format, ())
    if weights is not None and weights not in allowed:
        raise InputError(f"weights is {weights!r} with format {format!r}: " + (f"use {' or '.join(allowed)}" if allowed else "leave it out"))
    if portable and format != "onnx":
        raise InputError(f"portable is given with format {format!r}: it is a kind of format 'onnx', leave it out")
    if note and format != "page":
        raise InputError(f"note is given with format {format!r}: it is a part of format 'page', leave it out")
    run = run_directory.resolve()
    if out.resolve() in (run, *run.parents):
        raise InputError(f"out is {str(out)!r}, {'the run itself' if out.resolve() == run else 'which holds the run'}: choose another folder")
    weights = weights or next(iter(allowed), None)
    if format == "page":
        return _page(run_directory, out, str(weights), note)
    if out.exists() and not (out / MARKER).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"out is {str(out)!r}, which is not empty and no earlier export (it has no {MARKER}): choose a new folder")
    model = load_model(run_directory)
    tokenizer = load_tokenizer_of(run_directory)
    if format != "int8" and model.config.longest == 1:
        raise InputError(f"max_position_embeddings is 1 with learned positions and format {format!r}: a graph needs 2 or more, export as 'int8'")
    with replacing(out) as directory, torch.random.fork_rng(devices=[]):
        directory.mkdir()
        torch.manual_seed(0)
        step_ms = None
        if format == "int8":
            difference, step_ms = _quantized(model)
            shutil.copy(run_directory / "tokenizer.json", directory)
            save_model(directory, model, tokenizer)
            _describe(directory, {"format": format})
            for name in ("recipe.json", "tokenizer_config.json"):
                if (run_directory / name).is_file():
                    shutil.copy(run_directory / name, directory)
        else:
            if weights == "int8" and not is_int8(model):
                quantize_int8(model)
            difference = _write_stream(model, directory) if format == "onnx" and not portable else _write_graphs(model, trace(model), format, directory)
            for name in ("config.json", "tokenizer.json"):
                shutil.copy(run_directory / name, directory)
        return Exported(
            bytes_before=weight_bytes(run_directory),
            bytes_after=sum(path.stat().st_size for path in directory.iterdir() if path.suffix in (".onnx", ".pt2", ".safetensors")),
            largest_difference=difference,
            step_ms=step_ms,
        )


def _describe(directory: Path, description: Mapping[str, object]) -> None:
    (directory / MARKER).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def weight_bytes(run_directory: Path) -> int:
    """Bytes of the model's own weights, in one file or in shards."""
    return sum(path.stat().st_size for path in run_directory.glob("model*.safetensors"))


def _page(run_directory: Path, out: Path, weights: str, note: str) -> Exported:
    from gam_lm.export.page import is_page, write_page

    if out.suffix != ".html":
        raise InputError(f"out is {str(out)!r} with format 'page': name a file that ends in .html")
    if out.exists() and not is_page(out):
        raise InputError(f"out is {str(out)!r}, which is there and no page of an earlier export: choose a new file")
    write_page(run_directory, out, weights, note)
    return Exported(bytes_before=weight_bytes(run_directory), bytes_after=out.stat().st_size, largest_difference=None)


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


def _write_stream(model: LanguageModel, directory: Path) -> float:
    """Write the one graph, in three lines of progress; the largest difference of a logit."""
    from gam_lm.export.onnx import OnnxGraph, write_program
    from gam_lm.export.stream import trace_stream

    limit = model.config.longest or 2**62
    lengths = [each for each in LENGTHS_CHECKED if each + 1 <= limit]
    logger.info("trace the graph of any number of tokens")
    graph = trace_stream(model)
    logger.info("convert it to ONNX")
    write_program(graph.program, graph.state_names, directory / "model.onnx")
    logger.info("compare it with PyTorch at %s tokens", ", ".join(f"{each:,}" for each in lengths))
    description = {"format": "onnx", "graph": "model.onnx", "state": graph.state_names, "last_position": _last_position(model)}
    _describe(directory, description)
    loaded = OnnxGraph(directory / "model.onnx")
    return max(_difference(model, each, loaded, loaded, rows=2 if each > 1000 else ROWS_CHECKED, steps=1) for each in lengths)


def _last_position(model: LanguageModel) -> int | None:
    return None if model.config.longest is None else model.config.longest - 1


def _write_graphs(model: LanguageModel, graphs: Graphs, format: str, directory: Path) -> float:
    description = {
        "format": format, "prefill_tokens": graphs.prefill_tokens, "state": graphs.state_names,
        "last_position": _last_position(model),
    }  # fmt: skip
    _describe(directory, description)
    loaded: list[Graph] = []
    if format == "onnx":
        from gam_lm.export.onnx import OnnxGraph, write_onnx

        write_onnx(graphs, directory)
        loaded = [OnnxGraph(directory / f"{name}.onnx") for name in ("prefill", "step")]
    else:
        for name, program in (("prefill", graphs.prefill), ("step", graphs.step)):
            program.example_inputs = None  # they alone would be pickled
            torch.export.save(program, directory / f"{name}.pt2")
            loaded.append(torch.export.load(directory / f"{name}.pt2").module())
    limit = model.config.longest or 2**62
    tokens = graphs.prefill_tokens or min(TRACED_TOKENS - 1, max(2, limit - STEPS_CHECKED))
    return _difference(model, tokens, *loaded, steps=min(STEPS_CHECKED, limit - tokens))


@torch.no_grad()
def _difference(model: LanguageModel, tokens: int, prefill: Graph, step: Graph, *, rows: int = ROWS_CHECKED, steps: int = STEPS_CHECKED) -> float:
    """Of the last logits after ``tokens`` tokens at once, and of some steps after those, from what one pass of the model gives."""
    tokens_BT = torch.randint(model.config.vocab_size, (rows, tokens + steps))
    hidden_BTD, _ = model.hidden(tokens_BT)
    expected_BSV = model.lm_head(hidden_BTD[:, tokens - 1 :])
    logits_BV, state = prefill(tokens_BT[:, :tokens], state_tensors(model.initial_state(rows)))
    differences = [(logits_BV - expected_BSV[:, 0]).abs().max()]
    for i in range(steps):
        logits_BV, state = step(tokens_BT[:, tokens + i, None], state)
        differences.append((logits_BV - expected_BSV[:, i + 1]).abs().max())
    return float(max(differences))
