from __future__ import annotations

import json

import pytest

from heliostat.clock import US_PER_DAY, US_PER_HOUR
from heliostat.monitoring.verdict import Finding, Severity, Verdict
from heliostat.retraining import DUE_EXIT_CODE, Decision, State, decide
from heliostat.settings import RetrainingSettings

NOW_US = 1_000 * US_PER_DAY
PLAIN = RetrainingSettings(max_age="7d", min_performance_ratio=0.95, on_drift="retrain", cooldown="1d")


def _verdict(check: str, *findings: Finding) -> Verdict:
    return Verdict(check, "churn", 3, NOW_US, 0, NOW_US, 500, findings)


def _performance(ratio: float, severity: Severity = Severity.OK) -> Verdict:
    return _verdict("performance", Finding("auc", severity, "", {"ratio": ratio}))


def _drift(**distances: float) -> Verdict:
    return _verdict(
        "drift",
        *(
            Finding(name, Severity.ALARM if far else Severity.OK, "", {"js_distance": far})
            for name, far in distances.items()
        ),
    )


def _state(
    *, age_us: int = 2 * US_PER_DAY, performance: Verdict | None = None, drift: Verdict | None = None
) -> State:
    trained_us = NOW_US - age_us
    return State("churn", 3, trained_us, trained_us, performance or _performance(1.0), drift or _drift(spent=0.0))


def _decide(state: State, policy: RetrainingSettings = PLAIN) -> Decision:
    return decide(state, policy, now_us=NOW_US)


# ── The three plain triggers ────────────────────────────────────────────────────────


def test_a_young_good_and_steady_model_is_not_due() -> None:
    decision = _decide(_state())
    assert (decision.due, decision.reasons, decision.exit_code) == (False, (), 0)


def test_a_model_older_than_a_week_is_due() -> None:
    decision = _decide(_state(age_us=7 * US_PER_DAY + 1))
    assert decision.due
    assert decision.exit_code == DUE_EXIT_CODE
    assert [reason.trigger for reason in decision.reasons] == ["age"]


def test_a_model_of_exactly_a_week_is_not_due() -> None:
    assert not _decide(_state(age_us=7 * US_PER_DAY)).due


@pytest.mark.parametrize(("ratio", "due"), [(0.9499, True), (0.95, False), (1.2, False)])
def test_performance_below_the_ratio_is_due(ratio: float, due: bool) -> None:
    assert _decide(_state(performance=_performance(ratio))).due is due


def test_the_reason_says_whether_the_interval_agrees() -> None:
    (sure,) = _decide(_state(performance=_performance(0.8, Severity.ALARM))).reasons
    (unsure,) = _decide(_state(performance=_performance(0.8))).reasons
    assert "the interval agrees" in sure.message
    assert "still covers no change" in unsure.message


def test_drift_is_due_where_the_policy_says_so_and_names_the_worst_first() -> None:
    decision = _decide(_state(drift=_drift(spent=0.2, visits=0.6, days=0.0)))
    assert decision.due
    (reason,) = decision.reasons
    assert reason.evidence["moved"] == ["visits", "spent"]


def test_drift_alone_only_asks_for_a_look_by_default() -> None:
    decision = _decide(_state(drift=_drift(spent=0.6)), RetrainingSettings())
    assert not decision.due
    assert [reason.wants for reason in decision.reasons] == ["look"]


@pytest.mark.parametrize("off", [{"max_age": None}, {"min_performance_ratio": None}, {"on_drift": "ignore"}])
def test_each_trigger_can_be_switched_off(off: dict[str, str | None]) -> None:
    worst = _state(age_us=30 * US_PER_DAY, performance=_performance(0.5), drift=_drift(spent=0.9))
    assert len(_decide(worst).reasons) == 3
    assert len(_decide(worst, PLAIN.model_copy(update=off)).reasons) == 2


def test_a_model_that_never_served_is_due() -> None:
    decision = _decide(State("churn", None, None, None))
    assert decision.due
    assert decision.reasons[0].trigger == "nothing serves"


# ── What holds it back, and what isn't known ────────────────────────────────────────


def test_the_cool_down_holds_a_due_retraining_back_and_says_until_when() -> None:
    recent_us = NOW_US - 23 * US_PER_HOUR
    state = State("churn", 3, NOW_US - 30 * US_PER_DAY, recent_us, _performance(1.0), _drift(spent=0.0))
    decision = _decide(state)
    assert not decision.due
    assert decision.held_until_us == NOW_US + US_PER_HOUR
    assert [reason.trigger for reason in decision.reasons] == ["age"]
    assert "held back by the cool-down" in decision.lines()[0]


def test_after_the_cool_down_it_is_due_again() -> None:
    state = State("churn", 3, NOW_US - 30 * US_PER_DAY, NOW_US - US_PER_DAY, _performance(1.0), _drift(spent=0.0))
    assert _decide(state).due


def test_checks_that_never_ran_are_told_and_decide_nothing() -> None:
    decision = _decide(State("churn", 3, NOW_US, NOW_US))
    assert not decision.due
    assert len(decision.unknown) == 2


def test_too_few_labels_are_unknown_and_not_bad() -> None:
    few = _verdict("performance", Finding("auc", Severity.INSUFFICIENT, "3 of 900 predictions have a label", {}))
    decision = _decide(_state(performance=few))
    assert not decision.due
    assert decision.unknown == ("performance: 3 of 900 predictions have a label",)


def test_a_decision_survives_json() -> None:
    decision = _decide(_state(age_us=30 * US_PER_DAY, performance=_performance(0.5), drift=_drift(a=0.9, b=0.0)))
    assert Decision.from_dict(json.loads(json.dumps(decision.to_dict()))) == decision
