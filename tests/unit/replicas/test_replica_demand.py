"""What a replica says that it is asked for."""

from replicas.replica_demand import QueueBook, ReplicaDemand, TokenMeter, demand_of
from replicas.step_time import StepTime


def test_rates_are_of_the_time_since_the_last_look() -> None:
    """What was counted is told once."""
    meter = TokenMeter(10.0)
    meter.prompt_tokens, meter.prompts, meter.output_tokens = 600, 3, 100
    assert meter.rates(12.0) == (300.0, 50.0, 1.5)
    assert meter.rates(14.0) == (0.0, 0.0, 0.0)
    assert meter.rates(14.0) == (0.0, 0.0, 0.0)


def test_stats_come_back_as_they_were() -> None:
    """By name, as Ray Serve carries them; a replica that has told less counts for nothing there."""
    asked = ReplicaDemand(prompt_rate=5.0, running=2.0, step_s=0.01, row_s=0.001)
    assert demand_of(asked.to_stats()) == asked
    assert asked.step_time == StepTime(0.01, 0.001)
    assert demand_of({}).step_time is None


def test_queues_of_all_ingresses_add_up_until_they_are_silent() -> None:
    """Each ingress replaces what it told before; one that is gone waits for nothing."""
    book = QueueBook()
    book.tell("a", 9, 10.0)
    book.tell("a", 4, 11.0)
    book.tell("b", 3, 14.0)
    assert book.total(15.0) == 7
    assert book.total(17.0) == 3
    assert book.total(30.0) == 0
