"""What `gam train` is going to do: with a plan for a new run, with the plan that was saved for one that goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gam_lm.checkpoint import load_config, load_model, needed, read_json
from gam_lm.cli.architecture import SCAFFOLD, config_of_flags
from gam_lm.cli.config_file import to_toml, with_nothing
from gam_lm.cli.training_flags import NO_TEXT, check_flags, check_kept, check_stream, name_of, texts_of
from gam_lm.config import ModelConfig
from gam_lm.data.conversations import prepare_conversations
from gam_lm.data.corpora import Corpus, load_corpus
from gam_lm.data.first_part import with_first_tokens
from gam_lm.data.shards import DataSet, data_set, text_bytes, with_validation
from gam_lm.data.stream import lanes_for
from gam_lm.data.tokenizer import load_tokenizer
from gam_lm.data.tokens import TokenCorpus, prepare, prepare_corpus
from gam_lm.errors import InputError
from gam_lm.mixers.registry import mixer_names
from gam_lm.model import LanguageModel
from gam_lm.presets.models import changed
from gam_lm.runtime import processes
from gam_lm.runtime.files import write_text
from gam_lm.serve.chat import TEMPLATE, Chat, compiled, read_chat_template
from gam_lm.training.batches import Stream
from gam_lm.training.directory import check_claimable
from gam_lm.training.loop import new_model
from gam_lm.training.plan import SIZES, VOCABULARY, Plan, Size, rows_of_step, vocabulary_for
from gam_lm.training.planning import Planner, longest_context
from gam_lm.training.recipe import TrainConfig

if TYPE_CHECKING:
    from gam_lm.cli.train import Train

RECIPE = tuple(field.name for field in dataclasses.fields(TrainConfig))

TEXT = ("vocab_size", "tokenizer", "train_rows", "valid_rows")
"""Flags that say how a text is read."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run that can start."""

    out: Path
    config: ModelConfig
    recipe: TrainConfig
    plan: Plan
    whole: TokenCorpus
    """The text."""
    corpus: TokenCorpus
    """The text with what of its validation split is measured."""
    stream: Stream | None = None
    """What is read in place of the train split of ``corpus``, which is then its head."""

    def fresh_model(self, device: torch.device) -> LanguageModel:
        """The model before its first step. Raises InputError where the run to start from is in int8."""
        model = new_model(self.config, self.recipe.seed, device)
        if self.plan.start and not any((self.out / "state").glob("step-*")):  # a run that goes on has its own weights
            if "quantization_config" in read_json(Path(self.plan.start) / "config.json"):
                raise InputError(f"from is {self.plan.start!r}, which is in int8: start from the run that it was exported from")
            model.load_state_dict(load_model(self.plan.start, device=device).state_dict())
        return model

    def keep_beside(self) -> None:
        """Write what belongs to the model beside it: the file that repeats the run, and its chat template."""
        file = self.out / "chat_template.jinja"
        if not file.is_file() and (source := template_source(self.plan)) is not None:
            write_text(file, source)
        write_text(self.out / "run.toml", self.toml())

    def toml(self) -> str:
        """The file that repeats the run with `gam train --config`."""
        plan = self.plan
        what: dict[str, Any] = {"texts": None if plan.chat else list(plan.texts), "chat": plan.texts[0] if plan.chat else None, "from": plan.start or None}
        # A run that starts from another has its model and tokenizer.
        made = {} if plan.start else {"model": plan.model, "tokenizer": plan.tokenizer, "vocab_size": plan.vocab_size}
        config = {key: value for key, value in self.config.to_dict().items() if key not in ("vocab_size", "options")}
        options = {} if plan.start else self.config.to_dict()["options"]
        model = {"dropout": config["dropout"]} if plan.start else config
        rows: dict[str, Any] = {"stream": True} if plan.lanes else {"train_rows": plan.train_rows, "valid_rows": plan.valid_rows}
        if not plan.chat:
            rows["valid_tokens"] = plan.valid_tokens
        decided = {**model, **self.recipe.to_dict(), **options}
        return to_toml({**what, **made, **rows, **with_nothing(decided)})


def job_of(train: Train, device: torch.device) -> Job:
    """Decide what the flags leave open, or take it from the run directory that is there.

    Raises:
        InputError: for flags that do not go together, a text that cannot be read, or a directory that cannot go on.
    """
    check_flags(train)
    texts = texts_of(train)
    out = train.out or Path("runs") / name_of(train, texts)
    check_claimable(out)
    if (out / "recipe.json").is_file() and train.preset is None:
        return _again(train, texts, out, read_json(out / "recipe.json"))
    if not texts:
        raise InputError(NO_TEXT)
    return _new(train, texts, out, device)


def _new(train: Train, texts: tuple[str, ...], out: Path, device: torch.device) -> Job:
    told = train.preset is not None  # a preset says it all
    fixed = {name: getattr(train.recipe, name) for name in RECIPE if told or name in train.given}
    if train.tokens_per_step is not None and "accumulate" not in train.given:
        fixed.pop("accumulate", None)
    if train.stream:
        check_stream(train, texts)
    start = None if train.start is None else load_config(train.start)
    plan = Plan(
        texts=texts, minutes=0 if told or fixed.get("steps") or "epochs" in fixed else train.minutes, vocab_size=_vocabulary(train, texts),
        tokenizer=train.text.tokenizer if train.start is None else str(needed(train.start, "tokenizer.json")),
        model=train.model if start is None else _model_of(Path(str(train.start)), start), valid_tokens=0, seconds=0, chat=train.chat is not None,
        start="" if train.start is None else str(train.start), train_rows=train.text.train_rows, valid_rows=train.text.valid_rows,
        lanes=int(train.stream),  # how many there are to be is known when the batch is
    )  # fmt: skip
    if start is not None:
        check_kept(train)
    whole = _prepared(plan, train.recipe.context if start is None or "context" in train.given else longest_context(start), Path(plan.start))

    def config_at(size: Size, dropout: float) -> ModelConfig:
        if start is not None:
            return start.replace(dropout=train.architecture.dropout if "dropout" in train.given else dropout)
        found = {"hidden_size": size.hidden_size, "num_hidden_layers": size.num_hidden_layers, "dropout": dropout}
        open_ = {} if told else {name: value for name, value in found.items() if name not in train.given}
        return config_of_flags(train.architecture, vocab_size=whole.vocab_size, **open_)

    planner = Planner(corpus=whole, device=device, minutes=train.minutes, config_at=config_at, fixed=fixed, fine_tuning=start is not None,
                      tokens_per_step=train.tokens_per_step, shard=train.shard, endless=train.stream, sizes=SIZES if start is None else SIZES[:1])  # fmt: skip
    config, recipe, schedule = planner.plan()
    valid_tokens = train.valid_tokens or (whole.splits["valid"].tokens if told else schedule.valid_tokens)
    corpus = with_first_tokens(whole, "valid", valid_tokens)
    lanes = lanes_for(_streamed(plan)[0].train, recipe.batch_size, processes.world_size()) if train.stream else 0
    plan = dataclasses.replace(plan, valid_tokens=corpus.splits["valid"].tokens, seconds=schedule.seconds, lanes=lanes)
    return Job(out=out, config=config, recipe=recipe, plan=plan, whole=whole, corpus=corpus, stream=_stream_of(plan))


def _again(train: Train, texts: tuple[str, ...], out: Path, saved: Mapping[str, Any]) -> Job:
    """The run in ``out`` as it was planned, with what the flags change in it: what changes the run is refused when it is claimed."""
    try:
        config, recipe = ModelConfig.from_dict(saved["model_config"]), TrainConfig.from_dict(saved["train_config"])
        plan = Plan.from_dict(saved["plan"]) if "plan" in saved else _unplanned(saved, config, texts)
    except (KeyError, TypeError) as error:
        raise InputError(f"{out / 'recipe.json'} is broken (no {error}): copy it again or choose a new folder") from error
    asked = {
        "from": str(train.start), "chat": train.chat is not None, "model": train.model, "minutes": train.minutes, "vocab_size": train.architecture.vocab_size,
        "tokenizer": train.text.tokenizer, "train_rows": train.text.train_rows, "valid_rows": train.text.valid_rows,
    }  # fmt: skip
    asked = {name: value for name, value in asked.items() if name in train.given}
    if "plan" not in saved:  # what it does not say of the text, the flags say
        said = {name: asked.pop(name) for name in TEXT if name in asked}
        plan = dataclasses.replace(plan, **said, valid_tokens=train.valid_tokens or 0)
    for name, value in asked.items():
        kept = getattr(plan, "start" if name == "from" else name)
        if value != kept and not (name == "minutes" and not plan.minutes):
            raise _another_run(out, name, kept or "not given", value)
    if train.stream and not plan.lanes:
        raise InputError(f"out is {str(out)!r}, which holds a run of a prepared text: leave --stream out to go on with it, or choose a new --out")
    changes = {name: getattr(train.architecture, name) for name in (field.name for field in SCAFFOLD) if name in train.given and name != "vocab_size"}
    for mixer in mixer_names():
        options = getattr(train.architecture, mixer, None)
        own = [] if options is None else [field.name for field in dataclasses.fields(options)]
        changes |= {f"{mixer}.{name}": getattr(options, name) for name in own if f"{mixer}.{name}" in train.given}
    if "mixers" in changes:
        changes["mixers"] = list(changes["mixers"])
    config = changed(config, changes)
    recipe = recipe.replace(**{name: getattr(train.recipe, name) for name in RECIPE if name in train.given})
    if train.tokens_per_step is not None and rows_of_step(train.tokens_per_step, recipe.context) != recipe.batch_size:
        raise _another_run(out, "tokens_per_step", recipe.batch_size * recipe.context, train.tokens_per_step)
    plan = dataclasses.replace(plan, texts=texts or plan.texts)
    if not plan.texts:
        raise InputError(f"data is not given, and {str(out)!r} does not say what it was trained on: name its text")
    whole = _prepared(plan, recipe.context, Path(plan.start) if (Path(plan.start) / "tokenizer.json").is_file() else out)
    corpus = with_first_tokens(whole, "valid", plan.valid_tokens or whole.splits["valid"].tokens)
    measured = corpus.splits["valid"].tokens
    if train.valid_tokens is not None and with_first_tokens(whole, "valid", train.valid_tokens).splits["valid"].tokens != measured:  # there may be fewer
        raise _another_run(out, "valid_tokens", measured, train.valid_tokens)
    return Job(out=out, config=config, recipe=recipe, plan=plan, whole=whole, corpus=corpus, stream=_stream_of(plan))


def _another_run(out: Path, name: str, kept: object, asked: object) -> InputError:
    return InputError(
        f"out is {str(out)!r}, which holds another run ({name} {kept}, not {asked}): leave --{name.replace('_', '-')} out to go on with it, or choose a new --out"
    )


def _unplanned(saved: Mapping[str, Any], config: ModelConfig, texts: tuple[str, ...]) -> Plan:
    """Of a run that was trained from Python or by `gam bench`."""
    return Plan(
        texts=texts, minutes=0, vocab_size=saved["corpus"]["vocab_size"], tokenizer=saved["corpus"]["tokenizer"].partition(":")[0], model="-".join(config.mixers),
        valid_tokens=0, seconds=0,
    )  # fmt: skip


def _streamed(plan: Plan) -> tuple[DataSet, Corpus]:
    """The files of a plan that streams, and the head of its text."""
    return with_validation(data_set(plan.texts[0]))


def _stream_of(plan: Plan) -> Stream | None:
    return Stream(shards=_streamed(plan)[0].train, lanes=plan.lanes) if plan.lanes else None


def _vocabulary(train: Train, texts: tuple[str, ...]) -> int:
    """Entries of a tokenizer that is trained; of a long text no more is read than decides it."""
    if train.preset is not None or "vocab_size" in train.given or train.start is not None or train.text.tokenizer != "bpe":
        return int(train.architecture.vocab_size)
    if train.stream:
        return vocabulary_for(text_bytes(data_set(texts[0]).train), train.minutes)
    corpus = load_corpus(texts)
    if "train" not in corpus.splits:
        return int(train.architecture.vocab_size)
    known = corpus.sizes.get("train", 0)
    if not known:
        for document in corpus.splits["train"]():
            known += len(document.encode())
            if known >= VOCABULARY[-1][0]:
                break
    return vocabulary_for(known, train.minutes)


def _prepared(plan: Plan, context: int, start: Path) -> TokenCorpus:
    """The text of a plan as token ids; a plan that starts from a run takes tokenizer and template from ``start``: that run, or the own one."""
    if plan.start:
        plan = dataclasses.replace(plan, tokenizer=str(needed(start, "tokenizer.json")))
    if plan.chat:
        template, special = read_chat_template(start)
        chat = Chat(load_tokenizer(plan.tokenizer), template or compiled(TEMPLATE, "the library"), special)
        return prepare_conversations(Path(plan.texts[0]), Path(plan.tokenizer), chat.marked, context)
    if plan.lanes:
        return prepare_corpus(_streamed(plan)[1], tokenizer=plan.tokenizer, vocab_size=plan.vocab_size)
    limits = {split: rows for split, rows in (("train", plan.train_rows), ("valid", plan.valid_rows)) if rows is not None}
    corpus = prepare(plan.texts, tokenizer=plan.tokenizer, vocab_size=plan.vocab_size, row_limits=limits or None)
    if missing := [split for split in ("train", "valid") if split not in corpus.splits]:
        raise InputError(f"data {plan.texts[0]!r} has no {missing[0]} split: it is for evaluation, use it with gam eval RUN --data {plan.texts[0]}")
    return corpus


def template_source(plan: Plan) -> str | None:
    """The chat template that a run's model is to have: that of the run it starts from, or the library's where it learns conversations."""
    if not plan.start:
        return None
    start = Path(plan.start)
    file, config = start / "chat_template.jinja", start / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    kept = read_json(config).get("chat_template") if config.is_file() else None
    return kept if isinstance(kept, str) else TEMPLATE if plan.chat else None


def _model_of(run: Path, config: ModelConfig) -> str:
    """What a run calls its model."""
    file = run / "recipe.json"
    plan = read_json(file).get("plan") if file.is_file() else None
    name = plan.get("model") if isinstance(plan, dict) else None
    return name if isinstance(name, str) else "-".join(config.mixers)
