"""What happens at each token: gates, slots, what each path adds, and where its information comes from.

A text of any length is read in windows with the state carried on, so that memory stays bounded. Each window is read together with the one before it, so that
every token finds at least a window of tokens before it by name among its sources; what is older is one figure, ``before``.

Shapes: B = 1 row, T tokens, S slots of all heads, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gam_lm.errors import InputError
from gam_lm.mixers.base import MixerTrace
from gam_lm.model import LanguageModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_HELD = 32
"""Figures of what a memory holds: with more slots than these, each is the length over several neighbours."""

Ranked = list[tuple[int, float]]
"""Indices with their shares, the largest first."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """A read of one memory."""

    entropy_nats: float
    """Of the read address: 0 is one slot, log(slots) all alike."""
    slots: Ranked
    """The slots with the largest shares."""


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """What one layer did at one token."""

    residual: float
    """Length of the residual stream before the layer."""
    added: dict[str, float]
    """Length of what each path of the mixer added to it, and ``feed_forward``."""
    gates: dict[str, float]
    """Mean over the channels of each path's gate."""
    reads: dict[str, Read]
    """By memory."""
    write_gate: float | None = None
    """How strongly the token was written, the mean over the heads."""
    writes: Ranked = field(default_factory=list)
    """The slots that it was written to, with their shares."""
    taps: Ranked = field(default_factory=list)
    """Tokens that the convolution brought, by index, with the share of each in the lengths."""
    sources: Ranked = field(default_factory=list)
    """Tokens whose written values are most of what was read, by index, with the share of each in the lengths; ``before`` and ``bank`` are the rest's."""
    before: float | None = None
    """The share of what was written before the tokens that ``sources`` can name."""
    bank: float | None = None
    """The share of the learned bank."""
    held: list[float] = field(default_factory=list)
    """What the memory holds after the token: how far its slots are from the learned bank, neighbouring slots together, at most ``MOST_HELD`` figures."""


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """What happened at one token."""

    index: int
    """Place in the text."""
    id: int
    """Token id."""
    text: str
    """The token as text; its id without a tokenizer."""
    surprise_nats: float | None
    """Its loss, given the tokens before it; None for the first."""
    predictions: list[tuple[str, float]]
    """The likeliest next tokens with their probabilities."""
    layers: list[LayerTrace]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@torch.no_grad()
def trace(
    model: LanguageModel, ids: Sequence[int], tokenizer: Tokenizer | None = None, *, window: int = 256, top: int = 5, predictions: int = 3
) -> Iterator[TokenTrace]:
    """Yield what happens at each token, in order.

    Args:
        model: any mixer; one that says nothing of itself has its output as its only path.
        ids: the text.
        tokenizer: spells the tokens.
        window: tokens read at once. With learned positions the text is read in pieces as long as those allow, each without what came before.
        top: slots and sources that are named.
        predictions: next tokens that are named.

    Raises:
        InputError: for an empty text or an id outside the vocabulary.
    """
    if not len(ids):
        raise InputError("text is empty: give at least one token")
    was_training = model.training
    model.eval()
    piece = model.config.max_position_embeddings if model.embed_positions is not None else len(ids)
    try:
        for first in range(0, len(ids), piece):
            yield from _piece(model, ids[first : first + piece], first, tokenizer, min(window, piece), top, predictions)
    finally:
        model.train(was_training)


def records(tokens: Iterable[TokenTrace]) -> Iterator[dict[str, Any]]:
    """A flat record for each token and layer: ``pandas.DataFrame(records(trace(model, ids)))``."""
    for token in tokens:
        for number, layer in enumerate(token.layers):
            flat: dict[str, Any] = {"index": token.index, "id": token.id, "text": token.text, "surprise_nats": token.surprise_nats, "layer": number}
            flat["residual"] = layer.residual
            flat |= {f"added_{name}": value for name, value in layer.added.items()} | {f"gate_{name}": value for name, value in layer.gates.items()}
            for name, read in layer.reads.items():
                flat |= {f"{name}_entropy_nats": read.entropy_nats, f"{name}_slots": read.slots}
            yield flat | {
                "write_gate": layer.write_gate, "write_slots": layer.writes, "taps": layer.taps, "sources": layer.sources,
                "before": layer.before, "bank": layer.bank,
            }  # fmt: skip


def _piece(
    model: LanguageModel, ids: Sequence[int], first: int, tokenizer: Tokenizer | None, window: int, top: int, predictions: int
) -> Iterator[TokenTrace]:
    """The traces of one sequence, whose first token has the index ``first``."""
    device = model.embed_tokens.weight.device
    state = None  # before the window that is read for the second time
    for start in range(0, len(ids), window):
        again = max(0, start - window)
        tokens_1T = torch.tensor([list(ids[again : start + window])], device=device)
        new = start - again  # the first token of this call that was not yielded before
        with _watching(model, new, first + again, top) as layers:
            hidden_1TD, _ = model.hidden(tokens_1T, state)
        chances_TV = model.lm_head(hidden_1TD)[0].float().log_softmax(-1)
        surprise_T = -chances_TV[:-1].gather(1, tokens_1T[0, 1:, None])[:, 0]
        best = chances_TV[new:].exp().topk(min(predictions, chances_TV.shape[-1]))
        for i, (some, shares) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
            place = new + i
            token = int(tokens_1T[0, place])
            yield TokenTrace(
                index=first + start + i, id=token, text=spell(tokenizer, token), surprise_nats=float(surprise_T[place - 1]) if place else None,
                predictions=[(spell(tokenizer, each), share) for each, share in zip(some, shares, strict=True)], layers=[layer[i] for layer in layers],
            )  # fmt: skip
        if start:
            _, state = model.hidden(tokens_1T[:, :new], state)


@contextmanager
def _watching(model: LanguageModel, new: int, offset: int, top: int) -> Iterator[list[list[LayerTrace]]]:
    """Fill a list per layer with the traces of the tokens from ``new`` on, while the model runs once; index 0 of the call is token ``offset``."""
    layers: list[list[LayerTrace]] = [[] for _ in model.layers]
    residual_T: dict[int, Tensor] = {}
    handles = []

    def before_block(number: int, inputs: tuple[Any, ...]) -> None:
        residual_T[number] = inputs[0][0].norm(dim=-1)

    def after_mixer(number: int, module: Any, inputs: tuple[Any, ...]) -> None:
        layers[number] = _layer(module.trace(inputs[0], inputs[1]), residual_T[number], new, offset, top)

    def after_mlp(number: int, output: Tensor) -> None:
        for trace, length in zip(layers[number], output[0].norm(dim=-1)[new:].tolist(), strict=True):
            trace.added["feed_forward"] = length

    for i, block in enumerate(model.layers):
        handles.append(block.register_forward_pre_hook(lambda _, inputs, i=i: before_block(i, inputs)))
        handles.append(block.mixer.register_forward_hook(lambda module, inputs, _, i=i: after_mixer(i, module, inputs)))
        if block.mlp is not None:
            handles.append(block.mlp.register_forward_hook(lambda _, __, output, i=i: after_mlp(i, output)))
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _layer(found: MixerTrace, residual_T: Tensor, new: int, offset: int, top: int) -> list[LayerTrace]:
    """The figures of one layer's new tokens."""
    added = {name: path_BTD[0, new:].norm(dim=-1).tolist() for name, path_BTD in found.paths.items()}
    gates = {name: gate_BTD[0, new:].mean(-1).tolist() for name, gate_BTD in found.gates.items()}
    entropy, slots = {}, {}
    for name, share_BTS in found.reads.items():
        entropy[name] = torch.special.entr(share_BTS[0, new:]).sum(-1).tolist()
        slots[name] = _ranked(share_BTS[0, new:], top)
    count = len(residual_T) - new
    writes = _ranked(found.writes_BTS[0, new:], top) if found.writes_BTS is not None else [[]] * count
    taps: list[Ranked] = [[]] * count
    if found.taps_BTK is not None:
        share_TK = found.taps_BTK[0] / found.taps_BTK[0].sum(-1, keepdim=True).clamp(min=1e-30)
        K = share_TK.shape[-1]
        taps = [[(offset + t - K + 1 + k, share) for k, share in enumerate(row) if share > 0] for t, row in enumerate(share_TK.tolist())][new:]
    sources: list[Ranked] = [[]] * count
    before, bank = [None] * count, [None] * count
    if found.sources_BTI is not None and found.carried_BT is not None and found.bank_BT is not None:
        parts_TX = torch.cat([found.sources_BTI[0], found.carried_BT[0, :, None], found.bank_BT[0, :, None]], 1)[new:]
        share_TX = parts_TX / parts_TX.sum(-1, keepdim=True).clamp(min=1e-30)
        sources = [[(offset + i, share) for i, share in row if share > 0] for row in _ranked(share_TX[:, :-2], top)]
        before, bank = share_TX[:, -2].tolist(), share_TX[:, -1].tolist()
    held: list[list[float]] = [[]] * count
    if found.held_BTS is not None:
        several = found.held_BTS[0, new:].tensor_split(min(MOST_HELD, found.held_BTS.shape[-1]), -1)
        held = torch.stack([each.norm(dim=-1) for each in several], -1).tolist()
    write_gate = found.write_gate_BT[0, new:].tolist() if found.write_gate_BT is not None else [None] * count
    return [
        LayerTrace(
            residual=length, added={name: values[i] for name, values in added.items()}, gates={name: values[i] for name, values in gates.items()},
            reads={name: Read(entropy_nats=entropy[name][i], slots=slots[name][i]) for name in entropy},
            write_gate=write_gate[i], writes=writes[i], taps=taps[i], sources=sources[i], before=before[i], bank=bank[i], held=held[i],
        )
        for i, length in enumerate(residual_T[new:].tolist())
    ]  # fmt: skip


def _ranked(share_TX: Tensor, top: int) -> list[Ranked]:
    """The ``top`` largest of each row with their places."""
    best = share_TX.topk(min(top, share_TX.shape[-1]))
    return [list(zip(places, shares, strict=True)) for places, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def spell(tokenizer: Tokenizer | None, token: int) -> str:
    """A token as text; its id where there is no tokenizer."""
    return tokenizer.decode([int(token)], skip_special_tokens=False) if tokenizer is not None else str(int(token))
