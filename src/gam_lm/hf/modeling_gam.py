"""The adapter to transformers: the parts, the loss and the state are those of gam_lm.model; here is only what generate(), Trainer and PEFT ask for.

Both are named alike, so that a run directory is a model directory: ``model.embed_tokens``, ``model.layers.{i}``, ``model.norm``, ``lm_head``.

Shapes: B rows, T tokens, S tokens with those of the cache, D = hidden_size, V = vocab_size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from gam_lm.errors import InputError
from gam_lm.hf.cache import GAMCache
from gam_lm.hf.card import push_run
from gam_lm.hf.configuration_gam import GAMConfig
from gam_lm.inference.int8 import METHOD, is_int8
from gam_lm.model import Backbone, Block, LanguageModel
from gam_lm.ops.cross_entropy import IGNORE, cross_entropy, linear_cross_entropy

CACHE = "cache" if "cache" in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)} else "past_key_values"
"""What transformers calls the cache: ``cache`` from 5.24 on."""

INT8 = "{} is int8, which transformers does not run: use the run directory that it was made from, or gam_lm.load_model"


class GAMPreTrainedModel(PreTrainedModel):
    """What both classes tell transformers about themselves."""

    config_class = GAMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _can_record_outputs = {"hidden_states": Block}  # noqa: RUF012
    _is_stateful = False  # the cache can take tokens back, see GAMCache.crop

    def __init__(self, config: GAMConfig) -> None:
        quantized = getattr(config, "quantization_config", None)
        if isinstance(quantized, dict) and quantized.get("quant_method") == METHOD:  # from_pretrained would leave its integers and draw new weights
            raise InputError(INT8.format(config.name_or_path or "the model"))
        super().__init__(config)

    def post_init(self) -> None:
        """What transformers does when a model has been built. Called again, as on a model that was loaded, it keeps the weights that are there."""
        self._built: bool = self.__dict__.get("_post_init_done", False)
        super().post_init()
        self._post_init_done, self._built = True, False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of a part that a checkpoint lacks; a whole model draws them as the library does."""
        missing = any(not getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters(recurse=False))
        draw: Callable[[], None] | None = getattr(module, "init_weights", None)
        if missing and draw is not None and not isinstance(module, PreTrainedModel):
            draw()
        else:
            super()._init_weights(module)


class GAMModel(GAMPreTrainedModel, Backbone):
    """The model without its output head."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: GAMConfig) -> None:
        super().__init__(config)
        self.build(config.to_model_config())
        self.post_init()

    def init_weights(self) -> None:
        """Draw the initial values from torch's global generator."""
        if not self._built and not self.embed_tokens.weight.is_meta:
            self.draw_initial_values(None)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: GAMCache | None = None,
        past_key_values: GAMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: the next ids (B, T).
            attention_mask: 0 where a token is padding, on either side, over the new tokens (B, T) or over all so far (B, S).
            position_ids: only tell where a row starts a new sequence, at each 0 (B, T); the state counts the positions itself.
            cache: of the tokens before; its name up to transformers 5.23 is ``past_key_values``.
            past_key_values: see ``cache``.
            inputs_embeds: the next tokens, embedded (B, T, D), instead of ``input_ids``.
            use_cache: whether a cache is wanted where none is given; by default outside of training.
            seq_idx: the number of its sequence for every token (B, T), as DataCollatorWithFlattening gives it: another way to say where a sequence starts.
            cu_seq_lens_q: where the sequences of a single packed row start, and its length (sequences + 1,); the same once more.
            cu_seq_lens_k: must equal ``cu_seq_lens_q``.

        Raises:
            InputError: for packed sequences that do not fit the tokens, a mask that does not fit them, a cache of another kind, both or none of ids
                and embeddings, or what LanguageModel refuses.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise InputError("input_ids and inputs_embeds are both given or both missing: give one of them")
        config: Any = self.config
        cache = past_key_values if cache is None else cache
        if cache is None and (config.use_cache and not self.training if use_cache is None else use_cache):
            cache = GAMCache()
        if cache is not None and not isinstance(cache, GAMCache):
            raise InputError(f"cache is a {type(cache).__name__}: a GAM model keeps its state in a gam_lm.hf.GAMCache")
        if input_ids is not None:
            self.check_ids(input_ids)
            x_BTD = self.embed_tokens(input_ids)
        else:
            x_BTD = inputs_embeds
        B, T, _ = x_BTD.shape
        starts_BT = starts_of(position_ids, seq_idx, cu_seq_lens_q, cu_seq_lens_k, B, T)
        segments_BT = segments_of(attention_mask, starts_BT, B, T, cache.get_seq_length() if cache is not None else 0, x_BTD.device)
        if cache is not None:
            h_BTD = cache.advance(self.mix, x_BTD, segments_BT)
        else:
            recompute = self._gradient_checkpointing_func if self.gradient_checkpointing and self.training else None
            h_BTD, _state = self.mix(x_BTD, None, segments_BT, recompute=recompute)
        return BaseModelOutputWithPast(last_hidden_state=h_BTD, **{CACHE: cache})


class GAMForCausalLM(GAMPreTrainedModel, GenerationMixin):
    """A causal language model: `gam_lm.model.LanguageModel` in the shape that transformers works with."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    accepts_loss_kwargs = True

    def __init__(self, config: GAMConfig) -> None:
        super().__init__(config)
        self.model = GAMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_language_model(cls, model: LanguageModel) -> GAMForCausalLM:
        """The same model for transformers; the weights are shared, not copied. Raises InputError for an int8 model."""
        if is_int8(model):
            raise InputError(INT8.format("the model"))
        with torch.device("meta"):
            wrapped = cls(GAMConfig(**model.config.to_dict(), architectures=[cls.__name__]))
        wrapped.config.dtype = model.embed_tokens.weight.dtype
        tensors = {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in model.state_dict(keep_vars=True).items()}
        wrapped.load_state_dict(tensors, assign=True)
        wrapped.tie_weights()
        return wrapped.train(model.training)

    def to_language_model(self) -> LanguageModel:
        """The same model for the library; the weights are shared, not copied."""
        with torch.device("meta"):
            model = LanguageModel(self.config.to_model_config())
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in self.state_dict(keep_vars=True).items()}, assign=True)
        if self.config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model.train(self.training)

    def init_weights(self) -> None:
        """Draw the initial values from torch's global generator."""
        self.tie_weights()
        if not self._built and not self.lm_head.weight.is_meta:
            self.model.draw_initial_values(self.lm_head)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: GAMCache | None = None,
        past_key_values: GAMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_logits: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where labels are given; see `GAMModel.forward` for the other arguments.

        Args:
            labels: the ids themselves (B, T), −100 where a token is not predicted: the shift by one is done here.
            logits_to_keep: the last so many places that get logits, 0 for all, or their indices; with labels, all count for the loss.
            num_items_in_batch: counted targets of the whole optimiser step, by which the sum is divided; None takes the mean of this call.
            return_logits: False spares the (B, T, V) logits of training, which are then never held whole.
            kwargs: also ``shift_labels``, the id that follows each token, instead of ``labels``. (Trainer takes every argument
                with "label" in its name for one that each batch must have.)
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids, attention_mask, position_ids, cache, past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs
        )
        h_BTD = outputs.last_hidden_state
        targets = shift_labels if shift_labels is not None or labels is None else F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h_BTD[:, kept]) if return_logits else None
        loss = None
        if targets is not None:
            target_N = targets.flatten().to(h_BTD.device)
            if logits is not None and logits.shape[1] == h_BTD.shape[1]:
                loss = cross_entropy(logits.flatten(0, 1), target_N)
            else:
                loss = linear_cross_entropy(h_BTD.flatten(0, 1), self.lm_head.weight, target_N)
            if num_items_in_batch is not None:
                loss = loss * (target_N != IGNORE).sum() / num_items_in_batch
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: getattr(outputs, CACHE)}
        )  # fmt: skip

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """One cache serves every implementation that can be asked for: the state is what it is."""
        if model_kwargs.get(CACHE) is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = GAMCache()
            if generation_config.is_assistant:
                model_kwargs[CACHE].activate_past_recording()

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model with its run's records and a model card filled from them; see `gam_lm.hf.card.push_run`."""
        return push_run(self, repo_id, **options)


def starts_of(
    position_ids: Tensor | None, seq_idx: Tensor | None, cu_seq_lens_q: Tensor | None, cu_seq_lens_k: Tensor | None, B: int, T: int
) -> Tensor | None:
    """Where a token of the call, the first aside, starts a sequence (rows, T − 1): where any of what transformers passes says so; None where nothing does.

    Raises:
        InputError: for what does not fit B rows of T tokens.
    """
    found: list[Tensor] = []
    if position_ids is not None:
        found.append(position_ids[:, 1:] == 0)
    if seq_idx is not None:
        if seq_idx.shape != (B, T):
            raise InputError(f"seq_idx has the shape {tuple(seq_idx.shape)}: use ({B}, {T}), the number of its sequence for every token")
        found.append(seq_idx[:, 1:] != seq_idx[:, :-1])
    if cu_seq_lens_k is not None and (cu_seq_lens_q is None or not torch.equal(cu_seq_lens_q, cu_seq_lens_k)):
        raise InputError("cu_seq_lens_k differs from cu_seq_lens_q: a causal model reads what it predicts from, give the same")
    if cu_seq_lens_q is not None:
        bounds = cu_seq_lens_q.tolist() if cu_seq_lens_q.dim() == 1 else []
        if B != 1 or len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != T or sorted(bounds) != bounds:
            raise InputError(f"cu_seq_lens_q is {str(bounds)[:60]} for {B} rows of {T} tokens: use one row, and numbers that rise from 0 to its length")
        starts_T = torch.zeros(T + 1, dtype=torch.bool, device=cu_seq_lens_q.device)
        starts_T[cu_seq_lens_q.long()] = True
        found.append(starts_T[None, 1:T])
    if T < 2 or not found:
        return None
    starts_BT = found[0]
    for each in found[1:]:
        starts_BT = starts_BT | each.to(starts_BT.device)
    return starts_BT


def segments_of(attention_mask: Tensor | None, starts_BT: Tensor | None, B: int, T: int, past: int, device: torch.device) -> Tensor | None:
    """What the mixers need to know of the new tokens: None for one sequence without padding, else segments (B, T) as in gam_lm.ops.segments.

    Raises:
        InputError: for a mask that fits neither B rows of T tokens nor these behind ``past`` earlier ones.
    """
    segments_BT = None
    if attention_mask is not None:
        if tuple(attention_mask.shape) not in {(B, T), (B, past + T)}:
            also = f" or, with the tokens of the cache, ({B}, {past + T})" if past else ""
            raise InputError(f"attention_mask has the shape {tuple(attention_mask.shape)}: use ({B}, {T}){also}, 0 at padding")
        mask_BT = attention_mask[:, -T:].to(device)
        if not bool(mask_BT.all()):
            segments_BT = (mask_BT != 0).long()
    if starts_BT is not None:
        starts_BT = starts_BT.to(device)
        if segments_BT is not None:  # transformers gives padding the position 0
            starts_BT = starts_BT & (segments_BT[:, :-1] != 0)
        if bool(starts_BT.any()):
            number_BT = F.pad(starts_BT.long().cumsum(1), (1, 0)) + 1
            segments_BT = number_BT if segments_BT is None else segments_BT * number_BT.expand_as(segments_BT)
    return segments_BT
