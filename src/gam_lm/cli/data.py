"""`gam data prepare`, and the flags that say which text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from gam_lm.cli.flags import FLAT
from gam_lm.cli.numbers import Count
from gam_lm.errors import InputError

if TYPE_CHECKING:
    from gam_lm.data.tokens import TokenCorpus
    from gam_lm.presets.setups import Preset

EvaluationText = Literal["wikitext-2-v1", "tinystories-sample", "tinyshakespeare", "lambada", "stdlib"]
"""As gam_lm.data.evaluation has them."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Which text and which tokenizer."""

    data: str | None = None
    """Corpus name (stdlib, gutenberg, books, wikitext-2, wikitext-2-v1, wikitext-103, tinystories, tinystories-sample, tinyshakespeare) or path
    (.txt .md .py .jsonl, also as .gz and .zst; .parquet; or a folder)."""
    tokenizer: str = "bpe"
    """bpe (byte-level, trained on the training split), paper (the paper's protocol), or the path of a tokenizer.json."""
    train_rows: Count | None = None
    """Rows of the training split that are used; by default all."""
    valid_rows: Count | None = None
    """Rows of the validation split that are used; by default all."""

    @classmethod
    def of(cls, preset: Preset) -> Data:
        """What a preset reads."""
        limits = preset.row_limits or {}
        return cls(data=preset.data, tokenizer=preset.tokenizer, train_rows=limits.get("train"), valid_rows=limits.get("valid"))

    def prepare(self, vocab_size: int) -> TokenCorpus:
        """The corpus as token ids; ``vocab_size`` is that of a tokenizer that is trained."""
        from gam_lm.data.carried import carried
        from gam_lm.data.tokens import prepare

        if self.data is None:
            raise InputError("data is not given: use --data with a corpus name or a path, or --preset")
        if (found := carried(Path(self.data))) is not None:
            if self.tokenizer != "bpe" or self.train_rows or self.valid_rows:
                raise InputError(f"data {self.data!r} holds token ids: leave out tokenizer, train_rows and valid_rows, which are for a text")
            return found
        limits = {split: rows for split, rows in (("train", self.train_rows), ("valid", self.valid_rows)) if rows is not None}
        corpus = prepare(self.data, tokenizer=self.tokenizer, vocab_size=vocab_size, row_limits=limits or None)
        if missing := [split for split in ("train", "valid") if split not in corpus.splits]:
            raise InputError(f"data {self.data!r} has no {missing[0]} split: it is for evaluation, use it with gam eval RUN --data {self.data}")
        return corpus


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Turn a corpus into token ids ahead of time, where every model will find them."""

    text: Annotated[Data, FLAT] = Data()
    vocab_size: Count = 10_000
    """Entries of a tokenizer that is trained."""
    carry: Path | None = None
    """Folder that gets the first ids and the tokenizer, for a machine without the text: `--data FOLDER` of `gam bench` reads it there."""
    carry_tokens: Count = 10_000_000
    """Training tokens that it gets, two bytes each."""
    carry_valid_tokens: Count = 1_000_000
    """Validation tokens that it gets, and test tokens where the corpus has them."""

    @classmethod
    def defaults(cls, arguments: list[str]) -> list[None]:
        """`gam data prepare NAME` is `gam data prepare --data NAME`."""
        if arguments and not arguments[0].startswith("-"):
            arguments.insert(0, "--data")
        return [None]

    def run(self) -> None:
        """Prepare and describe."""
        from gam_lm.data.tokens import describe

        corpus = self.text.prepare(self.vocab_size)
        print(describe(corpus))
        if self.carry is not None:
            from gam_lm.data.carried import carry

            held_out = {split: self.carry_valid_tokens for split in ("valid", "test") if split in corpus.splits}
            carry(corpus, self.carry, {"train": self.carry_tokens, **held_out})
            print(f"carried: {self.carry}")
