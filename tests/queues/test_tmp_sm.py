from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from tests.queues.test_state_machine import LaneMachine


def test_sm(make_lane):
    LaneMachine.make_lane = staticmethod(make_lane)
    run_state_machine_as_test(
        LaneMachine,
        settings=settings(
            max_examples=8,
            stateful_step_count=40,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
