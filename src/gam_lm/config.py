"""What a model is: one flat, frozen description, spelled as Hugging Face spells it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from gam_lm.errors import InputError, unknown_name

MODEL_TYPE = "gam"
"""The ``model_type`` of a config.json that this library writes."""

# Keys that Hugging Face keeps in a config.json for itself; they describe no part of the model.
BOOKKEEPING_KEYS = frozenset({
    "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "is_encoder_decoder", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "quantization_config", "return_dict", "torch_dtype",
    "transformers_version", "use_cache", "chunk_size_feed_forward", "_name_or_path",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stack of blocks around one token mixer.

    The defaults are the published setting of GAM (arXiv 2509.00605). Raises
    :class:`~gam_lm.errors.InputError` for a value that cannot be built.
    """

    vocab_size: int
    """Number of token ids."""
    hidden_size: int = 512
    """Width of the residual stream."""
    num_hidden_layers: int = 6
    """Number of blocks."""
    intermediate_size: int | None = None
    """Width of the feed-forward network; None is 4 × hidden_size (mamba: 0), 0 leaves the network out."""
    max_position_embeddings: int = 256
    """Longest sequence that learned positions allow; the other kinds of position do not use it."""
    dropout: float = 0.1
    """Probability of dropping an embedding or a feed-forward output during training."""

    mixer: str = "gam"
    """What mixes the tokens of a block: a name of the registry in gam_lm.mixers."""
    positions: Literal["learned", "rotary", "none"] = "learned"
    """How a token knows its place: a learned embedding, rotated queries and keys (attention), or not at all."""
    initialization: Literal["scaled", "fan_in", "paper"] = "scaled"
    """scaled: every weight matrix and embedding N(0, 0.02), outputs into the residual stream smaller with depth;
    fan_in: the same with std 1/√inputs, which is larger below a width of 2,500, and what narrow models need for recall;
    paper: the official initialisation, in which N(0, 1) positions drown the tokens."""
    stack: Literal["residual", "bare"] = "residual"
    """residual: pre-norm residual blocks; bare: mixers on top of each other with neither norm, residual nor
    feed-forward network, as in the paper's Mamba baseline."""

    num_attention_heads: int = 8
    """Heads of attention, or of a written memory."""
    conv_kernel_size: int = 3
    """Taps of the causal depthwise convolution, the current token included (gam, mamba)."""

    num_memory_slots: int = 512
    """Slots of a block's memory in total; a written memory divides them over its heads (gam)."""
    fusion: Literal["gate", "sum", "global", "local"] = "gate"
    """How the two paths meet: gated (the paper's model), summed, or one of them alone, as in its ablation (gam)."""
    keep_gate: bool = False
    """Whether a path that stands alone (fusion global or local) keeps its gate, which the published ablation drops with the other path (gam)."""
    gate_activation: Literal["sigmoid", "silu"] = "sigmoid"
    """What the gates of the paths pass through: as in the paper, or x·σ(x), as the output gates of Mamba and Gated DeltaNet (gam)."""
    write: Literal["none", "mean", "delta"] = "none"
    """What the sequence writes into the memory: nothing (the paper's static bank), a decayed weighted mean of
    the values that came to a slot, or the difference to what the slot held (gam)."""

    write_gate: Literal["learned", "closed"] = "learned"
    """How strongly a token writes: as it learns to, or not at all, with the same parameters (what is writing worth?)."""
    write_address: Literal["slots", "keys"] = "slots"
    """Where a written memory is addressed: softmax over learned slots, or plain keys, SiLU and length 1, as in DeltaNet."""
    static_path: bool = False
    """Whether the paper's static bank stands beside a written memory."""

    state_size: int = 16
    """States per channel of the selective scan (mamba)."""
    expand: float = 2
    """Inner width of the selective scan over hidden_size (mamba)."""

    chunk_size: int = 64
    """Tokens that a recurrence handles at once (written memory, mamba): speed and memory only, never the result."""
    backend: str = "auto"
    """Which implementation of the mixer runs; auto picks the fastest that is available and says why."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""
    tie_word_embeddings: bool = True
    """Whether the output head shares the weight of the token embedding."""

    def __post_init__(self) -> None:
        for field in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "num_attention_heads",
                      "conv_kernel_size", "num_memory_slots", "state_size", "chunk_size"):  # fmt: skip
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{field} is {value!r}: use a whole number of at least 1")
        if self.intermediate_size is not None and (not isinstance(self.intermediate_size, int) or self.intermediate_size < 0):
            raise InputError(
                f"intermediate_size is {self.intermediate_size!r}: use a whole number, 0 for no feed-forward network, or None for 4 × hidden_size"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout is {self.dropout!r}: use a probability from 0 to below 1")
        if self.layer_norm_eps <= 0:
            raise InputError(f"layer_norm_eps is {self.layer_norm_eps!r}: use a number above 0")
        if self.expand * self.hidden_size < 1:
            raise InputError(f"expand is {self.expand!r}: use a number that leaves at least one of {self.hidden_size} channels")
        for field, choices in _choices().items():
            value = getattr(self, field)
            if value not in choices:
                raise unknown_name(field, str(value), choices)
        self._check_together()

    def _check_together(self) -> None:
        """Values that are fine alone and not together."""
        if self.uses_heads and self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size is {self.hidden_size}, which num_attention_heads={self.num_attention_heads} does not divide: "
                f"use a multiple of {self.num_attention_heads} or another number of heads"
            )
        if self.positions == "rotary" and self.mixer != "attention":
            raise InputError(
                f"positions is 'rotary', which turns the queries and keys of attention: use 'none' or 'learned' with mixer={self.mixer!r}"
            )
        if self.positions == "rotary" and self.head_size % 2:
            raise InputError(
                f"positions is 'rotary', which needs an even width per head and finds {self.head_size}: change hidden_size or num_attention_heads"
            )
        if self.write_address == "keys" and self.write == "mean":
            raise InputError("write_address is 'keys' with write='mean', whose weights are shares of slots: use 'slots', or write='delta'")
        if self.keep_gate and self.fusion not in ("global", "local"):
            raise InputError(f"keep_gate is True with fusion={self.fusion!r}: it is for 'global' and 'local'; both paths with their gates are fusion='gate'")
        if self.mixer == "gam" and self.write != "none":
            if self.fusion in ("global", "local"):
                raise InputError(
                    f"fusion is {self.fusion!r} with write={self.write!r}: a written memory needs both paths, use 'gate' or 'sum', or write='none'"
                )
            if self.num_memory_slots % self.num_attention_heads:
                raise InputError(
                    f"num_memory_slots is {self.num_memory_slots}, which num_attention_heads={self.num_attention_heads} does not divide: "
                    "a written memory gives every head the same number of slots"
                )
            if self.conv_kernel_size < 2:
                raise InputError(
                    f"conv_kernel_size is {self.conv_kernel_size} with write={self.write!r}: a write is addressed by what came before its value, use 2 or more"
                )

    @property
    def gated_paths(self) -> int:
        """Paths of a GAM mixer that have a gate."""
        return 2 if self.fusion == "gate" else int(self.keep_gate)

    @property
    def uses_heads(self) -> bool:
        """Whether the mixer divides its width over heads."""
        return self.mixer == "attention" or (self.mixer == "gam" and self.write != "none")

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the feed-forward network as built: ``intermediate_size`` with its default filled in."""
        if self.stack == "bare":
            return 0
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 0 if self.mixer == "mamba" else 4 * self.hidden_size

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with other values, validated again."""
        check_keys(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, as they stand in a config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`. An unknown key is an error; Hugging Face's own bookkeeping keys are passed over."""
        values = {key: value for key, value in values.items() if key not in BOOKKEEPING_KEYS}
        check_keys(values)
        if "vocab_size" not in values:
            raise InputError("the config has no vocab_size: add the number of token ids")
        return cls(**values)


def check_keys(values: dict[str, Any]) -> None:
    """Raise :class:`InputError` for the first key that is no field of :class:`ModelConfig`."""
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in values:
        if key not in fields:
            raise unknown_name("key in the model config", key, fields)


def _choices() -> dict[str, tuple[str, ...]]:
    """The values each Literal field allows, read from its annotation so that they stand in one place."""
    from typing import get_args, get_origin, get_type_hints

    hints = get_type_hints(ModelConfig)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
