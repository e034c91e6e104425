"""The flags of an architecture: the fields of ModelConfig, and for every registered mixer its options under its name (``--gam.write mean``)."""

from __future__ import annotations

import dataclasses
import typing
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from gam_lm.cli.flag_list import explained
from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.registry import mixer_names, options_class
from gam_lm.presets.models import Fields, named_fields

SCAFFOLD = tuple(field for field in dataclasses.fields(ModelConfig) if field.name != "options")


@cache
def architecture_class() -> type[Any]:
    """A dataclass of the fields of ModelConfig and an options object for every mixer that is registered now."""
    hints, helps = typing.get_type_hints(ModelConfig, include_extras=True), explained(ModelConfig)
    fields: list[Any] = []
    for field in SCAFFOLD:
        default = 10_000 if field.default is dataclasses.MISSING else field.default
        fields.append((field.name, Annotated[hints[field.name], tyro.conf.arg(help=helps[field.name])], dataclasses.field(default=default)))
    for name in mixer_names():
        fields.append((name, options_class(name), dataclasses.field(default=options_class(name)())))
    return dataclasses.make_dataclass("Architecture", fields, frozen=True, kw_only=True)


def on_flags(fields: Fields) -> Any:
    """The flags' defaults where the models of a command share ``fields``."""
    mixers = [field.name for field in dataclasses.fields(architecture_class())][len(SCAFFOLD) :]
    options = {name: options_class(name)(**fields.get("options", {}).get(name, {})) for name in mixers}
    scaffold = {field.name: fields[field.name] for field in SCAFFOLD if field.name in fields}
    ModelConfig(**{"vocab_size": 1, **{field: value for field, value in scaffold.items() if field != "mixers"}})  # a wrong value is told before flags are read
    if "mixers" in scaffold:
        scaffold["mixers"] = tuple(scaffold["mixers"])
    return architecture_class()(**scaffold, **options)


def model_on_flags(name: str, fields: Fields) -> Any:
    """The flags' defaults where one model is trained, the one called ``name`` on ``fields``."""
    return on_flags(named_fields(name, fields))


def fields_of(architecture: Any) -> dict[str, Any]:
    """What the flags say, as the fields that the models of a comparison share."""
    scaffold = {field.name: getattr(architecture, field.name) for field in SCAFFOLD}
    options = {name: getattr(architecture, name).to_dict() for name in mixer_names() if hasattr(architecture, name)}
    return scaffold | {"mixers": list(scaffold["mixers"]), "options": options}


def config_of_flags(architecture: Any, **changes: Any) -> ModelConfig:
    """The one model that the flags describe. Raises InputError for options of a mixer that it does not have."""
    values = fields_of(architecture) | changes
    for name in values["options"].keys() - set(values["mixers"]):
        changed = [key for key, value in values["options"][name].items() if value != options_class(name)().to_dict()[key]]
        if changed:
            raise InputError(f"--{name}.{changed[0].replace('_', '-')} is given, and mixers is {values['mixers']}: leave it out, or add {name} to --mixers")
    return ModelConfig.from_dict(values | {"options": {name: values["options"][name] for name in dict.fromkeys(values["mixers"]) if name in values["options"]}})


if TYPE_CHECKING:
    Architecture = Any
else:
    Architecture = Annotated[architecture_class(), tyro.conf.arg(name="")]
    """The flags of an architecture, without a prefix of their own."""
