"""Whatever stands in a config.json or recipe.json: it builds, or one line names the field, the value and the fix."""

import dataclasses
import json
import math
import random
import re

import pytest

from gam_lm.config import ModelConfig
from gam_lm.errors import InputError
from gam_lm.mixers.registry import mixer_names, options_class
from gam_lm.training.recipe import TrainConfig

JUNK = [
    None, True, False, 0, 1, -1, 2, 3, 5, 8, 64, 10**9, 2**63, 10**30, -(10**400), 0.0, 0.5, 1.0, 1.5, -2.0, 1e-320, 1e308, math.nan, math.inf, -math.inf,
    "", "1", "true", "False", "none", "auto", "nan", "gam", "delta", "a\nb", "ü" * 300, b"delta", 1j, object(), [], [1], [None], ["gam"], ["gam", "mamba"],
    [["gam"]], ("gam",), {}, {"gam": {}}, {"gam": {"write": 3}}, {"a": {"b": [1, {"c": math.nan}]}}, [0.9, 0.95], [0.9], (0.9, "0.95"), [0.9, 2], {1, 2}, {3: 4},
    range(3), lambda: 0, int, Ellipsis,
]  # fmt: skip
"""Values of every type that can stand in JSON, and of some that cannot."""


def some_value(random, depth=0):
    if depth < 3 and random.random() < 0.15:
        return random.choice([
            [some_value(random, depth + 1) for _ in range(random.randrange(4))],
            {random.choice(["gam", "write", "", "x"]): some_value(random, depth + 1) for _ in range(random.randrange(3))},
        ])  # fmt: skip
    return random.choice(JUNK)


def some_fields(kind, random):
    """A dictionary of a few of the fields of a class, now and then with its default, rarely with a field that it does not have."""
    names = [field.name for field in dataclasses.fields(kind)]
    chosen = random.sample(names, min(len(names), random.choice([1, 1, 2, 3])))
    usual = {field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}
    found = {name: usual[name] if name in usual and random.random() < 0.3 else some_value(random) for name in chosen}
    return found | ({random.choice(["hiden_size", "", "model_type", "ü"]): some_value(random)} if random.random() < 0.05 else {})


def builds_or_says_why(build, values, known):
    """Whether it builds; else the InputError is one line that names a field which is there, missing or unknown."""
    try:
        build(values)
    except InputError as error:
        said = str(error)
        assert len(said.splitlines()) == 1 and len(said) < 1000, said
        assert any(re.search(rf"\b{re.escape(name)}\b", said) for name in (*known, "key", "field", "option", "mixer")), said
        assert re.search(r": |did you mean", said), said  # the fix
        return False
    return True


def test_any_dictionary_is_a_model_config_or_one_line():
    rng, built = random.Random(1), 0
    known = [field.name for kind in (ModelConfig, *map(options_class, mixer_names())) for field in dataclasses.fields(kind)]
    for _ in range(4000):
        values = {"vocab_size": 9} | some_fields(ModelConfig, rng)
        if rng.random() < 0.5:
            values["mixers"] = rng.choices(mixer_names(), k=rng.choice([1, 2]))
            values["options"] = {name: some_fields(options_class(name), rng) for name in rng.sample(mixer_names(), 1)}
        built += builds_or_says_why(ModelConfig.from_dict, values, known)
    assert 100 < built < 2000


@pytest.mark.parametrize("name", mixer_names())
def test_any_dictionary_is_an_options_object_or_one_line(name):
    kind, rng, built = options_class(name), random.Random(2), 0
    for _ in range(1500):
        values = some_fields(kind, rng)
        built += builds_or_says_why(lambda values: kind(**values).resolved(64).enlarged(2.0), values, [field.name for field in dataclasses.fields(kind)])
    assert 20 < built < 1000


def test_any_dictionary_is_a_recipe_or_one_line():
    rng, built = random.Random(3), 0
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for _ in range(3000):
        built += builds_or_says_why(TrainConfig.from_dict, some_fields(TrainConfig, rng), known)
    assert 50 < built < 2000


@pytest.mark.parametrize("kind", [ModelConfig, TrainConfig, *map(options_class, mixer_names())])
def test_what_builds_survives_json(kind):
    rng = random.Random(4)
    for _ in range(500):
        values = ({"vocab_size": 9} if kind is ModelConfig else {}) | some_fields(kind, rng)
        try:
            made = kind(**values)
        except InputError:
            continue
        plain = json.loads(json.dumps(made.to_dict(), allow_nan=False))
        assert (kind.from_dict(plain) if hasattr(kind, "from_dict") else kind(**plain)) == made


@pytest.mark.parametrize("kind", [ModelConfig, TrainConfig, *map(options_class, mixer_names())])
def test_a_wrong_type_is_never_converted(kind):
    """A text is no number, a number no truth value, a fraction no count, and neither NaN nor infinity is a number."""
    base = {"vocab_size": 9} if kind is ModelConfig else {}
    made = kind(**base)
    for field in dataclasses.fields(kind):
        default = getattr(made, field.name)
        wrong = {bool: [0, 1, "true", None], int: [1.0, "1", True, math.nan], float: ["0.5", math.nan, math.inf, True], str: [0, True, None, b"auto"]}
        for value in wrong.get(type(default), []):
            with pytest.raises(InputError, match=f"^{field.name} is "):
                kind(**base | {field.name: value})


@pytest.mark.parametrize("values", [None, 3, "gam", [], [("vocab_size", 9)], {1: 2}, {None: 3}, {("a", "b"): 1}])
@pytest.mark.parametrize("read", [ModelConfig.from_dict, TrainConfig.from_dict], ids=["model", "recipe"])
def test_what_is_no_object_is_said(read, values):
    with pytest.raises(InputError) as caught:
        read(values)
    assert len(str(caught.value).splitlines()) == 1
