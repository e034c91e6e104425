"""Training speed: tokens per second of whole steps, the plain way and ours, beside what the machine's matrix unit gives.

All variants of a model take turns in one process, so that what else the machine does meets them alike; the memory of a step is measured in a process of its own
for each. ``plain`` is what one writes first: Conv1d, logits held whole, PyTorch's default AdamW; ``eager`` and ``compiled`` are gam_lm.training's own step.

Shapes: B rows, T tokens, C channels, V = vocab_size.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gam_lm.config import ModelConfig
from gam_lm.diagnostics.cost import model_cost
from gam_lm.experiments.accuracy import model_errors, reference_of
from gam_lm.experiments.measuring import Group, Limits, Row, emulated, measure_missing, possible
from gam_lm.experiments.models import build, contender, described, is_baseline
from gam_lm.mixers.convolution import CausalConv
from gam_lm.model import LanguageModel
from gam_lm.ops.number_formats import trains_faster_in_bf16
from gam_lm.presets.models import Fields
from gam_lm.results import Results
from gam_lm.runtime.isolation import OK, Isolated, Peak
from gam_lm.runtime.measure import BYTES_PER_MB, cuda_peak_bytes, interleaved_times, matmul_peak, nominal_flops
from gam_lm.training.compiled import compile_for_training
from gam_lm.training.loop import make_optimizer, train_step
from gam_lm.training.precision import autocast
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

WAYS = ("plain", "eager", "compiled")
"""Of taking a step."""

RATE = 1e-4
"""A learning rate at which nothing grows."""


@dataclass(frozen=True, kw_only=True)
class Protocol(Limits):
    """How a model is measured."""

    rounds: int = 5
    """Steps of each variant that are timed; their median counts."""
    warmup: int = 2
    limit_seconds: float = 2400.0

NOTHING_TO_COMPILE = "nothing to compile"
"""The outcome of a compiled row of a model that would gain nothing."""


def bench_train(
    models: Mapping[str, ModelConfig],
    batch_sizes: Sequence[int],
    context: int,
    variants: Sequence[tuple[str, str]],
    protocol: Protocol,
    results: Results,
    device: torch.device,
    *,
    isolated: bool = True,
    go_on: Callable[[], bool] = lambda: True,
) -> None:
    """Measure what is missing in ``results``; the rows of a model at a batch size are written together.

    Args:
        models: configurations by their names in the rows.
        batch_sizes: B.
        context: T.
        variants: as `variants_of` gives them; what cannot be compiled here is left out.
        protocol: how.
        results: an open results.json.
        device: where.
        isolated: False measures within this process, without limits and without the memory of a CPU.
        go_on: asked before each model; False ends the run, to be gone on with later.
    """
    variants = possible(variants, device)
    groups = [
        Group(label=f"{name}, batch {B}", rows=[_row(name, config, device, context, B, *each) for each in variants])
        for B in batch_sizes for name, config in models.items()
    ]  # fmt: skip
    measure_missing(
        "training speed", "models", groups, lambda missing: _measure(missing, protocol, device, isolated), _name_of, _words, results, go_on
    )


def variants_of(ways: Sequence[str], device: torch.device, precisions: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Ways of taking a step, each with the format of its products under autocast.

    Args:
        ways: of `WAYS`.
        device: where.
        precisions: of every way; by default a plain step is taken in both, and the others in that which `precision auto` trains in. In fp32 alone where the
            device would emulate bf16, which is logged.
    """
    if precisions:
        return [(way, precision) for way in WAYS if way in ways for precision in precisions]
    if reason := emulated("bf16", device):
        logger.warning("bf16 variants are left out: %s; all steps are measured in fp32", reason)
        return [(way, "fp32") for way in WAYS if way in ways]
    faster = "bf16" if trains_faster_in_bf16(device) else "fp32"
    return [(way, precision) for way in WAYS if way in ways for precision in (("fp32", "bf16") if way == "plain" else (faster,))]


def matched(names: Sequence[str], base: Fields) -> dict[str, ModelConfig]:
    """The named models, sized to the parameters of the static GAM."""
    return dict(contender(name, base, match=True) for name in names)


def _row(name: str, config: ModelConfig, device: torch.device, context: int, B: int, way: str, dtype: str) -> Row:
    """What tells a row from the others."""
    return {
        "model": name, **described(config, device), "context": context, "batch_size": B, "dtype": dtype, "variant": way,
    }  # fmt: skip


def _name_of(row: Row) -> str:
    return f"{row['model']} {row['variant']} {row['dtype']}, batch {row['batch_size']}"


def _words(row: Row) -> str:
    return f"{row['tokens_per_second']:.0f} tokens/s, {100 * row['share_of_peak']:.0f} % of the peak of {row['dtype']}"


def _measure(rows: Sequence[Row], protocol: Protocol, device: torch.device, isolated: bool) -> Iterator[tuple[Row, Isolated]]:
    """All variants of a model at a batch size; one that gains nothing by being compiled says so, and is not tried again."""
    common = rows[0] | {"rounds": protocol.rounds}
    asked = {f"{row['variant']} {row['dtype']}": row for row in rows}
    timed = protocol.measured(measure_times, common | {"variants": [[row["variant"], row["dtype"]] for row in rows]}, device, isolated=isolated)
    for key, row in asked.items():
        if timed.outcome != OK:
            yield row, timed
        elif key not in timed.figures["variants"]:
            yield row, Isolated(NOTHING_TO_COMPILE, {})
        else:
            memory = protocol.measured(measure_memory, common | {"variants": [[row["variant"], row["dtype"]]]}, device, isolated=isolated)
            yield row, Isolated(OK, {**timed.figures["model"], **timed.figures["variants"][key], **memory.figures})


def measure_times(parameters: Mapping[str, Any], peak: Peak) -> dict[str, Any]:
    """All ``variants`` in turns: ``{"model": {…}, "variants": {"way dtype": {…}}}``; a model that gains nothing by being compiled has no such variant.

    Of the model: ``parameters``, ``flops_per_token`` (counted, of a training step) and the matmul peaks ``peak_fp32_flops`` and, where it is not emulated,
    ``peak_bf16_flops``. Of a variant: ``step_ms`` (median) with its quartiles, ``tokens_per_second``, ``flops_per_second``, ``share_of_peak`` (that of its
    format), ``first_loss``, ``output_error`` and ``state_error`` (gam_lm.experiments.accuracy), and ``mfu`` (share of the data sheet's bf16) where the device is known.
    """
    device, config = torch.device(parameters["device"]), ModelConfig.from_dict(parameters["model_config"])
    B, T = parameters["batch_size"], parameters["context"]
    steps: dict[str, Callable[[], Tensor]] = {}
    errors: dict[str, dict[str, float]] = {}
    reference = None
    for way, dtype in parameters["variants"]:
        found_step = prepared(config, B, T, way, DTYPES[dtype], device)
        if found_step is not None:
            model, steps[f"{way} {dtype}"] = found_step
            reference = reference or reference_of(model)
            errors[f"{way} {dtype}"] = model_errors(model, reference, torch.from_numpy(batch_of(config, B, T)[0]).to(device), DTYPES[dtype])
    del reference
    first = {name: float(step()) for name, step in steps.items()}
    times = interleaved_times(dict(steps), device, warmup=parameters["warmup"], rounds=parameters["rounds"])
    peaks = {name: matmul_peak(device, dtype) for name, dtype in DTYPES.items() if emulated(name, device) is None}
    flops = _training_flops(config, T)
    found = {}
    for name, each in times.items():
        low, median, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else 3 * each
        rate = 1000 * B * T / median
        found[name] = {
            "step_ms": median, "step_ms_low": low, "step_ms_high": high, "tokens_per_second": rate, "flops_per_second": rate * flops,
            "share_of_peak": rate * flops / peaks[name.split()[1]], "first_loss": first[name], **errors[name],
        }  # fmt: skip
        if nominal := nominal_flops(device):
            found[name]["mfu"] = rate * flops / nominal
    parameters_of_model = sum(p.numel() for p in build(config, 0, device).parameters())
    return {
        "model": {"parameters": parameters_of_model, "flops_per_token": flops, **{f"peak_{name}_flops": value for name, value in peaks.items()}},
        "variants": found,
    }


def _training_flops(config: ModelConfig, T: int) -> float:
    """Per token: counted from the mixer's own cost; of a baseline three times the products that torch counts in a forward pass."""
    if not is_baseline(config):
        return model_cost(config, T).training_flops
    model = build(config, 0, torch.device("cpu")).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, T, dtype=torch.long))
    return 3 * counter.get_total_flops() / T


def measure_memory(parameters: Mapping[str, Any], peak: Peak) -> dict[str, Any]:
    """``peak_memory_mb`` of a step of the one variant in ``variants``: on a GPU all that the allocator holds at most, on a CPU the growth of the process over
    weights and moments."""
    device = torch.device(parameters["device"])
    ((way, dtype),) = parameters["variants"]
    config = ModelConfig.from_dict(parameters["model_config"])
    step = make_step(config, parameters["batch_size"], parameters["context"], way, DTYPES[dtype], device)
    assert step is not None
    step()
    grown = cuda_peak_bytes(step, device) if device.type == "cuda" else peak(step)
    return {} if grown is None else {"peak_memory_mb": grown / BYTES_PER_MB}


def make_step(config: ModelConfig, B: int, T: int, way: str, dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor] | None:
    """A training step over the same random tokens at every call, which gives its loss; None for a compiled one that would gain nothing."""
    found = prepared(config, B, T, way, dtype, device)
    return None if found is None else found[1]


def batch_of(config: ModelConfig, B: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens and targets, the same for every model of a vocabulary."""
    rng = np.random.default_rng(0)
    return rng.integers(config.vocab_size, size=(B, T)), rng.integers(config.vocab_size, size=(B, T))


def prepared(config: ModelConfig, B: int, T: int, way: str, dtype: torch.dtype, device: torch.device) -> tuple[LanguageModel, Callable[[], Tensor]] | None:
    """The model of `make_step`, and that step."""
    model = build(config, 0, device).train()
    batch = batch_of(config, B, T)
    recipe = TrainConfig(batch_size=B, context=T, optimizer="adamw", compile="on" if way == "compiled" else "off")
    if way != "plain":
        if not compile_for_training(model, recipe, 1) and way == "compiled":
            return None
        optimizer: torch.optim.Optimizer = make_optimizer(model, recipe)
        return model, lambda: train_step(model, optimizer, batch, recipe, RATE, dtype)[0]

    for part in model.modules():
        if isinstance(part, CausalConv):
            part.forward = MethodType(_conv1d, part)  # type: ignore[method-assign]
    plain_optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=recipe.weight_decay)

    def plain() -> Tensor:
        tokens_BT, targets_BT = (torch.from_numpy(each).to(device) for each in batch)
        with autocast(device, dtype):
            _, loss = model(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        return loss.detach()

    return model, plain


def _conv1d(self: CausalConv, x_BTC: Tensor, state: None = None, segments: None = None) -> tuple[Tensor, Tensor]:
    """The convolution by PyTorch's own."""
    C, K = self.weight.shape
    y_BCT = F.conv1d(F.pad(x_BTC.mT, (K - 1, 0)), self.weight[:, None], self.bias, groups=C)
    return y_BCT.mT, x_BTC[:, x_BTC.shape[1] - K + 1 :]
