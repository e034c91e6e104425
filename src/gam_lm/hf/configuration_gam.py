"""A model's description as transformers wants it: the fields of ModelConfig, under the same names and with the same defaults."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedConfig

from gam_lm.config import MODEL_TYPE, ModelConfig


class GAMConfig(PreTrainedConfig):
    """The configuration of a GAM model. Every field is explained at `gam_lm.config.ModelConfig`, which also checks the values."""

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (Trainer adds it to a list)

    # The fields stand in one place: transformers makes a dataclass of this class from these annotations and defaults.
    __annotations__ = {field.name: "Any" for field in dataclasses.fields(ModelConfig)} | {
        "use_cache": "bool", "bos_token_id": "int | None", "eos_token_id": "int | list[int] | None", "pad_token_id": "int | None",
    }  # fmt: skip
    vars().update({field.name: field.default for field in dataclasses.fields(ModelConfig) if field.default is not dataclasses.MISSING})
    options = None
    vocab_size = 10_000
    use_cache = True
    bos_token_id = None
    eos_token_id = None
    pad_token_id = None

    def to_model_config(self) -> ModelConfig:
        """What the library itself calls this model. Raises InputError for a value that cannot be built."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(ModelConfig)}
        return ModelConfig.from_dict({name: value for name, value in values.items() if (name, value) != ("options", None)})
