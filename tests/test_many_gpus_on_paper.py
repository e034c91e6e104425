"""A training on many GPUs on paper."""

import dataclasses
import json

import pytest

from gam_lm.cli.main import run
from gam_lm.diagnostics.cost import model_cost
from gam_lm.diagnostics.plan import DEVICES, ROOM, Plan, estimate, number, of_size
from gam_lm.errors import InputError
from gam_lm.presets.models import named_model

BASE = named_model("gam", {"vocab_size": 32_768})
PLAN = Plan(config=of_size(BASE, 1e9), tokens=100e9, gpus=64, device=DEVICES["h100"])


def test_numbers_are_read_as_people_write_them():
    assert [number("plan", text) for text in ("1B", "350m", "2.5T", "4096", "32K")] == [1e9, 350e6, 2.5e12, 4096, 32e3]
    for text in ("", "B", "-1B", "many", "nan", "inf", "1e30"):
        with pytest.raises(InputError, match="plan is"):
            number("plan", text)


@pytest.mark.parametrize("size", [100e6, 1e9, 7e9, 30e9])
@pytest.mark.parametrize("name", ["gam", "transformer", "mamba", "gated_deltanet"])
def test_a_planned_model_has_about_the_wanted_parameters(name, size):
    found = model_cost(of_size(named_model(name, {"vocab_size": 32_768}), size), 1).total_parameters
    assert found == pytest.approx(size, rel=0.15)


def test_time_is_operations_over_what_the_gpus_do():
    found = estimate(PLAN)
    by_hand = model_cost(PLAN.config, 4096).training_flops * 100e9 / (64 * 989e12 * 0.4) / 86_400
    assert found.days(PLAN) == pytest.approx(by_hand)
    assert 6 * 0.9e9 < found.cost.training_flops < 6 * 1.5e9  # the rule of thumb: six operations a parameter and token
    half = estimate(dataclasses.replace(PLAN, gpus=32))
    assert half.days(PLAN) == pytest.approx(2 * found.days(PLAN))


def test_every_gradient_crosses_the_slowest_link_twice():
    few, many = (estimate(dataclasses.replace(PLAN, gpus=gpus)) for gpus in (8, 64))
    count = few.cost.total_parameters
    assert few.exchange_seconds == pytest.approx(2 * 7 / 8 * 4 * count / 450e9)
    assert many.exchange_seconds == pytest.approx(2 * 63 / 64 * 4 * count / 50e9)
    assert estimate(dataclasses.replace(PLAN, gpus=1)).exchange_seconds == 0
    slow = dataclasses.replace(PLAN, device=PLAN.device._replace(outside=1e9))
    found = estimate(slow)
    assert found.exposed_seconds == pytest.approx(found.exchange_seconds - 2 / 3 * found.seconds_per_step)
    assert found.days(slow) > many.days(PLAN)


@pytest.mark.parametrize("size, fits", [(1e9, True), (3e9, True), (7e9, False)])
def test_what_fits_a_gpu_stays_below_its_memory(size, fits):
    plan = dataclasses.replace(PLAN, config=of_size(BASE, size), context=1024)
    found = estimate(plan)
    assert bool(found.replicated.rows) == fits and found.sharded.rows
    for memory in (found.replicated, found.sharded):
        if memory.rows:
            assert memory.state + memory.activations <= ROOM * plan.device.memory
            assert found.rows_per_gpu % memory.rows == 0
    assert found.sharded.state < found.replicated.state / 4


def test_the_command_prints_its_assumptions(capsys):
    assert run(["inspect", "cost", "--plan", "1B", "--tokens", "100B", "--gpus", "64", "--device", "h100"]) == 0
    said = capsys.readouterr().out
    assert "Assumed, not measured" in said and "40% of the peak of 989 TFLOP/s" in said and "GPU-hours" in said and "64 × H100" in said
    assert run(["inspect", "cost", "laptop", "--plan", "350M", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["days"] > 0


@pytest.mark.parametrize(
    "flags, message",
    [(["--plan", "big"], "plan is 'big'"), (["--plan", "1B", "--device", "h10"], "did you mean 'h100'"), (["--plan", "1B", "--gpus", "0"], "gpus is 0"),
     (["--plan", "1B", "--utilisation", "0"], "utilisation is 0"), (["--plan", "1B", "--tokens-per-step", "100"], "use at least 32,768"), ([], "target is not given")],
)  # fmt: skip
def test_a_plan_that_makes_no_sense_is_refused_in_one_line(flags, message, capsys):
    assert run(["inspect", "cost", *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
