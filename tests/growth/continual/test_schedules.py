"""Learning rates: golden values, no jumps, exact resume, and torch's and the Trainer's loops."""

import json
import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apical.growth.continual import Infinite, RewarmCosine, ScheduleLR

PAPER = Infinite(peak=3e-4, warmup_steps=10, cooldown_steps=600, anneal_start=860, anneal_steps=140)
REWARM = RewarmCosine(peak=3e-4, steps=1000, warmup_steps=10)


def exactly(value):
    return pytest.approx(value, rel=1e-12, abs=0)


# evaluated from the published formulas with 30 digits
@pytest.mark.parametrize(
    ("shape", "step", "expected"),
    [
        pytest.param("cosine", 0, 0.0, id="start"),
        pytest.param("cosine", 5, 1.5e-4, id="half the warm-up"),
        pytest.param("cosine", 10, 3e-4, id="peak"),
        pytest.param("cosine", 160, 2.80229707730091957897e-4, id="quarter of the cosine"),
        pytest.param("cosine", 310, 2.325e-4, id="half the cosine"),
        pytest.param("isqrt", 160, 2.10035096209745939152e-4, id="quarter of the inverse root"),
        pytest.param("isqrt", 310, 1.85629522874516670778e-4, id="half the inverse root"),
        pytest.param("cosine", 610, 1.65e-4, id="constant begins"),
        pytest.param("isqrt", 610, 1.65e-4, id="constant begins, inverse root"),
        pytest.param("cosine", 700, 1.65e-4, id="constant"),
        pytest.param("cosine", 860, 1.65e-4, id="constant ends"),
        pytest.param("cosine", 930, 7.03562363973514433184e-5, id="half the annealing"),
        pytest.param("cosine", 1000, 3e-5, id="end"),
        pytest.param("cosine", 5000, 3e-5, id="after the end"),
    ],
)
def test_infinite_golden(shape, step, expected):
    assert replace(PAPER, shape=shape).value(step) == exactly(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        pytest.param(0, 0.0, id="start"),
        pytest.param(5, 1.5e-4, id="half the warm-up"),
        pytest.param(257, 2.60610757155496990810e-4, id="before the middle"),
        pytest.param(505, 1.65e-4, id="middle of the cosine"),
        pytest.param(9999, 3e-5, id="after the end"),
    ],
)
def test_rewarm_golden(step, expected):
    assert REWARM.value(step) == exactly(expected)


def test_ends_are_exact():
    assert REWARM.value(10) == 3e-4
    assert REWARM.value(1000) == 3e-4 * 0.1
    assert PAPER.value(10) == 3e-4
    assert PAPER.value(610) == PAPER.value(860) == 3e-4 * 0.55
    assert PAPER.value(1000) == 3e-4 * 0.1


def test_rewarm_without_warmup_begins_at_the_peak():
    assert RewarmCosine(peak=1.0, steps=10, warmup_steps=0).value(0) == 1.0


def test_rewarm_that_only_warms_up_stays_at_the_peak():
    only = RewarmCosine(peak=1.0, steps=10, warmup_steps=10)
    assert [only.value(step) for step in (5, 10, 11)] == [0.5, 1.0, 1.0]


def test_rewarm_reaches_zero_where_asked():
    assert RewarmCosine(peak=1.0, steps=10, warmup_steps=1, min_ratio=0).value(10) == 0.0


# phases so long that neighbours differ by less than 2e-5 of the peak where nothing jumps
LONG = 10**6
ratios = st.floats(0.01, 1.0)


@st.composite
def infinites(draw):
    constant = draw(ratios)
    warmup, cooldown = (draw(st.sampled_from([0, LONG])) for _ in range(2))
    return Infinite(
        peak=1.0,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        constant_ratio=constant,
        min_ratio=draw(st.sampled_from([0.0, 0.01, constant])) if constant >= 0.01 else 0.0,
        shape=draw(st.sampled_from(["cosine", "isqrt"])),
        timescale=draw(st.floats(0.1, 10.0)),
        anneal_start=warmup + cooldown + draw(st.sampled_from([0, LONG])),
        anneal_steps=LONG,
    )


@given(infinites())
def test_infinite_has_no_jump(schedule):
    cooled = schedule.warmup_steps + schedule.cooldown_steps
    start = schedule.anneal_start
    for boundary in (schedule.warmup_steps, cooled, start, start + schedule.anneal_steps):
        for step in range(max(0, boundary - 2), boundary + 2):
            assert abs(schedule.value(step + 1) - schedule.value(step)) < 2e-5


@given(infinites(), st.integers(0, 5 * LONG), st.integers(0, LONG))
def test_infinite_falls_after_the_warmup(schedule, step, ahead):
    step = max(step, schedule.warmup_steps)
    assert schedule.value(step + ahead) <= schedule.value(step) * (1 + 1e-12)


@given(infinites(), st.integers(0, 5 * LONG))
def test_infinite_stays_between_its_bounds(schedule, step):
    lowest = 0.0 if step < schedule.warmup_steps else schedule.min_ratio
    assert lowest * (1 - 1e-12) <= schedule.value(step) <= 1.0


def test_constant_is_open_ended_and_can_be_annealed_late():
    base = Infinite(peak=1.0, warmup_steps=1, cooldown_steps=9)
    assert base.value(10**9) == 0.55
    late = base.anneal(start=10**9, steps=100)
    assert late.value(10**9) == base.value(10**9)
    assert late.value(10**9 + 50) == exactly(math.sqrt(0.55 * 0.1))
    assert late.value(10**9 + 100) == 0.1


def test_annealing_to_zero_is_linear():
    schedule = Infinite(
        peak=1.0, warmup_steps=0, cooldown_steps=0, min_ratio=0, anneal_start=0, anneal_steps=4
    )
    expected = [0.55 * share for share in (1, 0.75, 0.5, 0.25, 0, 0)]
    assert [schedule.value(step) for step in range(6)] == exactly(expected)


def test_without_cooldown_the_warmup_ends_at_the_constant():
    schedule = Infinite(peak=1.0, warmup_steps=2, cooldown_steps=0)
    assert [schedule.value(step) for step in range(4)] == exactly([0, 0.275, 0.55, 0.55])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"peak": 0.0}, "peak", id="no peak"),
        pytest.param({"peak": math.nan}, "peak", id="nan is no number"),
        pytest.param({"warmup_steps": -1}, "warmup_steps", id="negative warm-up"),
        pytest.param({"cooldown_steps": -1}, "cooldown_steps", id="negative cool-down"),
        pytest.param({"constant_ratio": 0.0}, "constant_ratio", id="no constant"),
        pytest.param({"constant_ratio": 1.1}, "constant_ratio", id="constant above the peak"),
        pytest.param({"min_ratio": 0.6}, "min_ratio", id="annealing upwards"),
        pytest.param({"shape": "linear"}, "shape", id="unknown shape"),
        pytest.param({"timescale": 0.0}, "timescale", id="division by zero"),
        pytest.param({"anneal_start": 609}, "anneal_start", id="annealing inside the cool-down"),
        pytest.param({"anneal_steps": None}, "anneal_start", id="half an annealing"),
        pytest.param({"anneal_steps": 0}, "anneal_steps", id="annealing at once"),
    ],
)
def test_infinite_refuses(changes, named):
    with pytest.raises(ValueError, match=f"Infinite: {named} is .*expected"):
        replace(PAPER, **changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"peak": -1.0}, "peak", id="negative peak"),
        pytest.param({"steps": 0}, "steps", id="no steps"),
        pytest.param({"warmup_steps": 1001}, "warmup_steps", id="warm-up longer than the phase"),
        pytest.param({"min_ratio": 1.5}, "min_ratio", id="cosine upwards"),
    ],
)
def test_rewarm_refuses(changes, named):
    with pytest.raises(ValueError, match=f"RewarmCosine: {named} is .*expected"):
        replace(REWARM, **changes)


@pytest.mark.parametrize("schedule", [PAPER, REWARM], ids=["infinite", "rewarm"])
def test_negative_steps_are_refused(schedule):
    with pytest.raises(ValueError, match="step is -1"):
        schedule.value(-1)


def optimizer_of(schedule, *ratios):
    groups = [
        {"params": [torch.nn.Parameter(torch.ones(2))], "lr": schedule.peak * ratio}
        for ratio in ratios
    ]
    return torch.optim.AdamW(groups, lr=schedule.peak)


def advance(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", [PAPER, REWARM], ids=["infinite", "rewarm"])
def test_plain_loop_follows_the_closed_form(schedule):
    optimizer = optimizer_of(schedule, 1.0)
    rates = advance(optimizer, ScheduleLR(optimizer, schedule), 1010)
    assert rates == [[schedule.value(step)] for step in range(1010)]


def test_groups_keep_their_ratios():
    optimizer = optimizer_of(PAPER, 1.0, 0.25, 10.0)
    for step, rates in enumerate(advance(optimizer, ScheduleLR(optimizer, PAPER), 40)):
        value = PAPER.value(step)
        assert rates == exactly([value, value / 4, value * 10])


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(0, id="before the first update"),
        pytest.param(1, id="where torch checks the order of calls"),
        pytest.param(300, id="inside the cool-down"),
        pytest.param(900, id="inside the annealing"),
    ],
)
def test_resume_anywhere(step):
    optimizer = optimizer_of(PAPER, 1.0, 0.5)
    scheduler = ScheduleLR(optimizer, PAPER)
    advance(optimizer, scheduler, step)
    saved = json.loads(json.dumps(scheduler.state_dict()))
    rest = advance(optimizer, scheduler, 20)

    again = optimizer_of(PAPER, 1.0, 0.5)
    resumed = ScheduleLR(again, PAPER)
    resumed.load_state_dict(saved)
    assert resumed.get_last_lr() == rest[0]
    assert advance(again, resumed, 20) == rest


def test_state_holds_every_shape_parameter():
    state = ScheduleLR(optimizer_of(PAPER, 1.0), PAPER).state_dict()
    assert state["schedule"] == {
        "kind": "Infinite",
        **{name: getattr(PAPER, name) for name in Infinite.__dataclass_fields__},
    }


def test_another_schedule_is_refused_with_the_differences():
    saved = ScheduleLR(optimizer_of(PAPER, 1.0), PAPER).state_dict()
    other = replace(PAPER, timescale=3.0, cooldown_steps=500)
    scheduler = ScheduleLR(optimizer_of(other, 1.0), other)
    with pytest.raises(ValueError, match=r"cooldown_steps was 600, is 500; timescale was 10.0"):
        scheduler.load_state_dict(saved)


def test_another_kind_is_refused():
    saved = ScheduleLR(optimizer_of(PAPER, 1.0), PAPER).state_dict()
    with pytest.raises(ValueError, match="kind was Infinite, is RewarmCosine"):
        ScheduleLR(optimizer_of(REWARM, 1.0), REWARM).load_state_dict(saved)


def test_other_groups_are_refused():
    saved = ScheduleLR(optimizer_of(PAPER, 1.0, 0.5), PAPER).state_dict()
    with pytest.raises(ValueError, match="base_lrs was"):
        ScheduleLR(optimizer_of(PAPER, 1.0), PAPER).load_state_dict(saved)


def test_annealing_can_begin_late_on_resume(caplog):
    constant = Infinite(peak=1.0, warmup_steps=2, cooldown_steps=3)
    optimizer = optimizer_of(constant, 1.0)
    scheduler = ScheduleLR(optimizer, constant)
    advance(optimizer, scheduler, 50)

    annealed = constant.anneal(start=50, steps=10)
    again = optimizer_of(annealed, 1.0)
    resumed = ScheduleLR(again, annealed)
    with caplog.at_level(logging.WARNING):
        resumed.load_state_dict(scheduler.state_dict(), strict=False)
    assert "anneal_start was None, is 50" in caplog.text
    assert advance(again, resumed, 12) == [[annealed.value(step)] for step in range(50, 62)]


def test_an_optimizer_of_another_peak_is_refused():
    with pytest.raises(ValueError, match=r"none of them schedule.peak=0.0003"):
        ScheduleLR(optimizer_of(PAPER, 0.5), PAPER)


def test_trainer_takes_it_and_resumes(tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    whole = trained(tmp_path / "whole", steps=6)
    trained(tmp_path / "cut", steps=3)
    resumed = trained(tmp_path / "cut", steps=6, resume=True)
    assert whole == [TRAINED.value(step) for step in range(6)]
    assert resumed == whole


TRAINED = Infinite(peak=1e-2, warmup_steps=1, cooldown_steps=2, anneal_start=4, anneal_steps=2)


class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x, labels):
        return {"loss": (self.linear(x) - labels).square().mean()}


def trained(output, *, steps, resume=False):
    from transformers import Trainer, TrainingArguments

    # a list is a dataset, and any scheduler will do: the Trainer's types are narrower than it is
    rows: Any = [{"x": torch.tensor([float(i), 1.0]), "labels": torch.ones(1)} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        save_steps=3,
        logging_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINED.peak)
    pair: Any = (optimizer, ScheduleLR(optimizer, TRAINED))
    trainer = Trainer(model, arguments, train_dataset=rows, optimizers=pair)
    trainer.train(resume_from_checkpoint=resume)
    return [log["learning_rate"] for log in trainer.state.log_history if "learning_rate" in log]
