"""Parity of every fast path with the fp64 reference: compiled blocks, kernels of others, CUDA graphs.

Shapes: B rows, T tokens, V = vocab_size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gam_lm.config import ModelConfig
from gam_lm.experiments.models import backend_name
from gam_lm.inference.compiling import graphed_step, obstacle
from gam_lm.mixers.registry import mixer_class
from gam_lm.model import LanguageModel
from gam_lm.presets.models import Fields, named_model
from gam_lm.results import Results
from gam_lm.training.compiled import compile_for_training
from gam_lm.training.precision import autocast
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

ALLOWED = 2.0
"""How many times the error of the plain path a fast one may have (the rule of state-spaces/mamba's tests)."""

KERNELS = {"+backend=fla": "fla", "+backend=triton": "triton"}
"""How the name of a model on a kernel ends, and the package that the kernel needs."""

LOW = "+backend=fla"
"""The kernel that computes in bf16 whatever is asked for."""

PLAIN = {"sdpa": "+backend=materialised", "triton": "+backend=torch"}
"""By the backend of a model that has a kernel of its own: the change that makes the plain model that it is held to."""

PARITY_TOKENS = 300
"""Tokens of a row that is compared: a number that no chunk divides."""


def compiles_at(config: ModelConfig, tokens: int) -> bool:
    """Whether a block of ``config`` gains by being compiled for ``tokens`` tokens."""
    with torch.device("meta"):
        return all(mixer_class(name)(config).compiles(tokens) for name in config.mixers)


def measure_parity(
    models: Sequence[str], base: Fields, results: Results, device: torch.device, go_on: Callable[[], bool], *, compiled_at: int | None = None
) -> None:
    """The error of every fast path beside that of the plain path in the same format, both against the fp64 reference; a row for each.

    ``logits_error`` and ``gradient_error`` are ‖x − x₆₄‖ / ‖x₆₄‖, ``plain_…`` those of plain PyTorch; ``within``: whether none is over twice the plain one.

    Args:
        models: names of gam_lm.presets.models.
        base: what the models share; two layers of it are taken.
        results: an open results.json.
        device: where.
        go_on: asked before each model; False ends the comparison.
        compiled_at: the blocks that compile at so many tokens are compared compiled as well; None compiles nothing.
    """
    base = {**base, "num_hidden_layers": 2, "max_position_embeddings": 320}
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    for name in models:
        config = named_model(name, base)
        plain = named_model(without_kernel(name) + PLAIN.get(backend_name(config, device), ""), base)
        rows = {(dtype, way): _parity_row(name, config, device, dtype, way) for dtype in _formats(name) for way in _ways(config, device, dtype, name, compiled_at)}
        if all(results.find(row) is not None for row in rows.values()) or not go_on():
            continue
        references = {packed: _Pass(plain, torch.float64, device, compiled=False, packed=packed) for packed in {way == "packed" for _, way in rows}}
        for (dtype, way), row in rows.items():
            if results.find(row) is not None:
                continue
            packed = way == "packed"
            exact = references[packed]
            trusted = _Pass(plain, DTYPES[dtype], device, compiled=False, packed=packed)
            if way == "graph":
                logits = _decoded(config if backend_name(config, device) == "triton" else plain, device)
                errors = {"logits_error": _error(logits, exact.logits), "plain_logits_error": _error(trusted.logits, exact.logits)}
            else:
                fast = _Pass(config, DTYPES[dtype], device, compiled=way == "compiled", packed=packed)
                errors = {
                    f"{label}{part}_error": _error(getattr(each, part), getattr(exact, part))
                    for label, each in (("", fast), ("plain_", trusted)) for part in ("logits", "gradient")
                }  # fmt: skip
            parts = [part for part in ("logits", "gradient") if f"{part}_error" in errors]
            within = all(errors[f"{part}_error"] <= ALLOWED * errors[f"plain_{part}_error"] for part in parts)
            results.add(row | errors | {"within": within})
            logger.info("parity of %s %s %s: %s", name, dtype, way, "within" if within else "NOT within")


def on_kernel(name: str) -> bool:
    """Whether the name of a model asks for a kernel."""
    return name.endswith(tuple(KERNELS))


def without_kernel(name: str) -> str:
    """The name of the same model in plain PyTorch."""
    return next((name.removesuffix(each) for each in KERNELS if name.endswith(each)), name)


def _formats(name: str) -> tuple[str, ...]:
    return ("bf16",) if name.endswith(LOW) else ("fp32", "bf16")


def _ways(config: ModelConfig, device: torch.device, dtype: str, name: str, compiled_at: int | None) -> list[str]:
    """The plain path as well: its row says what is compared with."""
    ways = ["eager"] + ["packed"] * (on_kernel(name) or backend_name(config, device) == "triton")
    if compiled_at is not None and obstacle(device) is None and compiles_at(config, compiled_at):
        ways.append("compiled")
    if device.type == "cuda" and dtype == "fp32" and not on_kernel(name) and not _grows(config):
        ways.append("graph")
    return ways


def _grows(config: ModelConfig) -> bool:
    """Whether the state grows with every token, so that no graph of fixed shapes holds a step."""
    with torch.device("meta"):
        return any(mixer_class(name)(config).filled_cache(1, 1, 1, dtype=torch.float32) is not None for name in config.mixers)


def _parity_row(name: str, config: ModelConfig, device: torch.device, dtype: str, way: str) -> dict[str, Any]:
    return {
        "model": name, "backend": backend_name(config, device), "model_config": config.to_dict(), "dtype": dtype, "variant": way,
    }  # fmt: skip


def _seeded(config: ModelConfig, device: torch.device) -> tuple[LanguageModel, Tensor]:
    """A model whose weights are large enough that every path matters, and tokens (2, T)."""
    torch.manual_seed(0)
    model = LanguageModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    T = min(PARITY_TOKENS, config.max_position_embeddings)
    return model.to(device), torch.randint(config.vocab_size, (2, T)).to(device)


class _Pass:
    """Logits and the gradient of all parameters of one forward and backward pass, in fp64 on the CPU."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, compiled: bool, packed: bool = False) -> None:
        model, tokens_BT = _seeded(config, device)
        model.train()
        if dtype == torch.float64:
            model.double()
        if compiled:
            compile_for_training(model, TrainConfig(compile="on"), 1)
        with autocast(device, torch.float32 if dtype == torch.float64 else dtype):
            logits_BTV, loss = model(tokens_BT, tokens_BT.roll(-1, 1), segments=_sequences(tokens_BT) if packed else None)
        loss.backward()
        self.logits = logits_BTV.detach().double().cpu()
        self.gradient = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])


def _sequences(tokens_BT: Tensor) -> Tensor:
    """Ids of sequences of several lengths, other ones in the second row, and padding at its end."""
    B, T = tokens_BT.shape
    places_T = torch.arange(T, device=tokens_BT.device)
    segments_BT = torch.stack([1 + (places_T >= T // 3).long() + (places_T >= T // 2).long(), 1 + (places_T >= 3).long()])[:B]
    segments_BT[-1, -5:] = 0
    return segments_BT


@torch.no_grad()
def _decoded(config: ModelConfig, device: torch.device) -> Tensor:
    """The logits of `_Pass` from a short prefill and a CUDA graph that decodes the rest."""
    model, tokens_BT = _seeded(config, device)
    model.eval()
    start = tokens_BT.shape[1] - 32
    logits_BTV, state = model.stream(tokens_BT[:, :start])
    replay = graphed_step(model.stream, tokens_BT[:, :1], state)
    rest = [replay(tokens_BT[:, t : t + 1]).clone() for t in range(start, tokens_BT.shape[1])]
    return torch.cat([logits_BTV, *rest], 1).double().cpu()


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())
