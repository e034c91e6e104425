"""The batches of a run, with the documents in the order of the text or in a new one every epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gam_lm.config import ModelConfig
from gam_lm.data.blocks import Batch, TrainingBlocks, check_length
from gam_lm.data.shards import Shard
from gam_lm.data.stream import Position, StreamedBlocks
from gam_lm.data.tokenizer import END_OF_TEXT
from gam_lm.data.tokens import TokenCorpus
from gam_lm.errors import InputError
from gam_lm.training.recipe import TrainConfig

logger = logging.getLogger("gam_lm")

Gather = Callable[[Position], list[Position]]
"""Gives what every process has, as `gam_lm.training.distributed.World.gather` does."""

AT_ONCE = 2**24
"""Token ids that are searched at once for ends of documents, which bounds the memory."""


class PermutedDocuments:
    """Token ids with their documents in another order, read in place: nothing is copied but what is asked for.

    Args:
        ids: (tokens,).
        end: the id that ends a document.
        seed: of the orders.
    """

    def __init__(self, ids: np.ndarray[Any, Any], end: int, seed: int) -> None:
        self._ids, self._seed = ids, seed
        ends = np.concatenate([np.flatnonzero(ids[i : i + AT_ONCE] == end) + i + 1 for i in range(0, len(ids), AT_ONCE)])
        if not len(ends) or ends[-1] != len(ids):
            ends = np.append(ends, len(ids))
        self._start = np.concatenate([[0], ends[:-1]])
        self._length = ends - self._start
        self.arrange(0)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self._length)

    def arrange(self, epoch: int) -> None:
        """Take the order of an epoch, a function of seed and epoch."""
        self.order = np.random.default_rng((self._seed, epoch, 1)).permutation(self.documents)
        self._reaches = np.cumsum(self._length[self.order])
        self._shift = self._start[self.order] - (self._reaches - self._length[self.order])

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The ids at ``places`` of the rearranged text."""
        found: np.ndarray[Any, Any] = self._ids[places + self._shift[np.searchsorted(self._reaches, places, side="right")]]
        return found


class Batches:
    """The batches of a run: a pure function of recipe and step, so that a resumed run needs nothing but the step.

    Raises:
        InputError: where the text is shorter than one batch, or its documents are to be shuffled and nothing tells where they end.
    """

    def __init__(self, corpus: TokenCorpus, recipe: TrainConfig) -> None:
        ids: Any = corpus.splits["train"].ids
        self._documents: PermutedDocuments | None = None
        if recipe.shuffle_documents:
            end = corpus.tokenizer.token_to_id(END_OF_TEXT)
            if end is None:
                raise InputError(
                    f"shuffle_documents is True, tokenizer {corpus.tokenizer_name!r} has no {END_OF_TEXT} to end a document: "
                    "use False or a tokenizer that has it"
                )
            if corpus.splits["train"].marks is not None:
                raise InputError("shuffle_documents is True: conversations are not shuffled as documents are, leave it out")
            ids = self._documents = PermutedDocuments(ids, end, recipe.seed)
            if self._documents.documents == 1:
                logger.info("shuffle_documents changes nothing: the training text is one document")
        self._blocks = TrainingBlocks(
            ids, context=recipe.context, batch_size=recipe.batch_size, seed=recipe.seed, overlap=recipe.blocks == "overlapping",
            marks=corpus.splits["train"].marks,
        )
        self.steps_per_epoch = self._blocks.steps_per_epoch
        self._epoch = 0

    def batch(self, step: int) -> Batch:
        """The batch of optimiser step 0, 1, …"""
        epoch = step // self.steps_per_epoch
        if self._documents is not None and epoch != self._epoch:
            self._documents.arrange(epoch)
            self._epoch = epoch
        return self._blocks.batch(step)

    def position(self, gather: Gather) -> None:
        """A batch is a function of its step: there is nothing to keep."""

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A data set that is read while a run goes on, in place of the train split of its corpus."""

    shards: list[Shard]
    lanes: int
    """The same for the whole run."""
    processes: int = 1
    """That tokenise, for each process of the run."""


class StreamedBatches:
    """The batches of a run that streams: the same on any number of processes, of which each reads the lanes of its rows.

    Raises:
        InputError: where the recipe does not say how many steps there are, asks for another order, or the data set is not the one of ``position``.
    """

    steps_per_epoch = 0
    """Nobody knows."""

    def __init__(self, corpus: TokenCorpus, recipe: TrainConfig, stream: Stream, rank: int, size: int, position: dict[str, Any] | None) -> None:
        if recipe.steps is None:
            raise InputError("steps is not given, and a stream has no end: use --steps, or --minutes")
        if recipe.shuffle_documents or recipe.blocks == "paper":
            raise InputError("shuffle_documents and blocks='paper' are for texts that are prepared whole: leave them out with a stream")
        own = np.array_split(np.arange(recipe.batch_size), size)[rank].tolist()
        self._blocks = StreamedBlocks(
            stream.shards, corpus.directory / "tokenizer.json", context=recipe.context, batch_size=recipe.batch_size, lanes=stream.lanes,
            rows=range(own[0], own[-1] + 1), position=None if position is None else Position.from_json(position), processes=stream.processes,
        )  # fmt: skip

    def batch(self, step: int) -> Batch:
        """The batch of the next step; rows of other processes are zeros."""
        return self._blocks.batch(step)

    def position(self, gather: Gather) -> dict[str, Any]:
        """Where the stream stands, of the lanes of all processes, which make the call together, for `Position.from_json`."""
        own = self._blocks.position
        lanes = {lane: place for each in gather(own) for lane, place in each.lanes.items()}
        return replace(own, lanes=lanes).to_json()

    def close(self) -> None:
        """End the processes that tokenise."""
        self._blocks.close()


def batches_of(
    corpus: TokenCorpus, recipe: TrainConfig, stream: Stream | None, rank: int, size: int, position: dict[str, Any] | None
) -> Batches | StreamedBatches:
    """The batches of a run of ``size`` processes, which reads the train split of ``corpus`` or a ``stream`` from ``position`` on."""
    return Batches(corpus, recipe) if stream is None else StreamedBatches(corpus, recipe, stream, rank, size, position)


def check_fits(config: ModelConfig, corpus: TokenCorpus, recipe: TrainConfig) -> None:
    """Raise InputError where a corpus does not fit the model or the recipe."""
    config.check_length("context", recipe.context)
    if corpus.vocab_size > config.vocab_size:
        raise InputError(f"vocab_size is {config.vocab_size}, the tokenizer has {corpus.vocab_size} entries: use a model of at least as many")
    for split in ("train", "valid"):
        if split not in corpus.splits:
            raise InputError(f"data {corpus.name!r} has no {split} split: training needs train and valid")
    check_length(corpus.splits["valid"].ids, recipe.context)
