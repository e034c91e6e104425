"""All that a GPU can tell, within minutes: parity of every fast path, Table 2, training at two sizes, decoding with CUDA graphs.

Each part has its own folder with a results.json, so that what time did not allow is what the next call goes on with. Written where no GPU was at hand: until it
has run on one, its figures are empty, not guessed.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gam_lm.compiling import graphed_step, obstacle
from gam_lm.config import ModelConfig
from gam_lm.diagnostics.cost import enlarged
from gam_lm.experiments import decode, scaling, training_speed
from gam_lm.mixers import mixer_class
from gam_lm.model import LanguageModel
from gam_lm.presets import KERNELS, named_model
from gam_lm.results import Results
from gam_lm.training.compiled import compile_for_training
from gam_lm.training.precision import autocast
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

ALLOWED = 2.0
"""How many times the error of the plain path a fast one may have (the rule of state-spaces/mamba's tests)."""

PLAIN = {"gam-delta-fla": "gam-delta", "transformer": "transformer-materialised"}
"""The model without a kernel of its own that a model is held to, where it has one."""

PARITY_TOKENS = 300
"""Tokens of a row that is compared: a number that no chunk divides."""

Open = Callable[[str], Results]
"""Opens the results.json of a part: parity, table-2, training or decode."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and at which sizes."""

    base: ModelConfig
    """The published sizes."""
    models: tuple[str, ...]
    """Of every part."""
    lengths: tuple[int, ...]
    """Of Table 2."""
    rows: int
    """B of Table 2."""
    iterations: int
    """Timed passes of Table 2."""
    compiled: bool
    """Whether anything is compiled."""
    large: tuple[float, int]
    """Parameters and width of the second size in training."""
    contexts: tuple[int, ...]
    """T in training at the second size; the published one has 256."""
    tokens: int
    """B · T in training."""
    decoded: tuple[int, ...]
    """Contexts of decoding."""
    batches: tuple[int, ...]
    """B of decoding."""


FULL = Plan(
    base=ModelConfig(vocab_size=10_000, dropout=0.0),
    models=("gam-static", "gam-mean", "gam-delta", "gam-delta-fla", "transformer", "mamba"),
    lengths=(256, 512, 1024, 2048, 4096, 8192),
    rows=16,
    iterations=20,
    compiled=True,
    large=(350e6, 1024),
    contexts=(512, 2048, 8192),
    tokens=16_384,
    decoded=(1_000, 10_000, 100_000),
    batches=(1, 16),
)

DRY = Plan(
    base=ModelConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_memory_slots=8, dropout=0.0, max_position_embeddings=32),
    models=("gam-static", "gam-delta", "transformer", "mamba"),
    lengths=(16, 32),
    rows=2,
    iterations=1,
    compiled=False,
    large=(2e4, 32),
    contexts=(32,),
    tokens=64,
    decoded=(5, 9),
    batches=(1,),
)
"""Every part at sizes that a CPU does in seconds: whether the command works, and nothing else."""


def bench_gpu(plan: Plan, opened: Open, device: torch.device, *, seconds: float) -> None:
    """Measure what is missing, part by part.

    Args:
        plan: what.
        opened: gives the results.json of a part.
        device: where.
        seconds: the most that it may take; what is under way then is finished.
    """
    deadline = time.monotonic() + seconds
    missing = [name for name in plan.models if name in KERNELS and find_spec("fla") is None]
    if missing:
        logger.warning("%s left out: flash-linear-attention is not installed", ", ".join(missing))
    models = tuple(name for name in plan.models if name not in missing)

    def go_on() -> bool:
        if time.monotonic() < deadline:
            return True
        logger.warning("time is up: the same command goes on with what is missing")
        return False

    measure_parity(models, plan, opened("parity"), device, go_on, context=max(plan.lengths))
    _table_2(models, plan, opened("table-2"), device, go_on)
    _training(models, plan, opened("training"), device, go_on)
    variants = ["eager", "graph"] if device.type == "cuda" else ["eager"]
    decode.bench_decode(
        models, plan.decoded, plan.batches, [("bf16", each) for each in variants], plan.base, decode.Protocol(steps=30), opened("decode"), device,
        isolated=False, go_on=go_on,
    )  # fmt: skip
    _slow_to_compile(models, plan, opened, device, go_on)


def _table_2(models: tuple[str, ...], plan: Plan, results: Results, device: torch.device, go_on: Callable[[], bool]) -> None:
    """The paper's protocol, then the same in bf16, compiled where that gains."""
    names = [*models, "transformer-materialised"]
    dtypes = ("fp16", "bf16") if device.type == "cuda" else ("fp32", "bf16")
    paper = scaling.Protocol(dtype=dtypes[0], batch_size=plan.rows, warmup=min(5, plan.iterations), iterations=plan.iterations)
    scaling.scale(names, plan.lengths, plan.base, paper, results, device, isolated=False, go_on=go_on)
    low = dataclasses.replace(paper, dtype=dtypes[1])
    gain = [name for name in names if plan.compiled and _compiles(named_model(name, plan.base), max(plan.lengths))]
    scaling.scale(gain, plan.lengths, plan.base, dataclasses.replace(low, compiled=True), results, device, isolated=False, go_on=go_on)
    scaling.scale([name for name in names if name not in gain], plan.lengths, plan.base, low, results, device, isolated=False, go_on=go_on)


def _compiles(config: ModelConfig, T: int) -> bool:
    with torch.device("meta"):
        return mixer_class(config.mixer)(config).compiles(T)


def _training(models: tuple[str, ...], plan: Plan, results: Results, device: torch.device, go_on: Callable[[], bool]) -> None:
    """The published size at its context, then the larger one at longer contexts, as many tokens to a step."""
    protocol = training_speed.Protocol(rounds=5)
    plain, eager, compiled = (tuple(each for each in training_speed.VARIANTS if each[0] == way) for way in ("plain", "eager", "compiled"))
    T = min(256, plan.base.max_position_embeddings)

    def measure(configs: dict[str, ModelConfig], T: int, variants: tuple[tuple[str, str], ...]) -> None:
        training_speed.bench_train(configs, [max(1, plan.tokens // T)], T, variants, protocol, results, device, isolated=False, go_on=go_on)

    def quick(name: str) -> bool:
        return plan.compiled and _compiles(named_model(name, plan.base), max(plan.lengths))

    published = training_speed.matched(models, plan.base)
    for name, config in published.items():
        measure({name: config}, T, plain + eager + compiled * quick(name))
    large = {name: enlarged(named_model(name, plan.base), *plan.large) for name in models}
    for T_large in plan.contexts:
        for name, config in large.items():
            measure({name: config}, T_large, eager + compiled * quick(name))


def _slow_to_compile(models: tuple[str, ...], plan: Plan, opened: Open, device: torch.device, go_on: Callable[[], bool]) -> None:
    """What compiles on short contexts alone, a minute for each."""
    T = min(256, plan.base.max_position_embeddings)
    for name, config in training_speed.matched(models, plan.base).items():
        if plan.compiled and _compiles(config, T):
            ways = [each for each in training_speed.VARIANTS if each[0] == "compiled"]
            training_speed.bench_train(
                {name: config}, [max(1, plan.tokens // T)], T, ways, training_speed.Protocol(rounds=5), opened("training"), device, isolated=False, go_on=go_on
            )
    measure_parity(models, plan, opened("parity"), device, go_on, context=PARITY_TOKENS)


def measure_parity(
    models: tuple[str, ...], plan: Plan, results: Results, device: torch.device, go_on: Callable[[], bool], *, context: int
) -> None:
    """The error of every fast path beside that of the plain path in the same format, both against the fp64 reference; a row for each.

    ``logits_error`` and ``gradient_error`` are ‖x − x₆₄‖ / ‖x₆₄‖, ``plain_…`` those of plain PyTorch; ``within``: whether none is over twice the plain one.
    Compiled is what compiles at ``context`` tokens.
    """
    base = plan.base.replace(num_hidden_layers=min(2, plan.base.num_hidden_layers), max_position_embeddings=320)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    for name in models:
        config = named_model(name, base)
        plain = named_model(PLAIN.get(name, name), base)
        rows = {(dtype, way): _parity_row(name, config, dtype, way) for dtype in ("fp32", "bf16") for way in _ways(config, plan, device, dtype, name, context)}
        if all(results.find(row) is not None for row in rows.values()) or not go_on():
            continue
        exact = _Pass(plain, torch.float64, device, compiled=False)
        for (dtype, way), row in rows.items():
            trusted = _Pass(plain, training_speed.DTYPES[dtype], device, compiled=False)
            if way == "graph":
                logits = _decoded(plain, device)
                errors = {"logits_error": _error(logits, exact.logits), "plain_logits_error": _error(trusted.logits, exact.logits)}
            else:
                fast = _Pass(config, training_speed.DTYPES[dtype], device, compiled=way == "compiled")
                errors = {
                    f"{label}{part}_error": _error(getattr(each, part), getattr(exact, part))
                    for label, each in (("", fast), ("plain_", trusted)) for part in ("logits", "gradient")
                }  # fmt: skip
            parts = [part for part in ("logits", "gradient") if f"{part}_error" in errors]
            within = all(errors[f"{part}_error"] <= ALLOWED * errors[f"plain_{part}_error"] for part in parts)
            results.add(row | errors | {"within": within})
            logger.info("parity of %s %s %s: %s", name, dtype, way, "within" if within else "NOT within")


def _ways(config: ModelConfig, plan: Plan, device: torch.device, dtype: str, name: str, context: int) -> list[str]:
    """The plain path as well: its row says what is compared with."""
    ways = ["eager"]
    if plan.compiled and obstacle(device) is None and _compiles(config, context):
        ways.append("compiled")
    if device.type == "cuda" and dtype == "fp32" and config.mixer != "attention" and name not in KERNELS:
        ways.append("graph")
    return ways


def _parity_row(name: str, config: ModelConfig, dtype: str, way: str) -> dict[str, Any]:
    return {
        "model": name, "backend": mixer_class(config.mixer).backend_name(config), "model_config": config.to_dict(), "dtype": dtype, "variant": way,
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

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, *, compiled: bool) -> None:
        model, tokens_BT = _seeded(config, device)
        model.train()
        if dtype == torch.float64:
            model.double()
        if compiled:
            compile_for_training(model, TrainConfig(compile="on"), 1)
        with autocast(device, torch.float32 if dtype == torch.float64 else dtype):
            logits_BTV, loss = model(tokens_BT, tokens_BT.roll(-1, 1))
        loss.backward()
        self.logits = logits_BTV.detach().double().cpu()
        self.gradient = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters() if p.grad is not None])


@torch.no_grad()
def _decoded(config: ModelConfig, device: torch.device) -> Tensor:
    """The logits of :class:`_Pass` from a short prefill and a CUDA graph that decodes the rest."""
    model, tokens_BT = _seeded(config, device)
    model.eval()
    start = tokens_BT.shape[1] - 32
    logits_BTV, state = model.stream(tokens_BT[:, :start])
    replay = graphed_step(model.stream, tokens_BT[:, :1], state)
    rest = [replay(tokens_BT[:, t : t + 1]).clone() for t in range(start, tokens_BT.shape[1])]
    return torch.cat([logits_BTV, *rest], 1).double().cpu()


def _error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())
