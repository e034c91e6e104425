"""Streaming generation: prefill the prompt once, then one token at a time from a state.

For GAM and Mamba the state does not grow, so every token costs the same however long the text is.

Shapes: V = vocab_size.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from gam_lm.data.tokenizer import END_OF_TEXT, ids_of
from gam_lm.errors import InputError
from gam_lm.inference import context
from gam_lm.inference.compiling import decoder, why_not_decoding
from gam_lm.inference.text_stream import text_after
from gam_lm.model import LanguageModel

logger = logging.getLogger("gam_lm")

COLDEST = 1e-4
"""Temperatures below it take the likeliest token, which is their limit: divided by them, logits are no numbers any more."""


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int | None = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: frozenset[int] = frozenset(),
    compiled: bool = False,
) -> Generator[int]:
    """Yield the ids that follow ``prompt``, each as soon as it is drawn.

    Args:
        model: in evaluation mode.
        prompt: at least one id.
        max_new_tokens: where to end; None never ends (learned positions still do, with a logged line).
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens; None from all.
        top_p: draw from the likeliest tokens that together have this probability.
        seed: of the draws; None draws anew each time.
        stop: ids that end the text; they are not yielded.
        compiled: whether the step of one token is compiled first, which takes some seconds and pays for long texts; where it cannot be, the reason is logged.

    Raises:
        InputError: for an empty or too long prompt, or a sampling value out of range.
    """
    _check(model, prompt, max_new_tokens, temperature, top_k, top_p, seed)
    device = model.embed_tokens.weight.device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    limit = model.config.longest
    state = None
    for piece_1P in torch.tensor([list(prompt)], device=device).split(context.PIECE, 1):  # a long prompt costs the memory of one piece of it
        logits_1V, state = context.last_logits(model, piece_1P, state)
    assert state is not None
    reason = why_not_decoding(model) if compiled else None
    if reason is not None:
        logger.warning("not compiled: %s", reason)
    next_logits = decoder(model, state, "compiled" if compiled and reason is None else "eager")
    produced = 0
    while max_new_tokens is None or produced < max_new_tokens:
        token = int(draw(logits_1V[0], temperature, top_k, top_p, generator))
        if token in stop:
            return
        yield token
        produced += 1
        if limit is not None and len(prompt) + produced > limit:
            if max_new_tokens is None or produced < max_new_tokens:
                logger.warning("ended: learned positions end at %d tokens; a model with positions='none' goes on", limit)
            return
        logits_1V = next_logits(torch.tensor([[token]], device=device))[:, -1]


def generate_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, **options: object) -> Iterator[str]:
    """Yield the text that follows ``prompt`` in whole characters; options as for `generate`.

    Ends at <|endoftext|>, which also starts the text where the prompt is empty.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = ids_of(tokenizer, prompt, "prompt") or ([end] if end is not None else [])
    stream = text_after(tokenizer, ids)
    for token in generate(model, ids, stop=frozenset() if end is None else frozenset({end}), **options):  # type: ignore[arg-type]
        if text := stream.step(tokenizer, token):
            yield text


def draw(logits_V: Tensor, temperature: float, top_k: int | None, top_p: float, generator: torch.Generator) -> Tensor:
    """Draw one id from the distribution that the options leave of ``logits_V``."""
    if temperature < COLDEST:
        return logits_V.argmax()
    logits_V = logits_V.float() / temperature
    if top_k is not None and top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        probability_V, order_V = logits_V.softmax(-1).sort(descending=True)
        beyond_V = probability_V.cumsum(-1) - probability_V >= top_p
        beyond_V[0] = False  # the likeliest token always stays, also where top_p is 0 in fp32
        logits_V = logits_V.index_fill(0, order_V[beyond_V], -torch.inf)
    return torch.multinomial(logits_V.softmax(-1), 1, generator=generator)


def _check(
    model: LanguageModel, prompt: Sequence[int], max_new_tokens: int | None, temperature: float, top_k: int | None, top_p: float, seed: int | None
) -> None:
    config = model.config
    if not prompt:
        raise InputError(f"prompt is empty and the tokenizer has no {END_OF_TEXT} to start from: give a prompt of at least one token")
    config.check_length("the prompt's length", len(prompt))
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}: use a whole number of at least 1")
    check_sampling(temperature, top_k, top_p, seed)


def check_sampling(temperature: float, top_k: int | None, top_p: float, seed: int | None) -> None:
    """Raise InputError for a value out of range; their meaning is that of `generate`."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}: use 0 for the likeliest token, or a number above it")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}: use a whole number of at least 1")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}: use a probability above 0, at most 1")
    if seed is not None and not -(2**63) <= seed < 2**63:
        raise InputError(f"seed is {seed}: use a whole number from -2^63 to 2^63 - 1")
