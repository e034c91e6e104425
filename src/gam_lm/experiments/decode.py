"""Decoding: the time of one more token after n tokens, and the state that it takes, beside the limit that reading the weights from memory sets.

Every model runs in a process of its own, its contexts in turns, so that what else the machine does meets them alike. A state that does not grow is made by
reading n tokens; a cache of keys and values is filled at random, with room for what is decoded: neither its time nor its size depends on what it holds. In a
stack of both, the layers without a cache read the first tokens only.

Shapes: B rows, V = vocab_size.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, unknown_name
from gam_lm.experiments.accuracy import model_errors, reference_of
from gam_lm.experiments.measuring import Group, Limits, Row, measure_missing, possible
from gam_lm.experiments.models import build, contender, described
from gam_lm.inference.compiling import decoder
from gam_lm.inference.context import PIECE
from gam_lm.inference.int8 import Int8Embedding, quantize_int8
from gam_lm.model import LanguageModel, State
from gam_lm.presets.models import BASELINE, Fields
from gam_lm.results import Results
from gam_lm.runtime.isolation import OK, Isolated, Peak, measured
from gam_lm.runtime.measure import MEMORY_READ, interleaved_times, memory_bandwidth
from gam_lm.training.precision import autocast

logger = logging.getLogger("gam_lm")

GPT2 = "hf:gpt2"
"""The row name of Transformers' GPT-2."""

SHORT_TOKENS = 64
"""Tokens that a stack with caches reads for the states of its other layers: a context of 100,000 would take attention hours."""


@dataclass(frozen=True, kw_only=True)
class Protocol(Limits):
    """How a model is measured."""

    steps: int = 40
    """Tokens that are timed after each context; their median counts."""
    limit_seconds: float = 900.0

    @property
    def room(self) -> int:
        """Tokens that are decoded after a context."""
        return self.steps + self.warmup + 1


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
    settings = possible(settings, device)
    configs = {name: _config(name, base, max(contexts) + protocol.room) for name in dict.fromkeys(models)}
    groups = [
        Group(label=f"{name} {dtype} {variant}, batch {B}", rows=[_row(name, config, device, n, dtype, variant, B) for n in sorted({*contexts})])
        for B in batch_sizes for dtype, variant in settings for name, config in configs.items() if _serves(name, dtype, variant)
    ]  # fmt: skip
    bandwidth = cache(lambda: _bandwidth(device, isolated))  # once for all models, and only where something is missing

    def measure(missing: Sequence[Row]) -> Iterator[tuple[Row, Isolated]]:
        read = bandwidth()
        rows = list(missing)
        while rows:
            found = _measure(rows, protocol, device, isolated)
            if found.outcome != OK:
                yield rows.pop(), found
                continue
            for row in rows:
                figures = {**found.figures["model"], "bandwidth": read, **found.figures["contexts"][str(row["context"])]}
                yield row, Isolated(OK, figures | {"share_of_bandwidth": figures["weight_bytes"] / (figures["step_ms"] / 1000) / read})
            return

    measure_missing("decoding", "runs", groups, measure, _name_of, _words, results, go_on)


def _name_of(row: Row) -> str:
    return f"{row['model']} {row['dtype']} {row['variant']}, batch {row['batch_size']}, after {row['context']} tokens"


def _words(row: Row) -> str:
    return f"{row['step_ms']:.2f} ms, {100 * row['share_of_bandwidth']:.0f} % of the bandwidth"


def _serves(name: str, dtype: str, variant: str) -> bool:
    """GPT-2 is measured as its users run it."""
    if name == GPT2 and (dtype == "int8" or variant != "eager"):
        logger.info("%s has no %s row", name, dtype if dtype == "int8" else variant)
        return False
    return True


def _config(name: str, base: Fields, longest: int) -> ModelConfig:
    """A model, sized to the others. Learned positions are as many as the longest text needs: they are looked up, not read."""
    if name.startswith(BASELINE) and name != GPT2:
        raise unknown_name("model", name, [GPT2])
    _, config = contender(name, base, match=True)
    return config if config.longest is None else config.replace(max_position_embeddings=max(config.longest, longest))


def _row(name: str, config: ModelConfig, device: torch.device, n: int, dtype: str, variant: str, B: int) -> Row:
    """What tells a row from the others."""
    return {"model": name, **described(config, device), "context": n, "batch_size": B, "dtype": dtype, "variant": variant}


def _bandwidth(device: torch.device, isolated: bool) -> float:
    """Bytes per second at which this machine reads memory, once for all models."""
    found = measured(measure_bandwidth, {"device": str(device)}, isolated=isolated, seconds=600, memory_mb=None)
    if found.outcome != OK:
        raise InputError(f"memory: its bandwidth takes {MEMORY_READ >> 20} MB to measure, and came to {found.outcome!r}: close other programs")
    return float(found.figures["bandwidth"])


def measure_bandwidth(parameters: Mapping[str, Any], peak: Peak) -> dict[str, float]:
    """``bandwidth`` of a device, in bytes per second."""
    return {"bandwidth": memory_bandwidth(torch.device(parameters["device"]))}


def _measure(rows: Sequence[Row], protocol: Protocol, device: torch.device, isolated: bool) -> Isolated:
    given = {"contexts": [row["context"] for row in rows], "steps": protocol.steps, "room": protocol.room}
    return protocol.measured(measure_model, rows[0] | given, device, isolated=isolated)


def measure_model(parameters: Mapping[str, Any], peak: Peak) -> dict[str, Any]:
    """One model after each of ``contexts``: ``{"model": {…}, "contexts": {"n": {…}}}``.

    Of the model: ``parameters``, ``weight_bytes`` (read once per token), ``output_error`` and ``state_error`` (of the eager model
    in this precision). After n: ``step_ms`` (median, until every row has its next token),
    ``step_ms_low`` and ``step_ms_high`` (quartiles), and ``state_bytes`` (of one sequence).
    """
    device = torch.device(parameters["device"])
    torch.manual_seed(0)
    with torch.inference_mode():
        make = _gpt2 if parameters["model"] == GPT2 else _own
        model, sessions = make(parameters, device)
        times = interleaved_times({str(n): session.step for n, session in sessions.items()}, device, warmup=parameters["warmup"], rounds=parameters["steps"])
        read = weight_bytes(model)
        errors = _errors(parameters, device) if parameters["model"] != GPT2 else {}
    contexts = {}
    for n, session in sessions.items():
        low, median, high = statistics.quantiles(times[str(n)], n=4, method="inclusive") if len(times[str(n)]) > 1 else 3 * times[str(n)]
        contexts[str(n)] = {"step_ms": median, "step_ms_low": low, "step_ms_high": high, "state_bytes": session.state_bytes}
    return {"model": {"parameters": _count(model), "weight_bytes": read, **errors}, "contexts": contexts}


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
    B, room, sessions, state, read = parameters["batch_size"], parameters["room"], {}, None, 0
    for n in parameters["contexts"]:
        filled = [layer.mixer.filled_cache(B, n, room, device=device, dtype=low) for layer in model.layers]
        grows = [each is not None for each in filled]
        wanted = min(n, SHORT_TOKENS) if any(grows) else n
        with autocast(device, low):
            for piece_1P in torch.randint(model.config.vocab_size, (1, wanted - read), device=device).split(PIECE, 1) if wanted > read else ():
                _, state = model.hidden(piece_1P, state)
        assert state is not None
        read = max(read, wanted)
        layers = [
            cache if cache is not None else tuple(each.repeat_interleave(B, 0) for each in layer) for cache, layer in zip(filled, state.layers, strict=True)
        ]
        sizes = (sum(each.nbytes for each in layer) // B for layer in layers)
        held = sum(size * n // (n + room) if cached else size for size, cached in zip(sizes, grows, strict=True))
        sessions[n] = _Session(_decoding(model, State(torch.full((B,), n, device=device), tuple(layers)), low, parameters["variant"]), held)
    return model, sessions


def _errors(parameters: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """How far the weights' precision takes the model from float64 on a short text; of another library's model nothing is known."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig.from_dict(parameters["model_config"])).to(device).eval()
    reference = reference_of(model)
    low = torch.float32 if parameters["dtype"] == "fp32" else torch.bfloat16
    if parameters["dtype"] == "int8":
        quantize_int8(model)
    else:
        model.to(low)
    return model_errors(model, reference, torch.randint(model.config.vocab_size, (1, SHORT_TOKENS), device=device), low)


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
