"""The rules of `gam train`'s plan: monotone, within limits, and told in five lines."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gam_lm.errors import InputError
from gam_lm.training import plan as rules
from gam_lm.training.plan import Plan, Size, choose_size, context_for, learning_rate_for, recipe_for, schedule, vocabulary_for, weight_decay_for
from gam_lm.training.plan_words import Figures, batch_line, explain
from gam_lm.training.recipe import TrainConfig

AMOUNTS = st.floats(min_value=1e-3, max_value=1e13, allow_nan=False)


def speed_of(operations_per_second):
    """A machine whose time per token goes with the parameters of a rung."""
    return lambda size: operations_per_second / (72 * size.hidden_size**2 * size.num_hidden_layers)


@pytest.mark.parametrize("table", [rules.VOCABULARY, rules.BATCH, rules.DROPOUT])
def test_tables_start_at_nothing_and_rise_in_both_columns(table):
    assert table[0][0] == 0
    assert all(a < b and x < y for (a, x), (b, y) in itertools.pairwise(table))


def test_rungs_rise_in_size_and_in_what_they_take():
    assert rules.SIZES[0].tokens_seen == rules.SIZES[0].text_tokens == 0
    for small, large in itertools.pairwise(rules.SIZES):
        assert small.hidden_size**2 * small.num_hidden_layers < large.hidden_size**2 * large.num_hidden_layers
        assert small.tokens_seen < large.tokens_seen and small.text_tokens < large.text_tokens


@given(table=st.sampled_from([rules.VOCABULARY, rules.BATCH, rules.DROPOUT]), a=AMOUNTS, b=AMOUNTS)
def test_more_never_gives_less(table, a, b):
    assert rules.at(table, min(a, b)) <= rules.at(table, max(a, b))
    assert table[0][1] <= rules.at(table, a) <= table[-1][1]


@given(tokens=st.tuples(st.integers(1, 10**10), st.integers(1, 10**10)), minutes=st.tuples(AMOUNTS, AMOUNTS), power=st.tuples(AMOUNTS, AMOUNTS))
def test_a_longer_text_more_minutes_or_a_faster_machine_never_gives_a_smaller_model(tokens, minutes, power):
    rung = [
        rules.SIZES.index(choose_size(take(tokens), 60 * take(minutes), speed_of(take(power))))
        for take in (min, max)
    ]  # fmt: skip
    assert rung[0] <= rung[1]


def test_no_rung_is_timed_beyond_the_first_that_is_too_slow():
    timed = []

    def speed(size: Size) -> float:
        timed.append(size)
        return rules.SIZES[2].tokens_seen / 100 if size == rules.SIZES[1] else 0.0

    assert choose_size(10**10, 100.0, speed) == rules.SIZES[1]
    assert timed == list(rules.SIZES[1:3])
    timed.clear()
    assert choose_size(10, 100.0, speed) == rules.SIZES[0] and timed == []


@given(train=st.integers(2, 10**9), valid=st.integers(2, 10**8), batch=st.integers(1, 256))
def test_the_context_is_the_longest_that_the_text_fills(train, valid, batch):
    context = context_for(train, valid, batch)
    fits = [each for each in rules.CONTEXTS if train > 10 * batch * each and valid > 2 * each]
    assert context == (max(fits) if fits else min(rules.CONTEXTS))


@given(
    minutes=st.floats(0.05, 1e4), step=st.floats(1e-4, 30), text=st.integers(10**3, 10**10), valid=st.integers(100, 10**9),
    batch=st.sampled_from([8, 16, 64]),
)  # fmt: skip
def test_a_schedule_fills_its_time_and_no_more(minutes, step, text, valid, batch):
    seconds, per_step = 60 * minutes, 256 * batch
    found = schedule(seconds=seconds, step_seconds=step, tokens_per_step=per_step, text_tokens=text, valid_tokens=valid, context=256)
    assert found.steps >= 1 and found.valid_tokens <= valid
    assert found.steps == 1 or found.steps * per_step <= rules.MOST_PASSES * text
    validation = rules.FORWARD_SHARE * step / per_step * found.valid_tokens
    validations = 1 if found.validate_every is None else -(-found.steps // found.validate_every)
    assert validations <= rules.MOST_VALIDATIONS
    if validation > 1.001 * rules.SHARE_OF_VALIDATION * seconds:
        assert found.valid_tokens <= 4 * 256 + 1  # no less tells anything
    if found.steps > 1:
        assert found.seconds <= seconds * 1.01
    if found.steps * per_step < 0.9 * rules.MOST_PASSES * text and found.steps > 100:
        assert found.seconds >= seconds * 0.9


def test_the_steps_that_the_user_names_are_taken():
    found = schedule(seconds=60, step_seconds=1, tokens_per_step=2048, text_tokens=10**6, valid_tokens=10**5, context=256, steps=123)
    assert found.steps == 123


@given(a=st.integers(16, 4096), b=st.integers(16, 4096))
def test_a_wider_model_never_learns_at_a_higher_rate(a, b):
    assert learning_rate_for(max(a, b)) <= learning_rate_for(min(a, b)) <= rules.LEARNING_RATE
    assert learning_rate_for(rules.AT_WIDTH) == rules.LEARNING_RATE


def test_the_recipe_is_valid_at_every_rung_and_slower_where_a_model_goes_on():
    for size in rules.SIZES:
        for gpu in (False, True):
            fresh = recipe_for(hidden_size=size.hidden_size, tokens_seen=size.tokens_seen, gpu=gpu)
            tuned = recipe_for(hidden_size=size.hidden_size, tokens_seen=size.tokens_seen, gpu=gpu, fine_tuning=True)
            assert fresh.keep == "best" and fresh.optimizer == "muon"
            assert tuned.learning_rate < fresh.learning_rate and tuned.muon_learning_rate < fresh.muon_learning_rate
    assert vocabulary_for(1, 10) >= 257  # all bytes and the end of text
    assert vocabulary_for(1_000_000, 10) < vocabulary_for(1_000_000, 2)  # read more often


@given(passes=st.floats(0.01, 100), steps=st.floats(1, 1e7), more=st.floats(1, 10))
def test_a_text_that_is_read_again_and_again_decays_weights_more_the_shorter_it_is(passes, steps, more):
    found = weight_decay_for(passes, steps, rules.LEARNING_RATE)
    assert TrainConfig().weight_decay <= found <= rules.MOST_WEIGHT_DECAY
    assert weight_decay_for(passes, steps * more, rules.LEARNING_RATE) <= found <= weight_decay_for(passes * more, steps, rules.LEARNING_RATE)
    assert passes >= rules.REPEATED or found == TrainConfig().weight_decay


PLAN = Plan(texts=("a.txt",), minutes=10, vocab_size=1024, tokenizer="bpe", model="gam", valid_tokens=900, seconds=540)
FIGURES = Figures(
    documents=1, train_bytes=3000, train_tokens=1000, counted_tokens=1000, valid_tokens=2000, entries=1000, left_out=("1 file hidden: .x", "2 more"),
    layers="4 layers of gam", parameters=12_345, steps=7, device="cpu",
)  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"start": "runs/x"}, {"start": "runs/x", "chat": True}, {"minutes": 0}])
def test_the_plan_is_five_lines(changes):
    lines = list(explain(Plan(**PLAN.to_dict() | {"texts": PLAN.texts} | changes), TrainConfig(), FIGURES))
    assert len(lines) == 5 and not any("\n" in line for line in lines)
    together = "\n".join(lines)
    for said in ("1,000 tokens", "900 of 2,000", "1,000 entries", "12,345 parameters", "7 steps", "29 passes", "9.0 minutes", "1 file hidden: .x; 2 more"):
        assert said in together


def test_a_plan_says_why_it_takes_less_than_it_may():
    small = Figures(**{**FIGURES.__dict__, "steps": 10 * rules.MOST_PASSES, "train_tokens": 16 * 256 * 10})
    *_, time = explain(Plan(**PLAN.to_dict() | {"texts": ("a.txt",), "seconds": 60}), TrainConfig(), small)
    assert "the text is too small" in time


def test_a_plan_comes_back_from_json():
    assert Plan.from_dict(PLAN.to_dict()) == PLAN
    for broken in (None, {}, {"texts": 3}, PLAN.to_dict() | {"more": 1}, PLAN.to_dict() | {"valid_tokens": "x"}, PLAN.to_dict() | {"start": 3}):
        with pytest.raises(InputError, match="plan is broken"):
            Plan.from_dict(broken)


def test_the_ladder_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    import gam_lm.training.planning as planning
    from gam_lm.cli.main import run
    from gam_lm.results import read_results

    monkeypatch.setattr(planning, "step_times", lambda step, device, **options: [100.0] if step() else [])
    (tmp_path / "text.txt").write_text("".join(f"line {i % 37} of a text that says {i * i % 101}\n" for i in range(1200)), encoding="utf-8")
    command = ["bench-plan", "--data", str(tmp_path / "text.txt"), "--bytes", "20000", "--minutes", "0.01", "--sizes", "16x1", "--out", str(tmp_path / "out"),
               "--device", "cpu", "--vocab-sizes", "300"]  # fmt: skip
    assert run(command) == 0
    (first,) = read_results(tmp_path / "out/results.json")["rows"]
    assert run([*command, "--rates", "1", "2"]) == 0
    rows = read_results(tmp_path / "out/results.json")["rows"]
    assert rows[0] == first and [row["rate"] for row in rows] == [1.0, 2.0]
    assert rows[1]["train_config"]["learning_rate"] == 2 * first["train_config"]["learning_rate"]
    assert run([*command, "--batch-sizes", "2"]) == 0
    assert read_results(tmp_path / "out/results.json")["rows"][2]["train_config"]["batch_size"] == 2 != first["train_config"]["batch_size"]
    assert first["val_bits_per_byte"] > 0 and first["bigram_bits_per_byte"] < first["unigram_bits_per_byte"]
    assert "**" in capsys.readouterr().out


def test_the_line_of_the_batch_says_what_every_process_does():
    recipe = TrainConfig(batch_size=64, context=256, accumulate=8)
    assert batch_line(recipe, 1) == "batch       16,384 tokens a step: 64 sequences of 256, 8 at a time, accumulation 8"
    assert batch_line(recipe, 4).endswith("64 sequences of 256 on 4 processes, 8 at a time on each, accumulation 2")
    assert batch_line(recipe, 16).endswith("on 16 processes, 4 at a time on each, accumulation 1")
    assert "16,384 tokens a step (16,500 asked for)" in batch_line(recipe, 1, 16_500)


@given(tokens=st.integers(1, 10**7), context=st.sampled_from([16, 256, 1000]))
def test_tokens_of_a_step_are_whole_sequences_and_no_more_than_asked_for(tokens, context):
    if tokens < context:
        with pytest.raises(InputError, match=f"tokens_per_step is {tokens} .* use at least {context}"):
            rules.rows_of_step(tokens, context)
    else:
        assert tokens - context < rules.rows_of_step(tokens, context) * context <= tokens
