"""Decoding: the time of one more token after n tokens, and the state that it takes, beside the limit that reading the weights from memory sets.

Every model runs in a process of its own, its contexts in turns, so that what else the machine does meets them alike. A state that does not grow is made by
reading n tokens; a cache of keys and values is filled at random, with room for what is decoded: neither its time nor its size depends on what it holds.

Shapes: B rows, V = vocab_size.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, unknown_name
from gam_lm.experiments.models import build, contender, described
from gam_lm.inference.compiling import decoder, obstacle
from gam_lm.inference.int8 import Int8Embedding, quantize_int8
from gam_lm.model import LanguageModel, State
from gam_lm.presets.models import BASELINE, Fields
from gam_lm.results import Results
from gam_lm.runtime.isolation import OK, Isolated, Peak, measured
from gam_lm.runtime.measure import MEMORY_READ, interleaved_times, memory_bandwidth
from gam_lm.runtime.progress import progress
from gam_lm.training.precision import autocast

logger = logging.getLogger("gam_lm")

GPT2 = "hf:gpt2"
"""The row name of Transformers' GPT-2."""

PREFILL_TOKENS = 4096
"""Tokens of a context per call."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a model is measured."""

    steps: int = 40
    """Tokens that are timed after each context; their median counts."""
    warmup: int = 5
    """Tokens before those."""
    limit_seconds: float = 900.0
    """The most that the contexts of a model may take together."""
    limit_mb: float | None = None
    """The most resident memory of a model's process; by default 80 % of what is available."""


def bench_decode(
    models: Sequence[str],
    contexts: Sequence[int],
    batch_sizes: Sequence[int],
    settings: Sequence[tuple[str, str]],
    base: Fields,
    protocol: Protocol,
    results: Results,
    device: torch.device,
    *,
    isolated: bool = True,
    go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Measure what is missing in ``results``; the rows of a model are written when its process ends.

    Where a process runs out of memory or time, its longest context gets that as its outcome and the others are tried again.

    Args:
        models: names of gam_lm.presets.models, or hf:gpt2; all are sized to the parameters of the static GAM at ``base``.
        contexts: n.
        batch_sizes: B.
        settings: pairs of a precision, fp32, bf16 or int8 (weights), and a variant: eager, compiled, or graph (a GPU's, of the eager step).
        base: what the models share.
        protocol: how.
        results: an open results.json.
        device: where.
        isolated: False measures within this process, without limits.
        go_on: asked before each model; False ends the run, to be gone on with later.

    Raises:
        InputError: for an unknown name.
    """
    if any(variant == "compiled" for _, variant in settings) and (reason := obstacle(device)):
        logger.warning("compiled variants are left out: %s", reason)
        settings = [each for each in settings if each[1] != "compiled"]
    if device.type != "cuda" and any(variant == "graph" for _, variant in settings):
        logger.warning("graph variants are left out: %s has no CUDA graphs", device.type)
        settings = [each for each in settings if each[1] != "graph"]
    runs = [
        (name, dtype, variant, B) for B in batch_sizes for dtype, variant in settings for name in dict.fromkeys(models) if _serves(name, dtype, variant)
    ]
    bandwidth = None
    with progress("decoding", len(runs), "runs") as bar:
        for name, dtype, variant, B in runs:
            label = f"{name} {dtype} {variant}, batch {B}"
            rows = {n: _row(name, n, dtype, variant, B, base, max(contexts), protocol) for n in sorted({*contexts})}
            missing = [n for n, row in rows.items() if results.find(row) is None]
            if missing and not go_on():
                return
            if missing and bandwidth is None:
                bandwidth = _bandwidth(device, isolated)
            while missing:
                found = _measure(rows[missing[0]], missing, protocol, device, isolated)
                if found.outcome != OK:
                    failed = missing.pop()
                    results.add(rows[failed] | {"outcome": found.outcome})
                    logger.info("%s after %d tokens: %s", label, failed, found.outcome)
                    continue
                for n in missing:
                    figures = {**found.figures["model"], "bandwidth": bandwidth, **found.figures["contexts"][str(n)]}
                    figures["share_of_bandwidth"] = figures["weight_bytes"] / (figures["step_ms"] / 1000) / bandwidth
                    results.add(rows[n] | {"outcome": OK, **figures})
                    logger.info("%s after %d tokens: %.2f ms, %.0f %% of the bandwidth", label, n, figures["step_ms"], 100 * figures["share_of_bandwidth"])
                break
            bar.advance(1, label)


def _serves(name: str, dtype: str, variant: str) -> bool:
    """GPT-2 is measured as its users run it."""
    if name == GPT2 and (dtype == "int8" or variant != "eager"):
        logger.info("%s has no %s row", name, dtype if dtype == "int8" else variant)
        return False
    return True


def _row(name: str, n: int, dtype: str, variant: str, B: int, base: Fields, longest: int, protocol: Protocol) -> dict[str, Any]:
    """What tells a row from the others. Learned positions are as many as the longest context needs: they are looked up, not read."""
    if name.startswith(BASELINE) and name != GPT2:
        raise unknown_name("model", name, [GPT2])
    row_name, config = contender(name, base, match=True)
    if config.longest is not None:
        config = config.replace(max_position_embeddings=max(config.max_position_embeddings, longest + _room(protocol)))
    return {"model": row_name, **described(config), "context": n, "batch_size": B, "dtype": dtype, "variant": variant}


def _room(protocol: Protocol) -> int:
    """Tokens that are decoded after a context."""
    return protocol.steps + protocol.warmup + 1


def _bandwidth(device: torch.device, isolated: bool) -> float:
    """Bytes per second at which this machine reads memory, once for all models."""
    found = measured(measure_bandwidth, {"device": str(device)}, isolated=isolated, seconds=600, memory_mb=None)
    if found.outcome != OK:
        raise InputError(f"memory: its bandwidth takes {MEMORY_READ >> 20} MB to measure, and came to {found.outcome!r}: close other programs")
    return float(found.figures["bandwidth"])


def measure_bandwidth(parameters: Mapping[str, Any], peak: Peak) -> dict[str, float]:
    """``bandwidth`` of a device, in bytes per second."""
    return {"bandwidth": memory_bandwidth(torch.device(parameters["device"]))}


def _measure(row: Mapping[str, Any], contexts: Sequence[int], protocol: Protocol, device: torch.device, isolated: bool) -> Isolated:
    parameters = {
        **row, "contexts": list(contexts), "device": str(device), "steps": protocol.steps, "warmup": protocol.warmup, "room": _room(protocol),
    }  # fmt: skip
    return measured(measure_model, parameters, isolated=isolated, seconds=protocol.limit_seconds, memory_mb=protocol.limit_mb)


def measure_model(parameters: Mapping[str, Any], peak: Peak) -> dict[str, Any]:
    """One model after each of ``contexts``: ``{"model": {…}, "contexts": {"n": {…}}}``.

    Of the model: ``parameters`` and ``weight_bytes`` (read once per token). After n: ``step_ms`` (median, until every row has its next token),
    ``step_ms_low`` and ``step_ms_high`` (quartiles), and ``state_bytes`` (of one sequence).
    """
    device = torch.device(parameters["device"])
    torch.manual_seed(0)
    with torch.inference_mode():
        make = _gpt2 if parameters["model"] == GPT2 else _own
        model, sessions = make(parameters, device)
        times = interleaved_times({str(n): session.step for n, session in sessions.items()}, device, warmup=parameters["warmup"], rounds=parameters["steps"])
        read = weight_bytes(model)
    contexts = {}
    for n, session in sessions.items():
        low, median, high = statistics.quantiles(times[str(n)], n=4) if len(times[str(n)]) > 1 else 3 * times[str(n)]
        contexts[str(n)] = {"step_ms": median, "step_ms_low": low, "step_ms_high": high, "state_bytes": session.state_bytes}
    return {"model": {"parameters": _count(model), "weight_bytes": read}, "contexts": contexts}


@dataclass
class _Session:
    """Text that is being decoded."""

    step: Callable[[], object]
    """Decodes one more token of every row."""
    state_bytes: int
    """Of one sequence."""


def _own(parameters: Mapping[str, Any], device: torch.device) -> tuple[nn.Module, dict[int, _Session]]:
    """A model of this library in the precision that is asked for, and its sessions."""
    model = LanguageModel(ModelConfig.from_dict(parameters["model_config"])).to(device).eval()
    low = torch.float32 if parameters["dtype"] == "fp32" else torch.bfloat16
    if parameters["dtype"] == "int8":
        quantize_int8(model)
    else:
        model.to(low)
    B, sessions, state, read = parameters["batch_size"], {}, None, 0
    for n in parameters["contexts"]:
        layers = [layer.mixer.filled_cache(B, n, parameters["room"], device=device, dtype=low) for layer in model.layers]
        if any(each is None for each in layers):
            with autocast(device, low):
                for piece_1P in torch.randint(model.config.vocab_size, (1, n - read), device=device).split(PREFILL_TOKENS, 1):
                    _, state = model.hidden(piece_1P, state)
            assert state is not None
            read = n
            start = State(state.position_B.repeat(B), tuple(tuple(each.repeat_interleave(B, 0) for each in layer) for layer in state.layers))
            held = sum(each.nbytes for layer in start.layers for each in layer) // B
        else:
            start = State(torch.full((B,), n, device=device), tuple(each for each in layers if each is not None))
            held = sum(each.nbytes for layer in start.layers for each in layer) // B * n // (n + parameters["room"])
        sessions[n] = _Session(_decoding(model, start, low, parameters["variant"]), held)
    return model, sessions


def _decoding(model: LanguageModel, state: State, dtype: torch.dtype, variant: str) -> Callable[[], object]:
    """Decode the likeliest token over and over."""
    device = state.position_B.device
    token_B1 = torch.zeros(len(state.position_B), 1, dtype=torch.long, device=device)
    with autocast(device, dtype):
        next_logits = decoder(model, state, variant)

    def step() -> None:
        nonlocal token_B1
        with autocast(device, dtype):
            token_B1 = next_logits(token_B1)[:, -1].argmax(-1, keepdim=True)

    return step


def _gpt2(parameters: Mapping[str, Any], device: torch.device) -> tuple[nn.Module, dict[int, _Session]]:
    """Transformers' GPT-2 of the same sizes, and its sessions."""
    from gam_lm.hf.decoding import gpt2_decoding

    low = torch.float32 if parameters["dtype"] == "fp32" else torch.bfloat16
    model = build(ModelConfig.from_dict(parameters["model_config"]), 0, device).get_submodule("network").to(low).eval()
    sessions = {}
    for n in parameters["contexts"]:
        step, held = gpt2_decoding(model, n, parameters["batch_size"])
        sessions[n] = _Session(step, held)
    return model, sessions


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights that one more token reads: all but embeddings, of which it reads a row, unless the output head shares theirs."""
    found: dict[int, int] = {}
    for part in model.modules():
        if not isinstance(part, nn.Embedding | Int8Embedding):
            found |= {each.data_ptr(): each.nbytes for each in (*part.parameters(recurse=False), *part.buffers(recurse=False))}
    return sum(found.values())


def _count(model: nn.Module) -> int:
    """Parameters, those in 8 bits included."""
    found: dict[int, Tensor] = {each.data_ptr(): each for each in (*model.parameters(), *model.buffers())}
    return sum(each.numel() for each in found.values())
