"""What a model is: one frozen description of the stack, and for each kind of mixer in it that mixer's own options. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from gam_lm.errors import InputError, check_object, checked, unknown_name
from gam_lm.mixers.gam_options import GAMOptions
from gam_lm.mixers.options import MixerOptions, Positive
from gam_lm.mixers.registry import DEFAULT_MIXER, options_class

O = TypeVar("O", bound=MixerOptions)  # noqa: E741

MODEL_TYPE = "gam"
"""The ``model_type`` of a config.json that this library writes."""

# Keys that Hugging Face keeps, or kept, in a config.json for itself; they describe no part of the model.
BOOKKEEPING_KEYS = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention", "architectures",
    "attn_implementation", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "custom_pipelines", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length",
    "model_type", "name_or_path", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix", "problem_type", "pruned_heads",
    "quantization_config", "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "transformers_weights", "typical_p", "use_bfloat16", "use_cache", "use_return_dict",
})  # fmt: skip

OLD_KEYS = frozenset({"backend", "conv_kernel_size", "fusion", "mixer", "num_attention_heads", "num_memory_slots", "state_size", "write"})
"""Keys of a config.json that version 0.1 wrote."""


@checked
class ModelConfig:
    """A stack of blocks around token mixers. The defaults are the recommended model; `published` gives the paper's.

    Raises `gam_lm.errors.InputError` for a value that cannot be built.
    """

    vocab_size: Positive
    """Number of token ids."""
    hidden_size: Positive = 512
    """Width of the residual stream."""
    num_hidden_layers: Positive = 6
    """Number of blocks."""
    mixers: Annotated[tuple[str, ...], Field(min_length=1)] = (DEFAULT_MIXER,)
    """What mixes the tokens: names of mixers, a pattern that repeats over the depth."""
    options: tuple[MixerOptions, ...] = ()
    """One options object for each kind of mixer whose values are not the defaults; completed with the others, in the order of ``mixers``."""
    intermediate_size: Annotated[int, Field(ge=0)] | None = None
    """Width of the feed-forward network, 0 for none; by default 4 × hidden_size (SwiGLU: 8/3), and none around Mamba."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """The feed-forward network: Linear, GELU, Linear, or with a SiLU gate in place of the GELU and without biases."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm or RMSNorm."""
    positions: Literal["none", "learned"] = "none"
    """Whether learned positions are added to the embeddings (attention can turn by position besides: its option ``rotary``)."""
    max_position_embeddings: Positive = 256
    """Longest sequence that learned positions allow; without them there is no limit."""
    initialization: Literal["fan_in", "scaled", "paper"] = "fan_in"
    """fan_in: every weight matrix and embedding N(0, 1/√inputs), outputs into the residual stream smaller with depth; scaled: the same with N(0, 0.02);
    paper: the official initialisation, in which N(0, 1) positions outweigh the tokens."""
    stack: Literal["residual", "bare"] = "residual"
    """residual: pre-norm residual blocks; bare: mixers on top of each other with neither norm, residual nor feed-forward network, as in the paper's Mamba
    baseline."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an embedding or a feed-forward output during training."""
    layer_norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the variance in every norm."""
    tie_word_embeddings: bool = True
    """Whether the output head shares the weight of the token embedding."""

    def __post_init__(self) -> None:
        kinds = {name: options_class(name) for name in dict.fromkeys(self.mixers)}
        if len(set(kinds.values())) < len(kinds):
            raise InputError(f"mixers is {list(self.mixers)}, and two of them share one options class: give each a class of its own, a subclass will do")
        given = {}
        for each in self.options:
            # A mixer's own class may derive from another's.
            fits = [name for name, kind in kinds.items() if type(each) is kind] or [name for name, kind in kinds.items() if isinstance(each, kind)]
            name = fits[0] if fits else None
            if name is None:
                raise InputError(f"options has a {type(each).__name__}, and mixers is {list(self.mixers)}: give options of the mixers that are there")
            if name in given:
                raise InputError(f"options has two {type(each).__name__}: give one for each kind of mixer")
            given[name] = each
        complete = (given.get(name) or kind() for name, kind in kinds.items())
        object.__setattr__(self, "options", tuple(each.resolved(self.hidden_size) for each in complete))

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer of every block."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.num_hidden_layers))

    @property
    def longest(self) -> int | None:
        """The longest sequence that the positions allow; None is without limit."""
        return self.max_position_embeddings if self.positions == "learned" else None

    def check_length(self, name: str, tokens: int) -> None:
        """Raise InputError where ``tokens``, which the user knows as ``name``, are more than the positions allow."""
        if self.longest is not None and tokens > self.longest:
            raise InputError(f'{name} is {tokens}, learned positions end at {self.longest}: use positions="none" or a shorter text')

    def options_of(self, kind: type[O]) -> O:
        """The options of class ``kind``. Raises KeyError where no mixer of the stack has such."""
        found = [each for each in self.options if type(each) is kind] or [each for each in self.options if isinstance(each, kind)]
        if not found:
            raise KeyError(kind.__name__)
        return found[0]

    def feed_forward_size(self, options: MixerOptions) -> int:
        """Width of the feed-forward network of the blocks whose mixer has ``options``; 0 is none."""
        if self.stack == "bare":
            return 0
        if self.intermediate_size is not None:
            return self.intermediate_size
        if not options.feed_forward:
            return 0
        return 4 * self.hidden_size if self.mlp == "gelu" else 8 * max(1, round(self.hidden_size / 3))

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with other values, checked again; options of mixers that are gone go with them.

        What was derived from the width at first (heads, slots) stays as it is: with another ``hidden_size`` give ``options`` too, ``options=()`` for new
        defaults.
        """
        if "mixers" in changes and "options" not in changes:
            kinds = {options_class(name) for name in changes["mixers"]}
            named = zip(dict.fromkeys(self.mixers), self.options, strict=True)
            changes["options"] = tuple(each for name, each in named if name in changes["mixers"] or type(each) in kinds)
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ModelConfig(**values | changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, as they are in a config.json: ``options`` is an object by mixer's name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        options = {name: each.to_dict() for name, each in zip(dict.fromkeys(self.mixers), self.options, strict=True)}
        return values | {"mixers": list(self.mixers), "options": options}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. An unknown key is an error; Hugging Face's own bookkeeping keys are passed over."""
        check_object("the model config", values)
        values = {key: value for key, value in values.items() if key not in BOOKKEEPING_KEYS}
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key in OLD_KEYS:
                raise InputError(f"key {key!r} in the model config is of gam-lm 0.1, whose models this version does not read: train anew, or use gam-lm 0.1")
            if key not in fields:
                raise unknown_name("key in the model config", key, fields)
        if "vocab_size" not in values:
            raise InputError("the config has no vocab_size: add the number of token ids")
        if (objects := values.get("options")) is not None:
            values["options"] = read_options(objects)
        return cls(**values)

    @classmethod
    def published(cls, vocab_size: int, **changes: Any) -> ModelConfig:
        """The paper's model with its official initialisation: 512 wide, 6 blocks, 512 slots, learned positions, dropout 0.1."""
        published: dict[str, Any] = {"options": (GAMOptions.published(),), "positions": "learned", "initialization": "paper", "dropout": 0.1}
        return cls(vocab_size=vocab_size, **published | changes)


def read_options(objects: Any) -> tuple[MixerOptions, ...]:
    """The options objects of ``{mixer: {field: value}}``. Raises InputError for an unknown mixer or field."""
    if not isinstance(objects, Mapping) or not all(isinstance(each, Mapping) for each in objects.values()):
        raise InputError("options is no object of objects: write it as {mixer: {field: value}}")
    found = []
    for name, fields in objects.items():
        kind = options_class(name)
        known = [field.name for field in dataclasses.fields(kind)]
        for key in fields:
            if key not in known:
                raise unknown_name(f"option of mixer {name!r}", key, known)
        found.append(kind(**fields))
    return tuple(found)
