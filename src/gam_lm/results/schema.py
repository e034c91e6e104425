"""What a results.json must look like before anything is read from it: types of what is there, and a plain word for what is not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Required

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from gam_lm.errors import InputError, place_and_fix

Whole = Annotated[int, Field(ge=0, lt=2**63)]
Nats = Annotated[float, Field(allow_inf_nan=True)]
"""A loss, or what follows from it: of a run that diverged it may be no number."""
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=1e300)]
Digits = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]
Name = Annotated[str, Field(min_length=1, max_length=500)]
Fields = dict[str, Any]

OF_A_TEXT = ("val_nats_per_token", "split")
"""Keys of rows that were measured on a corpus."""

OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
"""Of what the library wrote nothing is converted; keys that it does not know are left alone."""


@with_config(OPEN)
class Machine(TypedDict, total=False):
    """Where a row was measured."""

    device: str
    processor: str
    cores: Whole | None
    memory_gb: Amount | None
    python: str
    torch: str
    commit: str | None
    dirty: bool | None


@with_config(OPEN)
class Corpus(TypedDict, total=False):
    """The text."""

    name: str
    sha256: str
    tokens: Whole
    bytes: Whole
    tokenizer: str
    tokenizer_sha256: str
    vocab_size: Whole


@with_config(OPEN)
class Text(TypedDict, total=False):
    """What a model gets on a text of another kind."""

    nats_per_token: Required[Nats]
    bits_per_byte: Nats
    sha256: str
    blocks: Name


@with_config(OPEN)
class Point(TypedDict, total=False):
    """A point of a loss curve."""

    step: Whole
    tokens: Whole
    seconds: Amount
    train_nats: Nats
    val_nats: Nats


@with_config(OPEN)
class Gap(TypedDict, total=False):
    """Answers of recall by the tokens between pair and question."""

    gap_from: Whole
    answers: Whole
    accuracy: Share


@with_config(OPEN)
class Length(TypedDict, total=False):
    """Answers of recall at another length."""

    length: Whole
    answers: Whole
    accuracy: Share
    by_gap: list[Gap]


@with_config(OPEN)
class Distance(TypedDict, total=False):
    """The loss with so many true tokens."""

    nats: float
    gain: float
    half_width: Amount


@with_config(OPEN)
class ContextUse(TypedDict, total=False):
    """What the text further back is worth."""

    context: Whole
    targets: Whole
    by_distance: dict[Digits, Distance | None]


@with_config(OPEN)
class Configuration(TypedDict, total=False):
    """A model's, or a recipe's, fields."""

    options: dict[str, Fields]
    hidden_size: Whole
    vocab_size: Whole
    steps: Whole | None
    batch_size: Whole


@with_config(OPEN)
class Row(TypedDict, total=False):
    """A row of any command."""

    model: Required[Name]
    seed: Whole | None
    backend: str
    variant: str
    dtype: str
    task: str
    lm_eval: str
    examples: Whole | None
    phenomena: dict[str, Share]
    paradigms: dict[str, Share]
    filler: str
    outcome: str
    note: str
    command: str
    precision: str
    split: Literal["train", "valid", "test"]
    floor: bool
    diverged: bool
    pruned: bool
    compiled: bool
    within: bool
    environment: Machine
    model_config: Configuration
    train_config: Configuration
    changes: Fields
    tuned: dict[str, float]
    context_use: ContextUse
    contexts: dict[Digits, float | None]
    curve: list[Point]
    texts: dict[Name, Text]
    by_gap: list[Gap]
    by_length: list[Length]
    position_nats: list[float]
    val_blocks: Name
    test_blocks: Name
    trial: Whole
    parameters: Whole
    paper_size_parameters: Whole
    train_tokens: Whole
    context: Whole
    sequence_length: Whole
    batch_size: Whole
    pairs: Whole
    vocab: Whole
    answers: Whole
    state_bytes: Whole
    weight_bytes: Whole
    gap_power: float
    accuracy: Share
    stop_at: Share
    learned_at: Whole
    acc: Share
    acc_stderr: Amount
    acc_norm: Share
    acc_norm_stderr: Amount
    nats: float
    nats_stderr: Amount
    perplexity: Amount
    perplexity_stderr: Amount
    val_nats_per_token: Nats
    test_nats_per_token: Nats
    stream_nats_per_token: float | None
    train_nats_per_token: Nats
    train_ppl: Nats
    train_bits_per_byte: Nats
    train_word_ppl: Nats
    valid_nats_per_token: Nats
    valid_ppl: Nats
    valid_bits_per_byte: Nats
    valid_word_ppl: Nats
    val_ppl: Nats
    test_ppl: Nats
    val_bits_per_byte: Nats
    test_bits_per_byte: Nats
    val_word_ppl: Nats
    test_word_ppl: Nats
    paper_val_nats: Nats
    paper_val_ppl: Nats
    train_seconds: Amount
    epoch_seconds: Amount
    tokens_per_second: Amount
    step_ms: Amount
    step_ms_low: Amount
    step_ms_high: Amount
    forward_ms: Amount
    forward_backward_ms: Amount
    peak_memory_mb: Amount
    bandwidth: Amount
    share_of_bandwidth: Amount
    share_of_peak: Amount
    flops_per_token: Amount
    flops_per_second: Amount
    peak_bf16_flops: Amount
    peak_fp32_flops: Amount
    first_loss: float
    output_error: float
    state_error: float
    passes: Whole


@with_config(OPEN)
class Content(TypedDict, total=False):
    """A whole file."""

    command: Required[str]
    environment: Required[Machine]
    corpus: Required[Corpus | None]
    rows: Required[list[Row]]
    commands: list[str]
    primary: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    margin: Annotated[float, Field(gt=0)]


class Known(dict[str, Any]):
    """An object of a results.json. What is asked of it and not there is an InputError that says where."""

    def __init__(self, values: Mapping[str, Any], path: Path | str, place: str) -> None:
        super().__init__(values)
        self._path, self._place = path, place

    def __missing__(self, key: str) -> Any:
        raise damaged(self._path, f"{self._place} has no {key}")


def checked_content(content: Any, path: Path | str) -> dict[str, Any]:
    """``content`` as it was, its objects as `Known`. Raises InputError where it does not look like a results.json."""
    try:
        _adapter().validate_python(content)
    except ValidationError as error:
        raise damaged(path, place_and_fix(error.errors()[0])) from None
    if content["corpus"] is None and any(key in row for row in content["rows"] if "corpus" not in row for key in OF_A_TEXT):
        raise damaged(path, "corpus is None, and rows have losses on a text")
    known: dict[str, Any] = _known(content, path, "the file")
    return known


def damaged(path: Path | str, what: str) -> InputError:
    """The error for a results.json that cannot be used."""
    return InputError(f"results {str(path)!r} cannot be used, {what}: restore the file, or move it away to start anew")


@cache
def _adapter() -> TypeAdapter[Content]:
    return TypeAdapter(Content)


def _known(value: Any, path: Path | str, place: str) -> Any:
    if isinstance(value, dict):
        return Known({key: _known(each, path, f"{place}.{key}" if place != "the file" else key) for key, each in value.items()}, path, place)
    if isinstance(value, list):
        return [_known(each, path, f"{place}.{i}") for i, each in enumerate(value)]
    return value
