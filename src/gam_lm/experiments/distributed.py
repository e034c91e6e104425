"""Whether several processes make the run of one, how fast they are, and whether a run goes on with another number of them."""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from gam_lm.checkpoint import load_model
from gam_lm.config import ModelConfig
from gam_lm.data.tokens import prepare
from gam_lm.experiments.distributed_memory import long_sequence, training_memory
from gam_lm.experiments.faults import faults
from gam_lm.presets.compared import DISTRIBUTED_LONG, DISTRIBUTED_SMALL, DISTRIBUTED_TINY, DISTRIBUTED_WIDE
from gam_lm.presets.models import named_model
from gam_lm.presets.setups import ADAMW
from gam_lm.results import Results
from gam_lm.runtime.progress import progress
from gam_lm.runtime.workers import CORES
from gam_lm.training.loop import fit, new_model
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.trackers import NoTracker

logger = logging.getLogger("gam_lm")

PLAIN: Mapping[str, Any] = {**ADAMW, "learning_rate": 1e-3, "precision": "fp32", "compile": "off"}
"""What the runs share; one of each model takes Muon."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is run."""

    steps: int = 50
    """Of the runs that are compared."""
    speed_steps: int = 6
    """Of the runs that are timed."""
    long: int = 2**20
    """Tokens of the sequence that lies in pieces."""

    @property
    def stepped(self) -> TrainConfig:
        """Of the steps whose memory is measured: four sequences on a process of four."""
        return TrainConfig(**PLAIN, batch_size=16, context=256, steps=3)

    @property
    def recipe(self) -> TrainConfig:
        """Of the runs that are compared: 12 sequences divide among 1 to 4 processes and their parts."""
        return TrainConfig(**PLAIN, steps=self.steps, batch_size=12, context=32, accumulate=3, validate_every=self.steps)

    @property
    def timed(self) -> TrainConfig:
        """Of the runs that are timed."""
        return TrainConfig(**PLAIN, steps=self.speed_steps, batch_size=16, context=256)

    @property
    def saved(self) -> TrainConfig:
        """Of the steps that are timed with and without states: the clock runs from step 10 to 10 before the end."""
        return TrainConfig(**PLAIN, batch_size=16, context=64, steps=60, checkpoint_every=10)


SELDOM = 10**9
"""Steps between two states where none is written."""

PARTS = ("equality", "sharding", "rounding", "memory", "speed", "faults", "saves")
"""What is measured; see `_measurements`."""


def measure_distributed(
    models: Sequence[str], counts: Sequence[int], protocol: Protocol, results: Results, only: Sequence[str] = PARTS
) -> None:
    """Measure what ``results`` does not have; each row is written at once.

    Args:
        models: by name.
        counts: numbers of processes beside one.
        protocol: sizes and steps.
        results: an open results.json.
        only: of PARTS.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = write_text_of_words(Path(folder) / "words")
        prepare(data, vocab_size=DISTRIBUTED_TINY["vocab_size"])  # once, for all processes
        runs = [(name, *each) for name in models for each in _measurements(name, counts, protocol, data, results, only)]
        with progress("several processes", len(runs), "runs") as bar:
            for name, variant, measure in runs:
                bar.now(f"{name}, {variant}")
                measure()
                bar.advance()


def _measurements(
    name: str, counts: Sequence[int], protocol: Protocol, data: str, results: Results, only: Sequence[str]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is measured of a model, and how."""
    circle = (max(counts), *(count for count in (2, 1) if count < max(counts)), max(counts))
    arrows = "→".join(map(str, circle))
    tiny, small, wide = (named_model(name, base) for base in (DISTRIBUTED_TINY, DISTRIBUTED_SMALL, DISTRIBUTED_WIDE))
    muon = protocol.recipe.replace(optimizer="muon")

    def fill(config: ModelConfig, recipe: TrainConfig, dtype: str, variant: str, measure: Callable[[], dict[str, Any]]) -> tuple[str, Callable[[], None]]:
        return f"{dtype}, {variant}", partial(_fill, results, name, config, recipe, dtype, variant, measure)

    if "equality" in only:
        for dtype in ("fp64", "fp32"):
            for count in counts:
                yield fill(tiny, protocol.recipe, dtype, f"{count} processes", partial(_equality, tiny, protocol.recipe, data, dtype, [count]))
        yield fill(tiny, muon, "fp64", f"Muon, {max(counts)} processes", partial(_equality, tiny, muon, data, "fp64", [max(counts)]))
        yield fill(tiny, protocol.recipe, "fp64", f"stopped and gone on, {arrows} processes", partial(_equality, tiny, protocol.recipe, data, "fp64", circle))
    if "sharding" in only:
        for count in counts:
            yield fill(tiny, protocol.recipe, "fp64", f"sharded, {count} processes", partial(_equality, tiny, protocol.recipe, data, "fp64", [count], shard=True))
        yield fill(tiny, muon, "fp64", f"Muon, sharded, {max(counts)} processes", partial(_equality, tiny, muon, data, "fp64", [max(counts)], shard=True))
        moved = f"sharded, stopped and gone on, {arrows} processes"
        yield fill(tiny, protocol.recipe, "fp64", moved, partial(_equality, tiny, protocol.recipe, data, "fp64", circle, shard=True))
    if "rounding" in only:  # one process, the batch in other parts: the same sums in another order
        for parts in (1, 12):
            again = protocol.recipe.replace(accumulate=parts)
            yield fill(tiny, again, "fp32", f"1 process, {parts} parts for 3", partial(_equality, tiny, protocol.recipe, data, "fp32", [1], again=again))
    if "memory" in only:
        for shard in (False, True):
            for count in counts:
                what = f"memory of training{', sharded' * shard}, {count} processes"
                yield fill(wide, protocol.stepped, "fp32", what, partial(training_memory, wide, protocol.stepped, count, shard=shard))
        long = named_model(name, DISTRIBUTED_LONG)
        one = TrainConfig(**PLAIN, batch_size=1, context=protocol.long, steps=1)
        yield fill(long, one, "fp32", f"memory of a sequence, {max(counts)} processes", partial(long_sequence, long, protocol.long, max(counts)))
    if "speed" in only:
        for count in (1, *counts):
            yield fill(small, protocol.timed, "fp32", f"speed, {count} processes", partial(_speed, small, protocol, data, count))
    if "faults" in only:
        for own, measure in faults(name, _sizes(tiny, DISTRIBUTED_TINY), data):
            yield own["variant"], partial(_fill_row, results, own, measure)
    if "saves" in only:
        what = f"a state every {protocol.saved.checkpoint_every} steps, 2 processes"
        yield fill(small, protocol.saved, "fp32", what, partial(_saves, small, protocol.saved, data))


def _fill(
    results: Results, name: str, config: ModelConfig, recipe: TrainConfig, dtype: str, variant: str, measure: Callable[[], dict[str, Any]]
) -> None:
    own: dict[str, Any] = {"model": name, "model_config": config.to_dict(), "train_config": recipe.to_dict(), "dtype": dtype, "variant": variant}
    _fill_row(results, own, measure)


def _fill_row(results: Results, own: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> None:
    if results.find(own) is None:
        found = measure()
        results.add(own | found)
        logger.info("%s, %s, %s: %s", own["model"], own["dtype"], own["variant"], ", ".join(f"{key} {value}" for key, value in found.items()))


def _sizes(config: ModelConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    """Those fields of ``base`` that the model has."""
    return {**base, "options": {mixer: fields for mixer, fields in base["options"].items() if mixer in config.mixers}}


def write_text_of_words(folder: Path) -> str:
    """A text of seeded words in a new ``folder``, small enough that validation takes no time. Returns the folder."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(2, 7))) for _ in range(300)]
    folder.mkdir()
    for split, count in (("train", 40_000), ("valid", 1000)):
        (folder / f"{split}.txt").write_text(" ".join(rng.choice(words, count)) + "\n", encoding="utf-8")
    return str(folder)


def _equality(
    config: ModelConfig, recipe: TrainConfig, data: str, dtype: str, counts: Sequence[int], *, shard: bool = False, again: TrainConfig | None = None
) -> dict[str, Any]:
    """The largest differences to the run of one process, of a run that ``counts`` processes make in turns, with another recipe where ``again`` says so."""
    with tempfile.TemporaryDirectory() as folder:
        one, several = Path(folder) / "one", Path(folder) / "several"
        _train(config, data, recipe, dtype, one, 1, None)
        for turn, count in enumerate(counts, 1):
            stop = None if turn == len(counts) else turn * (recipe.steps or 0) // len(counts) // 10 * 10
            _train(config, data, again or recipe, dtype, several, count, stop, shard=shard and count > 1)
        expected, found = (torch.cat([p.detach().flatten() for p in load_model(path).parameters()]) for path in (one, several))
        losses = [[json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (one, several)]
        return {
            "processes": counts[0] if len(counts) == 1 else list(counts),
            "steps": losses[1][-1]["step"],
            "train_tokens": losses[1][-1]["tokens"],
            "tokens_missed": losses[0][-1]["tokens"] - losses[1][-1]["tokens"],
            "weights_relative_difference": float((found - expected).norm() / expected.norm()),
            "validation_difference_nats": abs(losses[0][-1]["val_nats"] - losses[1][-1]["val_nats"]),
            "training_difference_nats": max(abs(a["train_nats"] - b["train_nats"]) for a, b in zip(*losses, strict=True)),
        }


def _speed(config: ModelConfig, protocol: Protocol, data: str, count: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        _train(config, data, protocol.timed, "fp32", run, count, None)
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    return {"processes": count, "threads": max(1, CORES // count), "load_average": os.getloadavg()[0], "tokens_per_second": last["tokens"] / last["seconds"]}


def _saves(config: ModelConfig, recipe: TrainConfig, data: str, rounds: int = 5) -> dict[str, Any]:
    """Mean time of a step on two processes where states are written beside the training, over that without any: in turns, of ``rounds`` pairs."""
    times: dict[int, list[float]] = {recipe.checkpoint_every: [], SELDOM: []}
    for turn in range(rounds):
        for every in sorted(times, reverse=bool(turn % 2)):  # each comes first in turn
            with tempfile.TemporaryDirectory() as folder:
                run = Path(folder) / "run"
                _train(config, data, recipe.replace(checkpoint_every=every), "fp32", run, 2, None, shard=True, clock=True)
                marks = json.loads(run.with_name("clock.json").read_text(encoding="utf-8"))[:-1]  # the last one is after a validation
                times[every].append((marks[-1][1] - marks[0][1]) / (marks[-1][0] - marks[0][0]))
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    return {
        "processes": 2, "rounds": rounds, "step_ms_with_states": 1000 * float(np.mean(times[recipe.checkpoint_every])),
        "step_ms_without_states": 1000 * float(np.mean(times[SELDOM])), "saving_ratio": float(np.median(ratios)), "saving_ratio_least": min(ratios),
        "saving_ratio_largest": max(ratios), "load_average": os.getloadavg()[0],
    }  # fmt: skip


def _train(
    config: ModelConfig, data: str, recipe: TrainConfig, dtype: str, run: Path, count: int, stop: int | None, *, shard: bool = False, clock: bool = False
) -> None:
    """Train, or go on, on ``count`` gloo processes up to the end or about ``stop`` steps. ``clock`` writes the time of each record beside the run."""
    with tempfile.TemporaryDirectory() as folder:
        threads = 1 if recipe.batch_size * recipe.context < 1024 else max(1, CORES // count)  # small products gain nothing by threads
        arguments = (count, threads, f"{folder}/rendezvous", config.to_dict(), data, recipe.to_dict(), dtype, str(run), stop, shard, clock)
        if count == 1:
            _process(0, *arguments)
        else:
            spawn(_process, args=arguments, nprocs=count)


def _process(
    rank: int,
    count: int,
    threads: int,
    rendezvous: str,
    config: dict[str, Any],
    data: str,
    recipe: dict[str, Any],
    dtype: str,
    run: str,
    stop: int | None,
    shard: bool,
    clock: bool,
) -> None:
    torch.set_num_threads(threads)
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    model = new_model(ModelConfig.from_dict(config), 0)
    if dtype == "fp64":
        model = model.double()
    try:
        corpus = prepare(data, vocab_size=DISTRIBUTED_TINY["vocab_size"])
        fit(model, corpus, TrainConfig.from_dict(recipe), Path(run), tracker=_Clock(Path(run).with_name("clock.json")) if clock else _StopAfter(stop), shard=shard)
    except KeyboardInterrupt:
        if stop is None:
            raise
    finally:
        if count > 1:
            dist.destroy_process_group()


class _StopAfter(NoTracker):
    """Has the run asked to stop, as a scheduler does, when the metrics of a step are written."""

    def __init__(self, step: int | None) -> None:
        self._step = step

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `gam_lm.training.trackers.Tracker`."""
        if self._step is not None and step >= self._step:
            signal.raise_signal(signal.SIGTERM)


class _Clock(NoTracker):
    """Writes the step and the time (s) of every record."""

    def __init__(self, path: Path) -> None:
        self._path, self._marks = path, list[tuple[int, float]]()

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `gam_lm.training.trackers.Tracker`."""
        self._marks.append((step, time.perf_counter()))
        self._path.write_text(json.dumps(self._marks), encoding="utf-8")
