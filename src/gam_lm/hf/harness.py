"""A run directory under EleutherAI's lm-evaluation-harness (arXiv 2405.14782), in this process: its tasks, its prompts, its metrics (extra ``eval``)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gam_lm.checkpoint import load_model, load_tokenizer_of, read_json
from gam_lm.config import MODEL_TYPE
from gam_lm.errors import InputError, MissingExtraError, unknown_name
from gam_lm.hf.modeling_gam import GAMForCausalLM

if TYPE_CHECKING:
    from gam_lm.hf.scored import Chances

Figures = dict[str, dict[str, float]]
"""Task → figure → value, named as the harness names them; ``…_stderr`` is the standard error."""


OWN_TASKS = Path(__file__).parent / "tasks"
"""Descriptions of the tasks whose data lies under $GAM_DATA."""


def harness(
    directory: Path,
    tasks: Sequence[str],
    *,
    context: int,
    own_tasks: Path | None = None,
    examples: int | None = None,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> Figures:
    """Measure a model on tasks of the harness.

    Args:
        directory: run directory, also one of a baseline.
        tasks: names, or names of groups.
        context: most tokens of a request; longer ones lose their beginning, rolling ones go by windows of this size.
        own_tasks: folder of task descriptions in YAML, searched before the harness's own.
        examples: of each task, the first so many; None takes all.
        batch_size: a batch holds as many tokens as so many requests of ``context`` tokens.
        device: where.

    Raises:
        MissingExtraError: without lm_eval.
        InputError: for an unknown task, one whose data is not here and cannot be downloaded, or a model that is int8.
    """
    return run_tasks(scored_model(directory, context=context, batch_size=batch_size, device=device), tasks, own_tasks=own_tasks, examples=examples)


def run_tasks(scored: Any, tasks: Sequence[str], *, own_tasks: Path | None = None, examples: int | None = None) -> Figures:
    """`harness` of what `scored_model` or `scored_counts` gave."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    if own_tasks is not None and not own_tasks.is_dir():
        raise InputError(f"harness_tasks is {str(own_tasks)!r}, which is no folder: name one with task descriptions in YAML")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every default that it takes
    paths = None if own_tasks is None else str(own_tasks)
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):  # reading the harness's own fourteen thousand takes half a minute
        manager = TaskManager(include_path=paths)
    for task in tasks:
        if task not in manager.all_tasks:
            raise unknown_name("harness task", task, manager.all_tasks)
    try:
        found = simple_evaluate(scored, tasks=list(tasks), task_manager=manager, limit=examples, log_samples=False)
    except (OSError, ConnectionError) as error:  # datasets and huggingface_hub raise these for what is neither here nor to be had
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"harness {' '.join(tasks)}: the data cannot be loaded ({reason}): run it once where there is a network") from error
    return {task: _figures(values) for task, values in found["results"].items()}


def scored_model(directory: Path, *, context: int, batch_size: int = 16, device: torch.device | str = "cpu") -> Any:
    """The model of a run directory as the harness takes it; for the arguments and errors see `harness`."""
    ScoredModel = _scored().ScoredModel
    model, tokenizer = load_for_transformers(directory)
    return ScoredModel(pretrained=model.to(device), tokenizer=tokenizer, backend="causal", max_length=context, batch_size=batch_size)


class OwnTask(NamedTuple):
    """A task of OWN_TASKS, or a paradigm of one."""

    name: str
    file: str
    """Below $GAM_DATA/eval."""
    phenomenon: str | None
    """What a paradigm of BLiMP is about."""


def own_tasks(task: str) -> list[OwnTask]:
    """What the library's own ``task`` (of `gam_lm.data.task_files.FORMS`) consists of. Raises MissingExtraError without lm_eval."""
    _scored()
    from lm_eval.tasks import TaskManager

    entries = TaskManager(include_path=str(OWN_TASKS), include_defaults=False).task_index.values()
    described = [(each.name, each.cfg.get("dataset_kwargs", {}), each.cfg.get("metadata", {})) for each in entries if each.cfg]
    return [OwnTask(name, read["file"], about.get("phenomenon")) for name, read, about in described if read.get("task") == task]


def scored_counts(chances: Chances, directory: Path) -> Any:
    """Counts of the ids of a run directory's tokenizer as the harness takes them. Raises MissingExtraError without lm_eval."""
    return _scored().ScoredCounts(chances, load_tokenizer_of(directory))


def _scored() -> ModuleType:
    try:
        import_module("lm_eval")
        return import_module("gam_lm.hf.scored")
    except ImportError as error:
        raise MissingExtraError("lm_eval", "eval", "harness") from error


def load_for_transformers(directory: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run directory for transformers. Raises InputError where something is missing, broken, or int8."""
    load_tokenizer_of(directory)  # says what is missing
    config = read_json(directory / "config.json")
    if config.get("quantization_config"):
        raise InputError(f"{directory} is int8, which transformers does not run: name the run directory that it was made from")
    own = config.get("model_type", MODEL_TYPE) == MODEL_TYPE
    model = GAMForCausalLM.from_language_model(load_model(directory)) if own else AutoModelForCausalLM.from_pretrained(directory)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def _figures(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results: ``acc,none`` → ``acc``; another filter's name is kept, ``exact_match,strict-match``."""
    numbers = {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    return {name: float(value) for name, value in numbers.items() if name != "sample_len" and math.isfinite(value)}
