"""All that a GPU can tell, within minutes: parity of every fast path, Table 2, blocks up to 65,536 tokens, training at two sizes, decoding with CUDA graphs.

Each part has its own folder with a results.json, so that what time did not allow is what the next call goes on with.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch

from gam_lm.config import ModelConfig
from gam_lm.diagnostics.cost import enlarged
from gam_lm.experiments import decode, scaling, training_speed
from gam_lm.experiments.measuring import emulated
from gam_lm.experiments.parity import KERNELS, PARITY_TOKENS, PLAIN, compiles_at, measure_parity, on_kernel
from gam_lm.presets import compared
from gam_lm.presets.models import Fields, named_model
from gam_lm.results import Results

logger = logging.getLogger("gam_lm")

MATERIALISED = "transformer-learned+backend=materialised"
"""The paper's attention, whose scores are held whole."""

Open = Callable[[str], Results]
"""Opens the results.json of a part: parity, table-2, blocks, training or decode."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, and at which sizes."""

    base: Fields
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
    compiled_lengths: tuple[int, ...]
    """Of Table 2, compiled."""
    blocks: tuple[str, ...]
    """The models whose blocks are compared, kernels included."""
    block_lengths: tuple[int, ...]
    """T of that comparison."""
    block_tokens: int
    """B · T of it."""
    large: tuple[float, int]
    """Parameters and width of the second size in training."""
    contexts: tuple[int, ...]
    """T in training at the second size; the published one has 256."""
    tokens: int
    """B · T in training at the published size."""
    large_tokens: int
    """At the second."""
    decoded: tuple[int, ...]
    """Contexts of decoding."""
    batches: tuple[int, ...]
    """B of decoding."""


FULL = Plan(
    base={"vocab_size": 10_000},
    models=compared.ON_GPU,
    lengths=(256, 512, 1024, 2048, 4096, 8192),
    rows=16,
    iterations=20,
    compiled=True,
    compiled_lengths=(512, 2048, 8192),
    blocks=compared.BLOCKS_ON_GPU,
    block_lengths=(256, 1024, 4096, 16_384, 65_536),
    block_tokens=65_536,
    large=(350e6, 1024),
    contexts=(512, 2048, 8192),
    tokens=16_384,
    large_tokens=8_192,
    decoded=(1_000, 10_000, 100_000),
    batches=(1, 16),
)

DRY = Plan(
    base=compared.DRY_BASE,
    models=compared.DRY,
    lengths=(16, 32),
    rows=2,
    iterations=1,
    compiled=False,
    compiled_lengths=(),
    blocks=compared.DRY,
    block_lengths=(8, 32),
    block_tokens=64,
    large=(2e4, 32),
    contexts=(32,),
    tokens=64,
    large_tokens=64,
    decoded=(5, 9),
    batches=(1,),
)
"""Every part at sizes that a CPU does in seconds: whether the command works, and nothing else."""


class _Run:
    """The steps of one call: a step that fails is said, and the next one is taken."""

    def __init__(self, plan: Plan, opened: Open, device: torch.device, seconds: float) -> None:
        self.plan, self.opened, self.device = plan, opened, device
        self.deadline: float | None = time.monotonic() + seconds
        self.failed: list[str] = []

    def go_on(self) -> bool:
        """Whether there is time for more."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            logger.warning("time is up: the same command goes on with what is missing")
            self.deadline = None
        return self.deadline is not None

    def take(self, name: str, step: Callable[[], None]) -> None:
        """Take a step; its error, if any, is logged whole."""
        try:
            step()
        except Exception:
            logger.exception("%s failed", name)
            self.failed.append(name)
            if self.device.type == "cuda":
                self._survived()

    def _survived(self) -> None:
        """After some errors a GPU does nothing more for this process: then the rest is left to the next call."""
        try:
            torch.cuda.synchronize(self.device)
        except RuntimeError:
            logger.error("the GPU is lost to this process: the same command goes on with what is missing")
            self.deadline = None

    def parity(self, models: Sequence[str], compiled_at: int | None = None) -> None:
        """See gam_lm.experiments.parity; a step for each model."""
        for name in models:
            self.take(f"parity of {name}", partial(
                measure_parity, [name], self.plan.base, self.opened("parity"), self.device, self.go_on, compiled_at=compiled_at
            ))  # fmt: skip

    def scale(self, models: Sequence[str], lengths: Sequence[int], dtype: str, *, compiled: bool = False) -> None:
        """Table 2 by the paper's protocol in another number format, or compiled."""
        plan = self.plan
        protocol = scaling.Protocol(
            dtype=dtype, compiled=compiled, batch_size=plan.rows, warmup=min(5, plan.iterations), iterations=plan.iterations
        )  # fmt: skip
        self.take(
            f"Table 2 in {dtype} of {', '.join(models)}",
            lambda: scaling.scale(models, lengths, plan.base, protocol, self.opened("table-2"), self.device, isolated=False, go_on=self.go_on),
        )

    def compare_blocks(self, models: Sequence[str]) -> None:
        """Time and largest error of a block at equally many tokens, whatever their length."""
        plan = self.plan
        for T in plan.block_lengths:
            protocol = scaling.Protocol(
                dtype="fp32" if emulated("bf16", self.device) else "bf16", batch_size=max(1, plan.block_tokens // T),
                warmup=min(3, plan.iterations), iterations=min(10, plan.iterations), seconds=0.5,
                accuracy=True,
            )  # fmt: skip
            self.take(f"blocks at {T} tokens", partial(
                scaling.scale, models, [T], plan.base, protocol, self.opened("blocks"), self.device, isolated=False, go_on=self.go_on,
            ))  # fmt: skip

    def train(self, configs: Mapping[str, ModelConfig], tokens: int, T: int, ways: Sequence[str]) -> None:
        """Training speed of each model at T tokens a row."""
        variants = training_speed.variants_of(ways, self.device)
        for name, config in configs.items():
            self.take(f"training of {name} at {T} tokens", partial(
                training_speed.bench_train, {name: config}, [max(1, tokens // T)], T, variants, training_speed.Protocol(rounds=5), self.opened("training"), self.device,
                isolated=False, go_on=self.go_on,
            ))  # fmt: skip

    def decode(self, models: Sequence[str]) -> None:
        """Decoding of each model, on a GPU with CUDA graphs."""
        plan = self.plan
        dtype = "fp32" if emulated("bf16", self.device) else "bf16"
        settings = [(dtype, "eager")] + [(dtype, "graph")] * (self.device.type == "cuda")
        for name in models:
            self.take(f"decoding of {name}", partial(
                decode.bench_decode, [name], plan.decoded, plan.batches, settings, plan.base, decode.Protocol(steps=30), self.opened("decode"), self.device,
                isolated=False, go_on=self.go_on,
            ))  # fmt: skip


def bench_gpu(plan: Plan, opened: Open, device: torch.device, *, seconds: float) -> list[str]:
    """Measure what is missing, what matters most first.

    Args:
        plan: what.
        opened: gives the results.json of a part.
        device: where.
        seconds: the most that it may take; what is under way then is finished.

    Returns:
        The steps that failed; their errors are logged.
    """
    missing = [name for name in plan.blocks if any(name.endswith(end) and find_spec(package) is None for end, package in KERNELS.items())]
    if missing:
        logger.warning("%s left out: triton or flash-linear-attention is not installed", ", ".join(missing))
    models, blocks = ([name for name in names if name not in missing] for names in (plan.models, plan.blocks))
    longest = max(plan.lengths)
    quick = [name for name in models if plan.compiled and compiles_at(named_model(name, plan.base), longest)]
    run = _Run(plan, opened, device, seconds)

    published = training_speed.matched(models, plan.base)
    large = {name: enlarged(named_model(name, plan.base), *plan.large) for name in models}
    T = min(256, plan.base.get("max_position_embeddings", 256))
    run.parity([*models, *(name for name in blocks if on_kernel(name) and name not in models)])
    run.train(published, plan.tokens, T, ("plain", "eager"))
    run.scale([*models, MATERIALISED], plan.lengths, "fp16" if device.type == "cuda" else "fp32")
    run.compare_blocks(blocks)
    for T_large in plan.contexts:
        run.train(large, plan.large_tokens, T_large, ("eager",))
    run.decode([name for name in models if not on_kernel(name) and not name.endswith(PLAIN["triton"])])
    run.scale([*models, MATERIALISED], plan.lengths, "bf16")

    # Compiling takes up to a minute for each.
    for name in quick:
        run.train({name: published[name]}, plan.tokens, T, ("compiled",))
        run.parity([name], longest)
        run.scale([name], plan.compiled_lengths, "bf16", compiled=True)
        for T_large in plan.contexts:
            run.train({name: large[name]}, plan.large_tokens, T_large, ("compiled",))
    slow = [name for name in models if name not in quick and plan.compiled and compiles_at(published[name], T)]  # on short contexts alone
    run.train({name: published[name] for name in slow}, plan.tokens, T, ("compiled",))
    run.parity(slow, PARITY_TOKENS)
    return run.failed
