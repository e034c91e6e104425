"""What each slot of a memory is for: what it stands near, when it is read, and what the model loses without it.

Shapes: T tokens, S slots of all heads, D = hidden_size, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gam_lm.diagnostics.trace import spell
from gam_lm.errors import InputError
from gam_lm.mixers.base import MixerTrace
from gam_lm.model import Block, LanguageModel
from gam_lm.ops.cross_entropy import token_losses

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEAD = 0.01
"""A slot is dead on a text where its mean share of the reads is below this part of an equal share."""


@dataclass(frozen=True, kw_only=True)
class SlotUse:
    """One slot of one memory of one layer, on a text."""

    layer: int
    memory: str
    """static or written."""
    slot: int
    """Its number; a written memory counts through its heads."""
    mean_share: float
    """Its part of the reads, the mean over the tokens. An equal share is 1 / slots."""
    largest_share: float
    """The largest at one token."""
    top_tokens: int
    """Tokens at which no slot had a larger share."""
    dead: bool
    """Whether ``mean_share`` is below a hundredth of an equal share."""
    write_share: float | None
    """Its part of the writes, each token counted as strongly as it wrote; None for a static memory."""
    fires_on: list[tuple[int, str, float]]
    """Where its share was largest: place, token, share."""
    near_address: list[tuple[str, float]]
    """The tokens whose normalised embedding points its way, with the cosine."""
    near_value: list[tuple[str, float]]
    """The tokens towards whose prediction it pushes, with the cosine."""
    removal_nats: float | None
    """How much the mean loss grows when it is taken out; None where that was not measured."""
    removal_half_width: float | None
    """Half the 95 % interval of that, over the tokens."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@torch.no_grad()
def slot_uses(
    model: LanguageModel,
    ids: Sequence[int],
    tokenizer: Tokenizer | None = None,
    *,
    window: int = 256,
    top: int = 5,
    remove: int = 8,
    remove_tokens: int = 2048,
    advance: Callable[[int], None] | None = None,
) -> list[SlotUse]:
    """Look at every slot of a model on a text of any length.

    Args:
        model: one whose mixers have slots.
        ids: the text.
        tokenizer: spells the tokens.
        window: tokens read at once, the state carried on; learned positions start anew at their end.
        top: places and tokens that are named.
        remove: of each memory of each layer, how many of the most read slots are taken out in turn.
        remove_tokens: how much of the text's start the loss without them is measured on.
        advance: called with 1 after each slot taken out.

    Raises:
        InputError: for a text of fewer than two tokens, or a model without slots.
    """
    memories = [(number, name) for number, block in enumerate(model.layers) for name in block.mixer.slots()]
    if not memories:
        raise InputError(f"mixers is {list(model.config.mixers)}, which with these options have no memory slots: inspect a model with a memory")
    if len(ids) < 2:
        raise InputError(f"text has {len(ids)} tokens: give at least two")
    was_training = model.training
    model.eval()
    counts = _count(model, ids, window, top)
    before_T = _losses(model, ids[:remove_tokens], window)
    embedding_VD = model.embed_tokens.weight
    found = []
    for number, name in memories:
        block, seen = model.layers[number], counts[number, name]
        slots = block.mixer.slots()[name]
        listens_VD = embedding_VD if block.mixer_norm is None else block.mixer_norm(embedding_VD)
        near_address, near_value = _nearest(slots.address_SD, listens_VD, top), _nearest(slots.value_SD, model.lm_head.weight, top)
        mean_S = seen.total_S / len(ids)
        removed = dict.fromkeys(mean_S.argsort(descending=True)[:remove].tolist(), (0.0, 0.0))
        for slot in removed:
            removed[slot] = _without(model, block, name, slot, ids[:remove_tokens], window, before_T)
            if advance is not None:
                advance(1)
        for slot, share in enumerate(mean_S.tolist()):
            nats, half_width = removed.get(slot, (None, None))
            found.append(SlotUse(
                layer=number, memory=name, slot=slot, mean_share=share, largest_share=float(seen.best_SX[slot, 0]), top_tokens=int(seen.tops_S[slot]),
                dead=share < DEAD / len(mean_S), write_share=None if seen.written_S is None else float(seen.written_S[slot] / seen.written_S.sum().clamp(min=1e-30)),
                fires_on=[
                    (place, spell(tokenizer, ids[place]), value)
                    for place, value in zip(seen.places_SX[slot].tolist(), seen.best_SX[slot].tolist(), strict=True) if value > 0
                ],
                near_address=[(spell(tokenizer, token), value) for token, value in near_address[slot]],
                near_value=[(spell(tokenizer, token), value) for token, value in near_value[slot]],
                removal_nats=nats, removal_half_width=half_width,
            ))  # fmt: skip
    model.train(was_training)
    return found


class _Seen:
    """What is counted of one memory while the text runs through."""

    def __init__(self, slots: int, top: int, device: torch.device) -> None:
        self.total_S = torch.zeros(slots, dtype=torch.float64, device=device)
        self.tops_S = torch.zeros(slots, dtype=torch.long, device=device)
        self.written_S: Tensor | None = None
        self.best_SX = torch.zeros(slots, top, dtype=torch.float64, device=device)
        self.places_SX = torch.zeros(slots, top, dtype=torch.long, device=device)

    def add(self, share_TS: Tensor, writes_TS: Tensor | None, first: int) -> None:
        """Count tokens, of which the first has the place ``first``."""
        share_TS = share_TS.double()
        self.total_S += share_TS.sum(0)
        self.tops_S += torch.bincount(share_TS.argmax(-1), minlength=len(self.tops_S))
        if writes_TS is not None:
            self.written_S = writes_TS.double().sum(0) + (0 if self.written_S is None else self.written_S)
        place_ST = torch.arange(first, first + len(share_TS), device=share_TS.device).expand(share_TS.shape[1], -1)
        best_SY, place_SY = torch.cat([self.best_SX, share_TS.T], 1), torch.cat([self.places_SX, place_ST], 1)
        best_SY, order_SY = best_SY.sort(descending=True, stable=True)  # of equal shares the first one stays
        top = self.best_SX.shape[1]
        self.best_SX, self.places_SX = best_SY[:, :top], place_SY.gather(1, order_SY[:, :top])


def _count(model: LanguageModel, ids: Sequence[int], window: int, top: int) -> dict[tuple[int, str], _Seen]:
    counts = {
        (number, name): _Seen(len(slots.address_SD), top, slots.address_SD.device)
        for number, block in enumerate(model.layers) for name, slots in block.mixer.slots().items()
    }  # fmt: skip
    place = 0

    def add(number: int, found: MixerTrace) -> None:
        writes_TS = None if found.writes_BTS is None or found.write_gate_BT is None else found.writes_BTS[0] * found.write_gate_BT[0, :, None]
        for name, share_BTS in found.reads.items():
            counts[number, name].add(share_BTS[0], writes_TS if name == "written" else None, place)

    with _traced(model, add):
        for tokens_1T, _ in _windows(model, ids, window):
            place += tokens_1T.shape[1]
    return counts


def _windows(model: LanguageModel, ids: Sequence[int], window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the model over a text with its state carried on; yields each window's tokens and hidden vectors after the window has run."""
    piece = model.config.max_position_embeddings if model.embed_positions is not None else len(ids)
    for first in range(0, len(ids), piece):
        state = None
        for start in range(first, min(first + piece, len(ids)), window):
            part = ids[start : min(start + window, first + piece)]
            tokens_1T = torch.tensor([list(part)], device=model.embed_tokens.weight.device)
            hidden_1TD, state = model.hidden(tokens_1T, state)
            yield tokens_1T, hidden_1TD


@contextmanager
def _traced(model: LanguageModel, add: Callable[[int, MixerTrace], None]) -> Iterator[None]:
    """Call ``add`` with each layer's number and trace whenever the model runs."""
    handles = [
        block.mixer.register_forward_hook(lambda module, inputs, _, i=i: add(i, module.trace(inputs[0], inputs[1]))) for i, block in enumerate(model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _losses(model: LanguageModel, ids: Sequence[int], window: int) -> np.ndarray[Any, Any]:
    """The loss of every token but the first."""
    targets = [*ids[1:], -100]
    losses, place = [], 0
    for tokens_1T, hidden_1TD in _windows(model, ids, window):
        wanted_T = torch.tensor(targets[place : place + tokens_1T.shape[1]], device=tokens_1T.device)
        losses.append(token_losses(hidden_1TD[0], model.lm_head.weight, wanted_T).double().cpu().numpy())
        place += tokens_1T.shape[1]
    return np.concatenate(losses)[:-1]


def _without(
    model: LanguageModel, block: Block, memory: str, slot: int, ids: Sequence[int], window: int, before_T: np.ndarray[Any, Any]
) -> tuple[float, float]:
    """How much the mean loss grows without a slot, and half its 95 % interval over the tokens."""
    block.mixer.silence(memory, slot)
    try:
        difference_T = _losses(model, ids, window) - before_T
    finally:
        block.mixer.silence(memory, None)
    return float(difference_T.mean()), float(1.96 * difference_T.std(ddof=1) / len(difference_T) ** 0.5) if len(difference_T) > 1 else 0.0


def _nearest(query_SD: Tensor, table_VD: Tensor, top: int) -> list[list[tuple[int, float]]]:
    """The rows of a table with the largest cosine to each query."""
    cosine_SV = F.normalize(query_SD, dim=-1) @ F.normalize(table_VD, dim=-1).T
    best = cosine_SV.topk(min(top, table_VD.shape[0]))
    return [list(zip(tokens, values, strict=True)) for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
