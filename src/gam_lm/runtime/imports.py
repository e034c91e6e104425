"""Other people's modules, loaded before a verb is parsed: `--import PATH_OR_MODULE`. What they register is known to processes that this one starts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from gam_lm.errors import InputError, shortened

FLAG = "--import"

VARIABLE = "GAM_LM_IMPORT"
"""The environment variable that tells a process what to load: places as a JSON list."""


def take_imports(arguments: Sequence[str]) -> list[str]:
    """Load what each `--import` names, here and in every process that this one starts from now on. Returns the other arguments.

    Raises:
        InputError: for a place that is not there.
    """
    rest: list[str] = []
    places: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == FLAG:
            if (place := next(words, None)) is None:
                raise InputError(f"{FLAG} has no value: name a Python file or a module")
            places.append(place)
        elif word.startswith(FLAG + "="):
            places.append(word.split("=", 1)[1])
        else:
            rest.append(word)
    load_imports()
    for place in (str(Path(each).resolve()) if _is_file(each) else each for each in places):
        _load(place)
        os.environ[VARIABLE] = json.dumps(list(dict.fromkeys([*_of_environment(), place])))
    return rest


def load_imports() -> None:
    """Load what the environment names. Raises InputError for a place that is not there."""
    for place in _of_environment():
        _load(place)


def _load(place: str) -> None:
    if not place:
        raise InputError("import is '': name a Python file or an installed module")
    if _is_file(place):
        _load_file(Path(place))
        return
    try:
        import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise  # it is there, and something that it imports is not
        raise InputError(f"import is {place!r}: there is no such module, name a Python file or an installed module") from error


def _load_file(path: Path) -> None:
    """Run a file as the module of its name, once."""
    there = sys.modules.get(path.stem)
    if there is not None and getattr(there, "__file__", None) == str(path):
        return
    spec = spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"import is {str(path)!r}: there is no such Python file")
    if there is not None:
        raise InputError(f"import is {str(path)!r}, whose name {path.stem!r} another module has: rename the file")
    module = module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise


def _of_environment() -> list[str]:
    said = os.environ.get(VARIABLE, "[]")
    try:
        found = json.loads(said)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(place, str) for place in found):
        raise InputError(f"the environment variable {VARIABLE} is {shortened(said)}: use a JSON list of Python files and modules, or unset it")
    return found


def _is_file(place: str) -> bool:
    return place.endswith(".py") or os.sep in place
