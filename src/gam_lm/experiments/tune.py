"""Tuning: every model gets the same trials, over the same ranges, at the horizon of the runs that are to be compared.

Optuna keeps the study, one for each model, in a database that many processes may share; what is tried comes from gam_lm.experiments.search, so that an
interrupted study goes on as the same study. Every trial is a row of results.json as well. A trial is known by its values: a study may gain models and trials,
and every model gets every point that one of them has.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from gam_lm.config import ModelConfig
from gam_lm.data.tokens import TokenCorpus
from gam_lm.errors import MissingExtraError
from gam_lm.experiments.benchmark import Contender, blocks_of, identity_of, train_row
from gam_lm.experiments.same_study import check_finished, check_points, check_rows, trials_of
from gam_lm.experiments.search import Numbered, Point, Range, best_rows, edges, key_of, more_trials, not_among, numbered, points, stretch_points
from gam_lm.results import Results
from gam_lm.runtime.progress import Progress, progress
from gam_lm.training.recipe import TrainConfig
from gam_lm.training.trackers import NoTracker

try:
    import optuna
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise MissingExtraError("optuna", "tune", "gam tune") from error

logger = logging.getLogger("gam_lm")

HEARTBEAT, GRACE = 60, 240
"""Seconds between the signs of life of a trial, and without one after which it counts as dead."""

AWAKE = 90
"""Seconds that a process itself waits before it calls another one dead: after a laptop's sleep every trial looks dead until its next sign of life."""

ANY = (1e-12, 1e12)
"""Bounds that optuna wants to hear; the ranges are ours."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is searched."""

    models: Mapping[str, ModelConfig]
    """By row name."""
    recipe: TrainConfig
    """What the trials share, with a seed of their own."""
    space: tuple[Range, ...]
    """What they try."""
    trials: int
    """Of every model, before a range is widened."""
    widenings: int = 2
    """How often the ranges may grow where a best value lies at an edge."""
    prune: bool = False
    """Whether a trial ends early that is behind the median of its model at a validation."""


def tune(study: Study, corpus: TokenCorpus, results: Results, directory: Path, device: torch.device, *, storage: str) -> None:
    """Run what is missing; every finished trial is written at once.

    Args:
        study: models, recipe, space and number of trials.
        corpus: prepared tokens.
        results: the open results.json of ``directory``.
        directory: gets a run directory for each trial under runs/.
        device: where to train.
        storage: address of optuna's database (``sqlite:///…``).

    Raises:
        InputError: where the folder or the database holds trials of another study.
    """
    check_rows(results.rows, study.space, study.recipe, study.models, directory)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # an interrupted trial is no news with a traceback
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the heartbeat has been one since 2021
        database = optuna.storages.RDBStorage(storage, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=2) if study.prune else optuna.pruners.NopPruner()
    studies = {
        name: optuna.create_study(storage=database, study_name=name, direction="minimize", pruner=pruner, load_if_exists=True) for name in study.models
    }
    check_points(_known(studies, results), study.space, study.recipe, directory)
    _check_finished(studies, results, directory, storage)
    plan: list[Point] = list(points(study.space, study.trials, study.recipe.seed))
    for widening in range(study.widenings + 1):
        _run_all(study, plan + not_among(_known(studies, results), plan), studies, corpus, results, directory, device)  # what other models have tried as well
        added = widened(study, plan, results.rows)
        if not added:
            break
        if widening == study.widenings:
            logger.warning("a best value still lies at the edge of %s: raise --widenings", ", ".join(each.field for each in added))
            break
        for each in added:
            logger.info("a best value lies at the edge of %s: every model tries %.3g to %.3g as well", each.field, each.low, each.high)
            plan = plan + points_beyond(study, each, plan, _known(studies, results))
    if further := not_among(_known(studies, results), plan):  # tried for more trials or widenings than these
        logger.info("every model got the %d points as well that the study has beside these", len(further))
        _run_all(study, plan + further, studies, corpus, results, directory, device)  # those that another process has added since
    _check_finished(studies, results, directory, storage)


def widened(study: Study, plan: Sequence[Point], rows: Sequence[Mapping[str, Any]]) -> list[Range]:
    """The stretches beyond the edges of a plan at which the best trial of a model lies, of those trials that the plan has."""
    keys = {key_of(values) for values in plan}
    among = [row for row in trials_of(rows) if key_of(row["tuned"]) in keys]  # another process may have widened already
    return edges(study.space, plan, [row["tuned"] for row in best_rows(among).values()])


def points_beyond(study: Study, stretch: Range, plan: Sequence[Point], known: Sequence[Numbered]) -> list[Point]:
    """The points that a stretch beyond an edge adds to a plan."""
    wider = tuple(stretch if old.field == stretch.field else old for old in study.space)
    return stretch_points(stretch, points(wider, more_trials(study.space, stretch, study.trials), study.recipe.seed + len(plan)), plan, known)


def _known(studies: Mapping[str, Any], results: Results) -> list[Numbered]:
    """The number and the values of every trial of the study, done or not, of whichever model."""
    results.reread()
    trials = [trial for each in studies.values() for trial in each.get_trials(deepcopy=False) if "index" in trial.user_attrs]
    found = [(trial.user_attrs["index"], values_of(trial)) for trial in trials] + [(row["trial"], row["tuned"]) for row in trials_of(results.rows)]
    return sorted(found, key=lambda each: (each[0], key_of(each[1])))


def values_of(trial: FrozenTrial) -> Point:
    """The values of a trial, also of one that waits."""
    values: Point = trial.system_attrs.get("fixed_params") or trial.params
    return values


def _check_finished(studies: Mapping[str, Any], results: Results, directory: Path, storage: str) -> None:
    finished = [
        (name, values_of(trial)) for name, each in studies.items() for trial in each.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if "index" in trial.user_attrs
    ]  # fmt: skip
    results.reread()  # a row is written before its trial counts as finished
    check_finished(finished, results.rows, directory, storage)


def _run_all(
    study: Study, plan: Sequence[Point], studies: Mapping[str, Any], corpus: TokenCorpus, results: Results, directory: Path, device: torch.device
) -> None:
    """Every point of the plan for every model, point by point, so that an interrupted study has whole points."""
    _enqueue(plan, studies, results, directory)
    with progress("trials", len(plan) * len(studies), "trials", done=_over(plan, studies)) as bar:
        _run_waiting(study, plan, studies, corpus, results, directory, device, bar)
    results.reread()


def _run_waiting(
    study: Study, plan: Sequence[Point], studies: Mapping[str, Any], corpus: TokenCorpus, results: Results, directory: Path, device: torch.device, bar: Progress,
) -> None:  # fmt: skip
    """What waits, until nothing does and no point of the plan is under way."""
    awake = 0
    while True:
        waiting = [
            (trial.user_attrs["index"], name) for name, each in studies.items() for trial in each.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        ]
        if not waiting:
            if not _of_plan(plan, studies, TrialState.RUNNING):
                return
            time.sleep(1)  # another process has the rest
            awake += 1
            if awake > AWAKE:
                _fail_stale(studies)
            _enqueue(plan, studies, results, directory)
            continue
        awake = 0
        _, name = min(waiting)

        # SQLite gives a trial that waits to two processes that ask at once: it looks and writes in two steps. This lock makes them one.
        asking = FileLock(directory / ".enqueue.lock")

        def objective(trial: Any, name: str = name, asking: FileLock = asking) -> float:
            asking.release()
            return _trial(study, name, trial, corpus, results, directory, device)

        bar.advance(_over(plan, studies) - bar.done)
        bar.now(name)
        with asking:
            studies[name].optimize(objective, n_trials=1)


def _of_plan(plan: Sequence[Point], studies: Mapping[str, Any], *states: TrialState) -> list[Any]:
    """The trials of the plan in one of the states; other points of the studies are none of it."""
    keys = {key_of(values) for values in plan}
    found = [trial for each in studies.values() for trial in each.get_trials(deepcopy=False, states=states) if "index" in trial.user_attrs]
    return [trial for trial in found if key_of(values_of(trial)) in keys]


def _over(plan: Sequence[Point], studies: Mapping[str, Any]) -> int:
    """How many trials of the plan are over."""
    return len(_of_plan(plan, studies, TrialState.COMPLETE, TrialState.PRUNED))


def _fail_stale(studies: Mapping[str, Any]) -> None:
    """Call trials failed whose process gave no sign of life."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        for each in studies.values():
            optuna.storages.fail_stale_trials(each)


def _enqueue(plan: Sequence[Point], studies: Mapping[str, Any], results: Results, directory: Path) -> None:
    """Have every point of the plan wait that is not done or under way; once, whoever asks at the same time."""
    with FileLock(directory / ".enqueue.lock"):
        for index, values in numbered(plan, _known(studies, results)):
            for each in studies.values():
                if not _there(each.get_trials(deepcopy=False), values):
                    each.enqueue_trial(dict(values), user_attrs={"index": index})


def _there(trials: Sequence[FrozenTrial], values: Point) -> bool:
    """Whether a point is done, under way or waiting; one that failed is tried again."""
    return any("index" in trial.user_attrs and key_of(values_of(trial)) == key_of(values) and trial.state != TrialState.FAIL for trial in trials)


def _trial(study: Study, name: str, trial: Any, corpus: TokenCorpus, results: Results, directory: Path, device: torch.device) -> float:
    """Train one point of one model; the loss of its last validation.

    The values are those that the study holds: the point may be one of another process, which has widened a range already.
    """
    index = trial.user_attrs.get("index")
    if index is None:  # another process took the trial that was meant
        raise optuna.TrialPruned
    values = {each.field: trial.suggest_float(each.field, *ANY, log=True) for each in study.space}
    contender = Contender(name, study.models[name], study.recipe.replace(**values), variant=f"trial{index}", columns={"trial": index, "tuned": values})
    results.reread()
    row = results.find(identity_of(contender, device))
    if row is None:
        steps = study.recipe.total_steps(blocks_of(study.recipe, corpus).steps_per_epoch)
        tracker = _Watch(trial, steps) if study.prune else NoTracker()
        try:
            row = train_row(contender, corpus, results, directory, device, tracker=tracker)
        except optuna.TrialPruned:
            results.add({**identity_of(contender, device), **contender.columns, "pruned": True})
            raise
    if row.get("pruned"):
        raise optuna.TrialPruned
    logger.info("%s, trial %d: %s", name, index, ", ".join(f"{field} {value:.3g}" for field, value in values.items()))
    return float("inf") if row.get("diverged") else float(row["val_nats_per_token"])


class _Watch(NoTracker):
    """Tells the study of every validation, and ends a trial that it gives up before the last one: what is trained to the end counts."""

    def __init__(self, trial: Any, steps: int) -> None:
        self._trial, self._steps = trial, steps

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """See `gam_lm.training.trackers.Tracker`."""
        if "val_nats" in figures:
            self._trial.report(figures["val_nats"], step)
            if step < self._steps and self._trial.should_prune():
                raise optuna.TrialPruned


def forget_dead_trials(storage: str, models: Sequence[str]) -> None:
    """Call the running trials of a database that nobody else uses failed: whoever ran them was killed. They are tried again."""
    for name in models:
        try:
            study = optuna.load_study(storage=storage, study_name=name)
        except KeyError:
            continue
        for trial in study.get_trials(states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
