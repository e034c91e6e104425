"""What ``generate()`` carries from call to call: the model's State, of constant size for GAM and Mamba.

transformers wants to take tokens back (``crop``: prompt lookup and assisted decoding propose some and reject the rest), which no recurrence can. So a
cache that records keeps the state of the last accepted token and what came after it, and after a crop runs the accepted part of that once more.

Shapes: B rows, T tokens, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers.cache_utils import Cache

from gam_lm.model import State

if TYPE_CHECKING:
    from gam_lm.hf.modeling_gam import GAMForCausalLM

Run = Callable[[Tensor, State | None, Tensor | None], tuple[Tensor, State]]
"""Embedded tokens (B, T, D), the state before them and their segments (B, T) → hidden vectors and the state after them."""


class GAMCache(Cache):
    """The state of a GAM model, whichever its mixer, with a counter of the tokens that it has seen, padding included."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: State | None = None
        self._length = 0
        self._recording = False
        self._accepted: State | None = None  # the state before the recorded calls
        self._recorded: list[tuple[Tensor, Tensor | None]] = []
        self._stale = False  # the recorded calls have to run again

    def advance(self, run: Run, x_BTD: Tensor, segments_BT: Tensor | None) -> Tensor:
        """Run the model over the next tokens and keep its state.

        Returns:
            The hidden vectors of the new tokens (B, T, D).
        """
        self._catch_up(run)
        h_BTD, state = run(x_BTD, self.state, segments_BT)
        if self._recording:
            self._recorded.append((x_BTD.detach(), segments_BT))
        self.state = state
        self._length += x_BTD.shape[1]
        return h_BTD

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs."""
        if not self._recording:
            self._recording = True
            self._accept()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last −``tokens_to_remove`` tokens and accept all before them.

        Raises:
            ValueError: for a positive number, or more tokens than were recorded since the last crop.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove is {tokens_to_remove}: use a negative number, that many tokens are taken back from the end")
        remove = -tokens_to_remove
        recorded = sum(x.shape[1] for x, _ in self._recorded)
        if remove > recorded:
            raise ValueError(
                f"crop takes back {remove} tokens, {recorded} were recorded: call activate_past_recording() before the tokens that may be taken back"
            )
        self._length -= remove
        while remove:
            x, segments = self._recorded.pop()
            kept = x.shape[1] - remove
            if kept > 0:
                self._recorded.append((x[:, :kept], None if segments is None else segments[:, :kept]))
            remove = max(0, -kept)
            self._stale = True
        if not self._stale:
            self._accept()

    def fork(self) -> GAMCache:
        """Another cache of the same past, which goes its own way; it costs nothing, because states are never changed in place."""
        other = GAMCache()
        other.state, other._length, other._recording = self.state, self._length, self._recording
        other._accepted, other._recorded, other._stale = self._accepted, list(self._recorded), self._stale
        return other

    def save(self, path: Path | str, model: GAMForCausalLM) -> None:
        """Write what was read to a file, whole or not at all; see `gam_lm.hf.cache_file.save_cache`."""
        from gam_lm.hf.cache_file import save_cache

        self._catch_up(model.model.mix)
        save_cache(self.state, self._length, Path(path), model)

    @classmethod
    def load(cls, path: Path | str, model: GAMForCausalLM) -> GAMCache:
        """Read what `save` wrote; see `gam_lm.hf.cache_file.load_cache`. Tokens read before it cannot be cropped."""
        from gam_lm.hf.cache_file import load_cache

        cache = cls()
        cache.state, cache._length = load_cache(Path(path), model)
        return cache

    def _catch_up(self, run: Run) -> None:
        """Read again what a crop left of the recorded calls."""
        if self._stale:
            self.state = self._accepted
            for x, segments in self._recorded:
                _, self.state = run(x, self.state, segments)
            self._accept()

    def _accept(self) -> None:
        self._accepted, self._recorded, self._stale = self.state, [], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row ``beam_idx[i]`` was."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows alone."""
        self._each(lambda x: x[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change every tensor's rows."""

        def changed(state: State | None) -> State | None:
            return None if state is None else State(change(state.position_B), tuple(tuple(change(x) for x in layer) for layer in state.layers))

        self.state, self._accepted = changed(self.state), changed(self._accepted)
        self._recorded = [(change(x), None if segments is None else change(segments)) for x, segments in self._recorded]

    def reset(self) -> None:
        """Forget everything."""
        self.state, self._length = None, 0
        self._accept()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, padding included."""
        return self._length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the next token stands."""
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of an attention mask over everything so far."""
        return self._length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Without end."""
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes of the state of all rows."""
        return 0 if self.state is None else sum(x.nbytes for layer in self.state.layers for x in layer)

    @property
    def batch_size(self) -> int:
        """Rows; −1 before the first token."""
        return -1 if self.state is None else len(self.state.position_B)

    @property
    def is_initialized(self) -> bool:
        """Whether a token was seen."""
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back."""
        return self._recording

    @property
    def is_compileable(self) -> bool:
        """transformers would compile around buffers that are changed in place; a State is a value."""
        return False

    @property
    def is_linear(self) -> list[bool]:
        """One entry: like attention, the cache knows how many tokens it has seen."""
        return [False]

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"GAMCache(tokens={self._length}, bytes={self.nbytes})"
