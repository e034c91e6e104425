"""Which text `gam train` is given, where its run goes, and which of its flags do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gam_lm.cli.architecture import SCAFFOLD
from gam_lm.errors import InputError
from gam_lm.mixers.registry import mixer_names

if TYPE_CHECKING:
    from gam_lm.cli.train import Train

NO_TEXT = "data is not given: name a text, as in `gam train my_text.txt`, or use --data with a corpus name or a path, or --preset"


def check_flags(train: Train) -> None:
    """Raise InputError for numbers out of range, and for flags of which one says what the other does."""
    if train.minutes <= 0:
        raise InputError(f"minutes is {train.minutes:g}: use a number above 0")
    if train.valid_tokens is not None and train.valid_tokens < 1:
        raise InputError(f"valid_tokens is {train.valid_tokens}: use a whole number of at least 1")
    if train.valid_tokens is not None and train.chat is not None:
        raise InputError(f"valid_tokens is {train.valid_tokens}, and chat is given: leave it out, conversations that are held out are measured whole")
    if train.tokens_per_step is not None and "batch_size" in train.given:
        raise InputError(f"tokens_per_step is {train.tokens_per_step}, and batch_size is given too: use one of them")
    told = {"preset": train.preset, "steps": train.recipe.steps, "epochs": train.recipe.epochs}
    if "minutes" in train.given and (other := [name for name, value in told.items() if name in train.given and value is not None]):
        raise InputError(f"minutes is {train.minutes:g}, and {other[0]} is {told[other[0]]}, which says how long the run is: leave one of them out")


def texts_of(train: Train) -> tuple[str, ...]:
    """What is read, empty where the flags do not say it. Raises InputError where they say it twice."""
    if train.chat is not None:
        if train.start is None and not (train.out is not None and (train.out / "recipe.json").is_file()):
            raise InputError(f"chat is {str(train.chat)!r}, and a model has to know the language first: add --from RUN, a run that `gam train` wrote")
        if train.texts or "data" in train.given:
            raise InputError(f"chat is {str(train.chat)!r}, and a text is given too: train on one after the other, the second with --from")
        return (str(train.chat),)
    if train.texts and "data" in train.given:
        raise InputError(f"data is {train.text.data!r}, and {train.texts[0]!r} is given too: use one of them")
    return train.texts or ((train.text.data,) if train.text.data is not None else ())


def name_of(train: Train, texts: tuple[str, ...]) -> str:
    """The default name of a run directory. Raises InputError where there is no text."""
    if not texts:
        raise InputError(NO_TEXT)
    stem = Path(texts[0]).expanduser().resolve().name.partition(".")[0] or "text"
    return stem if train.start is None else f"{train.start.resolve().name}-{stem}"


def check_stream(train: Train, texts: tuple[str, ...]) -> None:
    """Raise InputError for flags that say how a text is read whole."""
    if train.chat is not None or train.preset is not None or len(texts) > 1:
        raise InputError("stream is True: give one data set, without --chat and --preset")
    if named := {"train_rows", "valid_rows", "epochs"} & train.given:
        raise InputError(f"{min(named)} is given with --stream, which reads on as long as the run does: leave it out and use --steps or --minutes")


def check_kept(train: Train) -> None:
    """Raise InputError for flags that would change the model or the tokenizer of the run to start from."""
    scaffold = {field.name for field in SCAFFOLD} - {"dropout"}
    for name in sorted(train.given):
        if name in scaffold or name in ("model", "tokenizer", "preset") or name.partition(".")[0] in mixer_names():
            raise InputError(f"--{name.replace('_', '-')} is given with --from, which keeps model and tokenizer: leave one of them out")
