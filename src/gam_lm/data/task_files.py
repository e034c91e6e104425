"""The data of BLiMP, LAMBADA, ARC-easy and PIQA, which lie under $GAM_DATA/eval: nothing is downloaded.

`gam_lm.hf.tasks` holds the tasks' descriptions for lm-evaluation-harness, which read their data through `local`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gam_lm.data.places import data_root
from gam_lm.errors import InputError, MissingExtraError, unknown_name

FORMS: Mapping[str, Mapping[str, type]] = {
    "blimp": {"sentence_good": str, "sentence_bad": str},
    "lambada": {"context": str, "continuation": str},
    "arc_easy": {"query": str, "choices": list, "gold": int},
    "piqa": {"query": str, "choices": list, "gold": int},
}
"""Task → what each line of its files holds."""

SOURCES: Mapping[str, str] = {
    "blimp": "the folder data of github.com/alexwarstadt/blimp",
    "lambada": "EleutherAI/lambada_openai of the Hugging Face Hub",
    "arc_easy": "allenai/ai2_arc (ARC-Easy, test) of the Hugging Face Hub",
    "piqa": "baber/piqa (validation) of the Hugging Face Hub",
}
"""Task → where its examples are published."""


def read_examples(task: str, file: str) -> list[dict[str, Any]]:
    """The examples of a file of a task.

    Args:
        task: of FORMS.
        file: path below $GAM_DATA/eval, one JSON object a line.

    Raises:
        InputError: where the file is missing, a line is not as FORMS says, or the task is unknown.
    """
    path = find(task, file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"task {task!r}: {path} cannot be read ({error}): copy the file again") from error
    found = [_example(task, line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"task {task!r}: {path} is empty: copy the file again")
    return found


def find(task: str, file: str) -> Path:
    """The place of a file of a task. Raises InputError where it is missing, which says where its examples are published."""
    if task not in FORMS:
        raise unknown_name("task", task, FORMS)
    root = data_root()
    path = (root or Path("$GAM_DATA")) / "eval" / file
    if root is None or not path.is_file():
        fields = ", ".join(FORMS[task])
        raise InputError(
            f"task {task!r} is not at hand: {path} does not exist; put the examples of {SOURCES[task]} there, one JSON object with {fields} a line, "
            "and set GAM_DATA to the folder above eval/"
        )
    return path


def local(*, task: str, file: str, **_: object) -> Any:
    """`read_examples` as lm-evaluation-harness wants them (its ``custom_dataset``): the split ``test`` of a datasets.Dataset.

    A pair of BLiMP becomes the ``choices`` after no ``context``, the first of which is right (``gold``): columns that are there as the harness wants them spare
    a template, which it would compile anew for each of 67,000 pairs.
    """
    try:
        from datasets import Dataset
    except ImportError as error:
        raise MissingExtraError("datasets", "eval", f"task {task}") from error
    examples = read_examples(task, file)
    if task == "blimp":
        examples = [{"context": "", "choices": [each["sentence_good"], each["sentence_bad"]], "gold": 0} for each in examples]
    return {"test": Dataset.from_list(examples)}


def _example(task: str, line: str, place: str) -> dict[str, Any]:
    wanted = FORMS[task]
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not all(_is(row.get(name), kind) for name, kind in wanted.items()) or not _points_into(row):
        raise InputError(f"task {task!r}: {place} is no object with {', '.join(wanted)}: copy the file again")
    return {name: row[name] for name in wanted}


def _is(value: object, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and len(value) > 1 and all(isinstance(each, str) and each for each in value)
    return isinstance(value, kind) and not isinstance(value, bool) and value != ""


def _points_into(row: Mapping[str, Any]) -> bool:
    """Whether the right answer, where there are choices, is one of them."""
    choices: Collection[str] | None = row.get("choices")
    return choices is None or 0 <= row["gold"] < len(choices)
