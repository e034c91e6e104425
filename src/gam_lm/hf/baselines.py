"""Any causal language model of transformers as a baseline: `hf:llama`, `hf:mamba2`, `hf:lfm2`, `hf:qwen3` …

A baseline is described by the library's own ModelConfig with ``mixers=("hf:<model_type>",)``: sizes, vocabulary, tied head and dropout are taken from it, all
else is what the type's own configuration class says. It starts from that type's own random start values, under ``initialization="fan_in"`` with a standard
deviation of 1/√hidden_size; no weights are downloaded.

Shapes: B rows, T tokens, D = hidden_size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from gam_lm.config import MODEL_TYPE, ModelConfig
from gam_lm.errors import InputError, unknown_name
from gam_lm.hf.baseline_options import BaselineOptions
from gam_lm.model import Block, LanguageModel, State
from gam_lm.presets.models import BASELINE as PREFIX
from gam_lm.presets.models import Fields, changed, on_base

CLOSE_ENOUGH = 0.01
"""A baseline has the wanted number of parameters to within this share."""
KERNELS = ("mamba_ssm", "causal_conv1d", "fla")
"""Packages whose kernels transformers takes where they are installed."""


class Baseline(LanguageModel):
    """A model of transformers behind the calls that training and evaluation make: ``model(tokens, targets)``, ``hidden``, ``lm_head``.

    Raises InputError where the type does not build at this size, or its logits are more than one matrix times the last hidden vector.
    """

    layers: Sequence[Block] = ()

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # the parts of LanguageModel are those of ``network``
        self.config = config
        self.network = build(config)
        self._check_head()

    @property
    def embed_tokens(self) -> nn.Embedding:  # type: ignore[override]
        """The token embedding."""
        return self.network.get_input_embeddings()

    @property
    def lm_head(self) -> nn.Linear:  # type: ignore[override]
        """The output head."""
        return self.network.get_output_embeddings()

    def hidden(self, tokens_BT: Tensor, state: State | None = None, segments_BT: Tensor | None = None) -> tuple[Tensor, State]:
        """What the output head reads (B, T, D), and a state that holds nothing but the number of tokens.

        Raises InputError for a state to go on from, or segments.
        """
        if segments_BT is not None or state is not None:
            raise InputError(f"model is {self.config.mixers[0]!r}: a baseline takes whole sequences, without segments or a state to go on from")
        self._check_ids(tokens_BT)
        h_BTD = self.network.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        B, T = tokens_BT.shape
        return h_BTD, State(torch.full((B,), T, device=tokens_BT.device), ())

    def write_to(self, directory: Path, token_ids: Mapping[str, int]) -> None:
        """Write config.json and model.safetensors as transformers reads them, with the ids of the special tokens."""
        disable_progress_bar()
        self.network.config.update(dict(token_ids))
        self.network.save_pretrained(directory)

    @torch.no_grad()
    def _check_head(self) -> None:
        """The loss multiplies by the head's weight chunk by chunk; a bias, a scale or a cap of the logits would be lost."""
        if self.embed_tokens.weight.is_meta:
            return
        training = self.training
        self.eval()
        tokens = torch.arange(4).remainder(self.config.vocab_size)[None]
        logits = self.network(input_ids=tokens, use_cache=False).logits
        same = torch.allclose(logits, self.hidden(tokens)[0] @ self.lm_head.weight.T, rtol=1e-3, atol=1e-4)
        self.train(training)
        if not same or getattr(self.lm_head, "bias", None) is not None:
            raise InputError(f"model {self.config.mixers[0]!r} has more to its logits than one matrix (a bias, scale or cap): use another type")


class BaselineBlock(nn.Module):
    """The layers of a baseline between embedding and head, called as a Block is: ``(x_BTD, state, segments_BT) -> (y_BTD, state)``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.body = build(config.replace(vocab_size=1)).base_model
        self.body.set_input_embeddings(nn.Identity())

    def forward(self, x_BTD: Tensor, state: None = None, segments_BT: None = None) -> tuple[Tensor, None]:
        """All layers and the last norm, for x that is embedded already."""
        return self.body(inputs_embeds=x_BTD, use_cache=False).last_hidden_state, None


def describe(name: str, base: Fields) -> ModelConfig:
    """The baseline ``hf:<model_type>`` at the width, depth and vocabulary of ``base``.

    Raises:
        InputError: for a type that transformers does not have as a causal language model, or that does not build at these sizes.
    """
    kind = name.removeprefix(PREFIX)
    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {MODEL_TYPE})
    if kind not in known:
        raise unknown_name("model type of transformers", kind, known)
    fields = _fields(kind)
    sizes = {"state_size": fields["state_size"]} if isinstance(fields.get("state_size"), int) else {}
    config = on_base({"mixers": [name], "positions": "none", "options": {name: sizes}}, base)
    if config.intermediate_size is None and (inner := _name_of_inner_width(kind)) is not None:
        width = fields[getattr(CONFIG_MAPPING[kind], "attribute_map", {}).get("hidden_size", "hidden_size")]
        config = config.replace(intermediate_size=8 * max(1, round((fields[inner] or 4 * width) / width * config.hidden_size / 8)))
    longer = config.replace(max_position_embeddings=2 * config.max_position_embeddings)
    return config.replace(positions="learned") if count(longer) != count(config) else config


def match(config: ModelConfig, target: int, *, only_inner: bool = False) -> ModelConfig:
    """``config`` with ``target`` parameters to within 1 %.

    The width of the feed-forward network is changed, or the states of a state space; where that is not enough the depth too, then the width.
    With ``only_inner`` nothing but the feed-forward network, and its nearest size is taken.

    Raises:
        InputError: where no size comes near enough.
    """
    if only_inner:
        return next(_solved(config, "intermediate_size", 8, target), config)
    for each in _sizes(config, target):
        if abs(count(each) - target) <= CLOSE_ENOUGH * target:
            return each
    raise InputError(f"model {config.mixers[0]!r} finds no size near {target:,} parameters: change the architecture's hidden_size or num_hidden_layers")


def count(config: ModelConfig) -> int:
    """Parameters, the shared weight counted once, without allocating them."""
    return _counted(config.replace(dropout=0.0))


def backend_name(config: ModelConfig) -> str:
    """What runs: transformers' attention (sdpa, eager …), and for other mixers its own PyTorch code or the kernels that are installed."""
    network = _on_meta(config)
    kinds = set(getattr(network.config, "layer_types", None) or ["full_attention"])
    parts = [network.config._attn_implementation] if any("attention" in kind and "linear" not in kind for kind in kinds) else []
    if any("attention" not in kind or "linear" in kind for kind in kinds):
        parts.append("kernels" if any(find_spec(package) for package in KERNELS) else "torch")
    return "-".join(["transformers", *parts])


def state_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of the cache of one sequence after ``context`` tokens, in fp32, as transformers itself fills it."""
    with torch.device("meta"), torch.no_grad():
        outputs = _on_meta(config).eval()(input_ids=torch.zeros(1, context, dtype=torch.long), use_cache=True)
    cache = next(outputs[name] for name in ("cache", "past_key_values", "cache_params", "state") if outputs.get(name) is not None)
    return sum(tensor.numel() * 4 for tensor in _tensors(cache) if tensor.is_floating_point())


def period(config: ModelConfig) -> int:
    """Layers after which the kinds of layers repeat: 1, or more for a hybrid."""
    kinds = getattr(transformers_config(config.replace(num_hidden_layers=24)), "layer_types", None) or [""]
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def columns(config: ModelConfig) -> dict[str, Any]:
    """What a row says of a baseline besides ``model_config``: the version of transformers and the type's own configuration, as far as it is not the default."""
    built, kind = transformers_config(config), config.mixers[0].removeprefix(PREFIX)
    changed = {name: getattr(built, name) for name, default in _fields(kind).items() if getattr(built, name, default) != default}
    return {"transformers": transformers.__version__, "transformers_config": {"model_type": kind, **changed}}


def build(config: ModelConfig) -> Any:
    """The network with its own start values, drawn from torch's global generator. Raises InputError where it does not build at this size."""
    described = transformers_config(config)
    try:
        return AutoModelForCausalLM.from_config(described, dtype=torch.get_default_dtype())
    except (ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise _does_not_build(config, error) from error


def transformers_config(config: ModelConfig) -> Any:
    """The configuration of the type: its own defaults, but for what ``config`` says.

    Raises:
        InputError: where the type does not allow it.
    """
    kind = config.mixers[0].removeprefix(PREFIX)
    fields, names = _fields(kind), getattr(CONFIG_MAPPING[kind], "attribute_map", {})
    options = config.options_of(BaselineOptions)
    heads = options.num_heads or 1
    wanted: dict[str, Any] = {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
        str(_name_of_inner_width(kind)): config.intermediate_size, "num_attention_heads": heads, "head_dim": config.hidden_size // heads,
        "max_position_embeddings": config.max_position_embeddings, "state_size": options.state_size, "chunk_size": options.chunk_size,
        "tie_word_embeddings": config.tie_word_embeddings, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
        "final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0,
    }  # fmt: skip
    if config.initialization == "fan_in":  # one number for all matrices: exact for those that the stream enters, and for the embedding
        wanted["initializer_range"] = config.hidden_size**-0.5
    if fields.get("num_key_value_heads"):
        wanted["num_key_value_heads"] = max(1, heads * fields["num_key_value_heads"] // fields["num_attention_heads"])
    for name in fields:
        if "dropout" in name or name.endswith("pdrop"):
            wanted[name] = 0.0 if name.startswith(("attention", "attn")) else config.dropout
    wanted |= OWN_SIZES.get(kind, lambda _: {})(config)
    try:
        return CONFIG_MAPPING[kind](**{names.get(name, name): value for name, value in wanted.items() if names.get(name, name) in fields})
    except Exception as error:  # huggingface_hub's strict dataclasses have errors of their own
        raise _does_not_build(config, error) from error


def _mamba2(config: ModelConfig) -> dict[str, Any]:
    """Heads of 64 channels as published, or at least two."""
    channels = 2 * config.hidden_size
    heads = max(2, channels // 64)
    while channels % heads:
        heads -= 1
    return {"num_heads": heads, "head_dim": channels // heads, "n_groups": 1}


def _lfm2(config: ModelConfig) -> dict[str, Any]:
    """Two convolutions to one attention, about as in the published models; below three layers the last one is attention."""
    layers = config.num_hidden_layers
    return {"full_attn_idxs": list(range(2, layers, 3)) or [layers - 1], "block_auto_adjust_ff_dim": False}


def _qwen3_next(config: ModelConfig) -> dict[str, Any]:
    """Gated delta rule and attention three to one, dense instead of 512 experts, heads as narrow as those of attention."""
    heads = config.options_of(BaselineOptions).num_heads or 1
    width = config.hidden_size // heads
    return {
        "num_experts": 0, "linear_num_key_heads": heads, "linear_num_value_heads": heads, "linear_key_head_dim": width, "linear_value_head_dim": width,
    }  # fmt: skip


OWN_SIZES: Mapping[str, Callable[[ModelConfig], dict[str, Any]]] = {"mamba2": _mamba2, "lfm2": _lfm2, "qwen3_next": _qwen3_next}
"""Sizes that follow from the width in another way than through fields of the same name."""


def _sizes(config: ModelConfig, target: int) -> Iterator[ModelConfig]:
    """Sizes to try, the least changed first."""
    yield config
    depths = sorted(range(1, 3 * config.num_hidden_layers + 1), key=lambda n: abs(n - config.num_hidden_layers))
    deep = [config.replace(num_hidden_layers=n) for n in depths]
    for step in (8, 1):  # multiples of 8 suit every matrix unit
        yield from (each for one in deep for each in _solved(one, "intermediate_size", step, target))
    spaces = [each for one in deep for each in _solved(one, "state_size", 1, target)]
    states, heads = config.options_of(BaselineOptions).state_size, config.options_of(BaselineOptions).num_heads or 1
    yield from sorted(spaces, key=lambda each: abs(math.log(each.options_of(BaselineOptions).state_size / states)))
    for one in deep:
        for wide in _solved(one, "hidden_size", 8 * heads, target):
            yield wide
            yield from _solved(wide, "intermediate_size", 8, target)


def _solved(config: ModelConfig, field: str, step: int, target: int) -> Iterator[ModelConfig]:
    """``field`` changed so that the count, taken as linear, meets the target; nothing where it would be out of proportion or changes nothing."""
    size, width = config.to_dict().get(field) or getattr(config.options_of(BaselineOptions), field, None), config.hidden_size
    if size is None:
        return
    slope = count(changed(config, {field: size + step})) - count(config)
    solved = size + step * round((target - count(config)) / slope) if slope else 0
    least, most = {"intermediate_size": (width // 2, 16 * width), "state_size": (4, 3 * size), "hidden_size": (step, 8 * size)}[field]
    if least <= solved <= most:
        yield changed(config, {field: solved})


@lru_cache(maxsize=4096)
def _counted(config: ModelConfig) -> int:
    return sum(parameter.numel() for parameter in _on_meta(config).parameters())


def _on_meta(config: ModelConfig) -> Any:
    with torch.device("meta"):
        return build(config)


@lru_cache
def _fields(kind: str) -> dict[str, Any]:
    """The fields of a type's configuration with their defaults."""
    default = CONFIG_MAPPING[kind]()
    return {field.name: getattr(default, field.name, None) for field in dataclasses.fields(default)}


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors within a cache."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _name_of_inner_width(kind: str) -> str | None:
    """What a type calls the width of its feed-forward network; None where it has no such field."""
    return next((name for name in ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") if name in _fields(kind)), None)


def _does_not_build(config: ModelConfig, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"model {config.mixers[0]!r} does not build at hidden_size={config.hidden_size}, num_heads={config.options_of(BaselineOptions).num_heads}: {reason}"
    )
