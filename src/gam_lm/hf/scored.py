"""What lm-evaluation-harness asks for a log-likelihood: a model, in batches of equal length and size, or counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer
from torch import Tensor

from gam_lm.data.tokenizer import END_OF_TEXT
from gam_lm.errors import InputError
from gam_lm.runtime.progress import progress

Request = tuple[Any, list[int], list[int]]
"""The texts, the ids of the context, and the ids that are to be scored."""

Answer = tuple[float, bool]
"""The log-likelihood in nats, and whether each id was the likeliest."""

CACHED = 2**18
"""Logits that the softmax works on at once: they stay in a core's cache."""


TOKENS_ON_A_CPU = 1024
"""The most tokens of a batch on a CPU, longer texts aside: more leave its caches and take longer."""


class ScoredModel(HFLM):
    """The harness's model of transformers. Its batches hold a number of tokens, not of requests: a short sentence costs no more than its length."""

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None) -> list[Answer]:
        pieces = [(number, piece) for number, request in enumerate(requests) for piece in self._pieces(request)]
        totals, likeliest = [0.0] * len(requests), [True] * len(requests)
        tokens = int(self.batch_size) * self.max_length
        if self.device.type == "cpu":
            tokens = min(tokens, TOKENS_ON_A_CPU)
        with progress("log-likelihoods", len(pieces), "texts") as bar:
            for places in batches([self._read(piece) for _, piece in pieces], tokens):
                some = [pieces[place] for place in places]
                for (number, _), (nats, is_likeliest) in zip(some, self._answers([piece for _, piece in some]), strict=True):
                    totals[number] += nats
                    likeliest[number] &= is_likeliest
                bar.advance(len(places))
        return list(zip(totals, likeliest, strict=True))

    def _pieces(self, request: Request) -> Iterator[Request]:
        """The request, or where its continuation is longer than the context, parts of half a context, each after the tokens before it."""
        texts, context, continuation = request
        if len(continuation) <= self.max_length:
            yield request
            return
        step = max(1, self.max_length // 2)
        for start in range(0, len(continuation), step):
            yield texts, context + continuation[:start], continuation[start : start + step]

    def _read(self, request: Request) -> int:
        """Ids that the model reads of a request: all but the last, and no more than fit."""
        return min(len(request[1]) + len(request[2]) - 1, self.max_length)

    def _answers(self, requests: Sequence[Request]) -> Iterator[Answer]:
        longest = max(map(self._read, requests))
        tokens_BT = torch.zeros(len(requests), longest, dtype=torch.long)
        wanted: list[Tensor] = []
        for row, (_, context, continuation) in zip(tokens_BT, requests, strict=True):
            ids = torch.tensor((context + continuation)[-(self.max_length + 1) :])
            row[: len(ids) - 1] = ids[:-1]  # padded on the right, which no token before it sees
            wanted.append(ids[max(1, len(ids) - len(continuation)) :])
        sizes = [len(ids) for ids in wanted]
        ends = [row * longest + self._read(request) for row, request in enumerate(requests)]
        place_N = torch.cat([torch.arange(end - size, end) for end, size in zip(ends, sizes, strict=True)])
        logits_BTV = self._model_call(tokens_BT.to(self.device))
        nats_N, likeliest_N = (found.cpu() for found in score(logits_BTV.flatten(0, 1), place_N.to(self.device), torch.cat(wanted).to(self.device)))
        for nats, likeliest in zip(nats_N.split(sizes), likeliest_N.split(sizes), strict=True):
            yield -float(nats.sum()), bool(likeliest.all())


class Chances(Protocol):
    """A bigram's probabilities, as counts give them."""

    def log_probabilities(self, before_N: np.ndarray, after_N: np.ndarray) -> np.ndarray:
        """log p(after | before) in nats."""
        ...

    def likeliest(self, before: int) -> int:
        """The id that follows ``before`` most probably."""
        ...


class ScoredCounts(TemplateLM):
    """Counts as a model of the harness: they score what a model scores, token by token, after the same end of a text."""

    def __init__(self, chances: Chances, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._end_of_text: int | None = tokenizer.token_to_id(END_OF_TEXT)
        if self._end_of_text is None:
            raise InputError(f"the tokenizer has no {END_OF_TEXT}, after which a text begins: leave --data out, which leaves the floors out")
        self._chances = chances
        self._likeliest = lru_cache(maxsize=None)(chances.likeliest)

    @property
    def eot_token_id(self) -> int:
        """The id before the first word of a text."""
        assert self._end_of_text is not None
        return self._end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text."""
        return list(self._tokenizer.encode(string, add_special_tokens=False).ids)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[Answer]:
        before = np.concatenate([(context + continuation)[len(context) - 1 : -1] for _, context, continuation in requests])
        after = np.concatenate([continuation for _, _, continuation in requests])
        starts = np.cumsum([0, *(len(continuation) for _, _, continuation in requests)])[:-1]
        sums = np.add.reduceat(self._chances.log_probabilities(before, after), starts)
        ends = [*starts[1:], len(after)]
        pairs = zip(sums, starts, ends, strict=True)
        return [(float(total), all(self._likeliest(int(x)) == y for x, y in zip(before[i:j], after[i:j], strict=True))) for total, i, j in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts."""
        return [total for total, _ in self._loglikelihood_tokens([(None, [self.eot_token_id], self.tok_encode(each.args[0])) for each in requests])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Raises InputError: counts are measured on texts that are given."""
        raise InputError("the floors score texts and write none: choose tasks that need no generated text")


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Places of ``lengths`` by falling length, in batches of at most ``tokens`` with their padding, or of one: the largest batch comes first."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def score(logits_MV: Tensor, place_N: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
    """−log softmax(logits[place])[wanted] in nats, float64 (N,), and whether ``wanted`` is the likeliest id there, the first of equals (N,)."""
    nats, likeliest = [], []
    rows = max(1, CACHED // logits_MV.shape[1])
    pieces: Iterable[tuple[Tensor, Tensor]] = zip(place_N.split(rows), wanted_N.split(rows), strict=True)
    for place, wanted in pieces:
        logits = logits_MV[place].float()
        picked, highest = logits.gather(1, wanted[:, None])[:, 0], logits.amax(1)
        is_likeliest = picked == highest
        if is_likeliest.any():  # argmax is slow, and names the first of equals
            is_likeliest[is_likeliest.clone()] = logits[is_likeliest].argmax(1) == wanted[is_likeliest]
        likeliest.append(is_likeliest)
        nats.append(logits.sub_(highest[:, None]).exp_().sum(1).log().double() + (highest - picked).double())
    return torch.cat(nats), torch.cat(likeliest)
