"""Any causal language model of transformers as a baseline: `hf:llama`, `hf:mamba2`, `hf:lfm2`, `hf:qwen3` …

A baseline is described by the library's own ModelConfig with ``mixers=("hf:<model_type>",)``: sizes, vocabulary, tied head and dropout are taken from it, all
else is what the type's own configuration class says. It starts from that type's own random initialisation, under ``initialization="fan_in"`` with a standard
deviation of 1/√hidden_size; no weights are downloaded.

Shapes: B rows, T tokens, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from gam_lm.config import MODEL_TYPE, ModelConfig
from gam_lm.errors import InputError, unknown_name
from gam_lm.hf.baseline_networks import build, count, inner_width_name, on_meta, transformers_config, type_fields
from gam_lm.hf.baseline_sizes import match as match
from gam_lm.model import Block, LanguageModel, State
from gam_lm.presets.models import BASELINE as PREFIX
from gam_lm.presets.models import Fields, on_base

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
        self.check_ids(tokens_BT)
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
    fields = type_fields(kind)
    sizes = {"state_size": fields["state_size"]} if isinstance(fields.get("state_size"), int) else {}
    config = on_base({"mixers": [name], "positions": "none", "options": {name: sizes}}, base)
    if config.intermediate_size is None and (inner := inner_width_name(kind)) is not None:
        width = fields[getattr(CONFIG_MAPPING[kind], "attribute_map", {}).get("hidden_size", "hidden_size")]
        config = config.replace(intermediate_size=8 * max(1, round((fields[inner] or 4 * width) / width * config.hidden_size / 8)))
    longer = config.replace(max_position_embeddings=2 * config.max_position_embeddings)
    return config.replace(positions="learned") if count(longer) != count(config) else config


def backend_name(config: ModelConfig) -> str:
    """What runs: transformers' attention (sdpa, eager …), and for other mixers its own PyTorch code or the kernels that are installed."""
    network = on_meta(config)
    kinds = set(getattr(network.config, "layer_types", None) or ["full_attention"])
    parts = [network.config._attn_implementation] if any("attention" in kind and "linear" not in kind for kind in kinds) else []
    if any("attention" not in kind or "linear" in kind for kind in kinds):
        parts.append("kernels" if any(find_spec(package) for package in KERNELS) else "torch")
    return "-".join(["transformers", *parts])


def state_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of the cache of one sequence after ``context`` tokens, in fp32, as transformers itself fills it."""
    with torch.device("meta"), torch.no_grad():
        outputs = on_meta(config).eval()(input_ids=torch.zeros(1, context, dtype=torch.long), use_cache=True)
    cache = next(outputs[name] for name in ("cache", "past_key_values", "cache_params", "state") if outputs.get(name) is not None)
    return sum(tensor.numel() * 4 for tensor in _tensors(cache) if tensor.is_floating_point())


def period(config: ModelConfig) -> int:
    """Layers after which the kinds of layers repeat: 1, or more for a hybrid."""
    kinds = getattr(transformers_config(config.replace(num_hidden_layers=24)), "layer_types", None) or [""]
    return next(n for n in range(1, len(kinds) + 1) if all(kinds[i] == kinds[i % n] for i in range(len(kinds))))


def columns(config: ModelConfig) -> dict[str, Any]:
    """What a row says of a baseline besides ``model_config``: the version of transformers and the type's own configuration, as far as it is not the default."""
    built, kind = transformers_config(config), config.mixers[0].removeprefix(PREFIX)
    changed = {name: getattr(built, name) for name, default in type_fields(kind).items() if getattr(built, name, default) != default}
    return {"transformers": transformers.__version__, "transformers_config": {"model_type": kind, **changed}}


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
