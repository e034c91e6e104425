"""`gam inspect trace` and `gam inspect slots`: what a trained model does with a text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field

from gam_lm.cli.flags import FLAT
from gam_lm.cli.numbers import Count, Natural
from gam_lm.cli.terminal import show
from gam_lm.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Written = TypeVar("Written")

logger = logging.getLogger("gam_lm")


@dataclass(frozen=True, kw_only=True)
class Text:
    """Which text."""

    text: str | None = None
    """The text itself."""
    data: str | None = None
    """Or a corpus name or path."""
    split: Literal["train", "valid", "test"] = "valid"
    """Which split of the corpus."""
    tokens: Annotated[int, Field(ge=2, lt=2**31)] = 4096
    """Of that text, the first so many tokens."""

    def ids(self, run: Path, tokenizer: Tokenizer) -> list[int]:
        """Its token ids. Raises InputError where not one text is named, or it is too short."""
        if (self.text is None) == (self.data is None):
            raise InputError("the text is not given: use either --text with the text itself or --data with a corpus name or a path")
        from gam_lm.data.tokenizer import ids_of

        if self.text is not None:
            return self._first(ids_of(tokenizer, self.text, "text"))
        from gam_lm.data.tokens import prepare

        corpus = prepare(str(self.data), tokenizer=str(run / "tokenizer.json"))
        if self.split not in corpus.splits:
            raise InputError(f"split is {self.split!r}: data {corpus.name!r} has {', '.join(corpus.splits)}")
        return [int(token) for token in self._first(corpus.splits[self.split].ids)]

    def _first(self, ids: Any) -> Any:
        if len(ids) > self.tokens:
            logger.info("the first %s of %s tokens are read: --tokens takes more", f"{self.tokens:,}", f"{len(ids):,}")
        return ids[: self.tokens]


@dataclass(frozen=True, kw_only=True)
class InspectTrace:
    """What happened at each token: gates, slots, what each path added, and where its information came from; in bounded memory for a text of any length."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Model and text": ("run_directory", "text", "data", "split", "tokens"),
        "What is shown": ("top", "window"),
        "Output": ("out",),
        "Machine": ("device",),
    }

    run_directory: Path
    """Run directory of the model."""
    words: Annotated[Text, FLAT] = Text()
    out: Path | None = None
    """A page to look through (.html), or all figures (.json); without it the means by layer are printed."""
    top: Count = 5
    """Slots and tokens that are named of each."""
    window: Count = 256
    """Tokens read at once: every token finds at least so many before it by name among its sources."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Read the text once, and write as it is read."""
        from gam_lm.checkpoint import load_model, load_tokenizer_of
        from gam_lm.diagnostics.trace import trace
        from gam_lm.report.trace_page import Means, write_json, write_page
        from gam_lm.runtime.progress import progress
        from gam_lm.training.precision import choose_device

        write = _writer(self.out, {".html": write_page, ".json": write_json})
        model = load_model(self.run_directory, device=choose_device(self.device))
        tokenizer = load_tokenizer_of(self.run_directory)
        ids = self.words.ids(self.run_directory, tokenizer)
        with progress("trace", len(ids), "tokens") as bar:
            found = (_counted(token.to_dict(), bar.advance) for token in trace(model, ids, tokenizer, window=self.window, top=self.top))
            if write is None:
                means = Means()
                for _ in means.watch(found):
                    pass
            else:
                means = write(found, _about(self.run_directory, model.config.to_dict()), self.out)
        show(means.table().markdown())
        if self.out is not None:
            print(f"trace: {self.out}")


@dataclass(frozen=True, kw_only=True)
class InspectSlots:
    """What each slot of a memory is for: the tokens near it, where it fires, whether it is dead, and the loss without it."""

    first: ClassVar[dict[str, tuple[str, ...]]] = {
        "Model and text": ("run_directory", "text", "data", "split", "tokens"),
        "What is measured": ("top", "remove", "remove_tokens", "window"),
        "Output": ("out",),
        "Machine": ("device",),
    }

    run_directory: Path
    """Run directory of a GAM model."""
    words: Annotated[Text, FLAT] = Text()
    out: Path | None = None
    """A page (.html), or a row for each slot (.csv, .json); without it an overview is printed."""
    top: Count = 5
    """Tokens that are named of each slot."""
    remove: Natural = 8
    """Slots of each memory of each layer that are taken out in turn, the most read ones first; 0 takes none out."""
    remove_tokens: Count = 2048
    """How much of the text's start the loss without them is measured on."""
    window: Count = 256
    """Tokens read at once; changes no figure."""
    device: str = "auto"
    """auto, cpu, cuda …"""

    def run(self) -> None:
        """Read the text, take slots out, write."""
        from gam_lm.checkpoint import load_model, load_tokenizer_of
        from gam_lm.diagnostics.slots import slot_uses
        from gam_lm.report.slots_page import overview, write_csv, write_json, write_page
        from gam_lm.runtime.progress import progress
        from gam_lm.training.precision import choose_device

        write = _writer(self.out, {".html": write_page, ".csv": write_csv, ".json": write_json})
        model = load_model(self.run_directory, device=choose_device(self.device))
        tokenizer = load_tokenizer_of(self.run_directory)
        ids = self.words.ids(self.run_directory, tokenizer)
        with progress("slots taken out", None, "slots") as bar:
            uses = slot_uses(
                model, ids, tokenizer, window=self.window, top=self.top, remove=self.remove, remove_tokens=self.remove_tokens, advance=bar.advance
            )
        found = [use.to_dict() for use in uses]
        show(overview(found).markdown())
        if write is not None:
            write(found, _about(self.run_directory, model.config.to_dict()) | {"tokens": len(ids)}, self.out)
            print(f"slots: {self.out}")


def _counted(token: dict[str, Any], advance: Callable[[int], None]) -> dict[str, Any]:
    advance(1)
    return token


def _about(run: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a page says of the model."""
    said = [f"{'-'.join(config['mixers'])}, {config['num_hidden_layers']} layers of width {config['hidden_size']}"]
    said += [f"{name}: " + ", ".join(f"{key}={value}" for key, value in options.items()) for name, options in config["options"].items()]
    return {"run": run.as_posix(), "model": "; ".join(said), "model_config": dict(config)}


def _writer(out: Path | None, writers: Mapping[str, Callable[..., Written]]) -> Callable[..., Written] | None:
    """What writes ``out``, by its ending. Raises InputError for an ending that none writes."""
    if out is None:
        return None
    if out.suffix not in writers:
        raise InputError(f"out is {str(out)!r}: give it one of the endings {', '.join(writers)}")
    return writers[out.suffix]
