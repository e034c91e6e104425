"""Named models: the names of every table, plot, run folder and flag. Imports no torch.

A name says what a model changes in what the models of a comparison share, its base. Further changes follow a plus sign: ``gam-static+fusion=sum``,
``gam+conv_kernel_size=5``, ``gam-hybrid+attention.window=64``; a field is one of ModelConfig, or an option of the model's mixers.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError, unknown_name
from gam_lm.mixers.registry import mixer_names, options_class

Fields = Mapping[str, Any]
"""Fields of ModelConfig as in its JSON; ``options`` may hold those of mixers that a model does not have."""


@dataclass(frozen=True)
class NamedModel:
    """A line of the list of models."""

    fields: Fields
    """What it changes in the base."""
    says: str
    """What that is, in words."""
    source: str = "this library"
    """Where the architecture comes from."""


def _gam(**options: Any) -> dict[str, Any]:
    return {"mixers": ["gam"], "options": {"gam": options}}


def _attention(**options: Any) -> dict[str, Any]:
    return {"mixers": ["attention"], "options": {"attention": options}}


PAPER = "arXiv 2509.00605"
LEARNED = {"positions": "learned"}

MODELS: Mapping[str, NamedModel] = {
    "gam": NamedModel(_gam(), "the recommended memory: delta rule, plain keys, SiLU gates"),
    "gam-static": NamedModel(_gam(write="none"), "its block around the paper's static bank: nothing is written"),
    "gam-mean": NamedModel(_gam(write="mean"), "slots hold decayed means of what was written"),
    "gam-slots": NamedModel(_gam(write_address="slots"), "the delta rule on learned slots in place of plain keys"),
    "gam-attention": NamedModel(_gam(memory="attention"), "its block around softmax attention by the memory's keys: the state grows"),
    "gam-self-attention": NamedModel(_gam(memory="self_attention"), "its block around the attention of llama: the state grows"),
    "gam-hybrid": NamedModel(
        {"mixers": ["gam", "gam", "gam", "attention"], "options": {"attention": {"window": 128}}}, "three gam to one attention over a window of 128 tokens"
    ),
    "gam-paper": NamedModel(
        _gam(write="none", gate_activation="sigmoid") | LEARNED | {"initialization": "paper"}, "the published model, its initialisation included", PAPER
    ),
    "transformer": NamedModel(_attention(), "rotary attention, GELU, LayerNorm", "arXiv 1706.03762, 2104.09864"),
    "transformer-learned": NamedModel(_attention(rotary=False) | LEARNED, "learned positions in place of rotary ones", "arXiv 1706.03762"),
    "transformer-paper": NamedModel(
        _attention(rotary=False) | LEARNED | {"initialization": "paper"}, "the paper's baseline, its initialisation included", PAPER
    ),
    "llama": NamedModel(
        _attention(qk_norm=True) | {"mlp": "swiglu", "norm": "rms"}, "rotary attention with query and key norm, SwiGLU, RMSNorm", "arXiv 2302.13971"
    ),
    "gated-deltanet": NamedModel({"mixers": ["gated_deltanet"]}, "the gated delta rule as published", "arXiv 2412.06464"),
    "mamba": NamedModel({"mixers": ["mamba"], "intermediate_size": 0}, "selective state space, no feed-forward network", "arXiv 2312.00752"),
    "mamba-paper": NamedModel(
        {"mixers": ["mamba"], "stack": "bare", "initialization": "paper", "options": {"mamba": {"expand": 3.0}}} | LEARNED,
        "the paper's baseline: bare mixers without norm or residual", PAPER,
    ),
}  # fmt: skip
"""Every model by its name."""

DEFAULT_MODEL = "gam"
"""What is trained where no model is named."""

SIZED_BY = "gam-static"
"""The model whose parameters all models of a comparison are matched to."""

BASELINE = "hf:"
"""What the names of models of transformers begin with."""


def named_model(name: str, base: Fields) -> ModelConfig:
    """The model called ``name`` on ``base``.

    Args:
        name: of MODELS or of a registered mixer, with or without changes after a plus sign.
        base: what the models of a comparison share.

    Raises:
        InputError: with the nearest name, or for a change that does not fit.
    """
    return ModelConfig.from_dict(named_fields(name, base))


def named_fields(name: str, base: Fields) -> dict[str, Any]:
    """The fields of `named_model`; what follows from the width is still open."""
    first, *changes = name.split("+")
    if first in MODELS:
        fields = MODELS[first].fields
    elif first in mixer_names():
        fields = {"mixers": [first]}
    else:
        raise unknown_name("model", first, [*MODELS, *mixer_names()])
    return _with_changes(_together(fields, base), dict(_change(name, each) for each in changes))


def on_base(fields: Fields, base: Fields) -> ModelConfig:
    """``base`` with ``fields`` changed, and without the options of mixers that it does not have."""
    return ModelConfig.from_dict(_together(fields, base))


def changed(config: ModelConfig, changes: Fields) -> ModelConfig:
    """``config`` with ``changes``: fields of ModelConfig, options of its mixers, or ``mixer.option``. Raises InputError for an unknown one."""
    values = config.to_dict()
    if ("write" in changes or "memory" in changes) and "write_address" not in changes:  # where to write follows from how
        values["options"] = {name: {key: each for key, each in options.items() if key != "write_address"} for name, options in values["options"].items()}
    return ModelConfig.from_dict(_with_changes(values, changes))


def _together(fields: Fields, base: Fields) -> dict[str, Any]:
    together = {**base, **fields}
    options = {name: {**base.get("options", {}).get(name, {}), **fields.get("options", {}).get(name, {})} for name in dict.fromkeys(together["mixers"])}
    return together | {"options": {name: each for name, each in options.items() if each}}


def _with_changes(values: dict[str, Any], changes: Fields) -> dict[str, Any]:
    own = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in ("options", "vocab_size")]
    if "mixers" in changes:  # options of mixers that are gone go with them
        mixers = [changes["mixers"]] if isinstance(changes["mixers"], str) else changes["mixers"]
        if not isinstance(mixers, list | tuple) or not all(isinstance(name, str) for name in mixers):
            raise InputError(f"mixers is {mixers!r}: write a name, or a list of names as in JSON")
        values, changes = {**values, "mixers": mixers}, {key: value for key, value in changes.items() if key != "mixers"}
    options = {name: dict(each) for name, each in values.get("options", {}).items() if name in values["mixers"]}
    known = {name: [field.name for field in dataclasses.fields(options_class(name))] for name in dict.fromkeys(values["mixers"])}
    values = {**values, "options": options}
    for field, value in changes.items():
        mixer, _, option = field.rpartition(".")
        holders = [name for name in known if (not mixer or name == mixer) and option in known[name]]
        if not mixer and option in own:
            values[option] = value
        elif len(holders) == 1:
            options.setdefault(holders[0], {})[option] = value
        elif holders:
            raise InputError(f"change {field!r} fits several mixers: write " + " or ".join(f"{name}.{option}" for name in holders))
        else:
            raise unknown_name(f"field of {'-'.join(known)}", field, [*own, *(key for each in known.values() for key in each)])
    return values


def changes_of(text: str) -> dict[str, Any]:
    """``field=value`` as a dictionary. Raises InputError where it is none."""
    return dict([_change(text, text)])


def _change(name: str, text: str) -> tuple[str, Any]:
    """A number, true, false or null as in JSON, else the text itself."""
    field, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{name!r} has the change {text!r}: write it as field=value")
    try:
        return field, json.loads(value)
    except json.JSONDecodeError:
        return field, value


def explain_models() -> str:
    """Every name with what it changes and its source, as a table in Markdown."""
    lines = ["| Name | What it is | Fields | Source |", "|---|---|---|---|"]
    for name, model in MODELS.items():
        fields = {key: value for key, value in model.fields.items() if key != "options"}
        options = {f"{mixer}.{key}": value for mixer, each in model.fields.get("options", {}).items() for key, value in each.items()}
        cells = [f"{key}={'-'.join(value) if isinstance(value, list) else value}" for key, value in {**fields, **options}.items()]
        lines.append(f"| {name} | {model.says} | {', '.join(cells)} | {model.source} |")
    for name in (each for each in mixer_names() if options_class(each).__module__.partition(".")[0] != __name__.partition(".")[0]):
        lines.append(f"| {name} | {(options_class(name).__doc__ or '').strip().splitlines()[0]} | mixers={name} | registered |")
    return "\n".join(lines)
