"""The controller's memory of what it decided."""

from cluster.decision import Decision, DecisionLog


def test_the_last_ones_newest_first() -> None:
    """As many as were asked for, about the subjects that were asked about, with their age."""
    log = DecisionLog()
    for number in range(10):
        log.add(Decision("target", f"engine#{number % 2}", str(number), "because", {"running": number}), number)
    found = log.last(3, "#1", now_s=12.0)
    assert [(one["action"], one["age_s"]) for one in found] == [("9", 3.0), ("7", 5.0), ("5", 7.0)]
    assert found[0] == {
        "age_s": 3.0, "kind": "target", "subject": "engine#1", "action": "9", "reason": "because",
        "inputs": {"running": 9},
    }  # fmt: skip
    assert len(log.last(100, "", 12.0)) == 10
    assert log.last(0, "", 12.0) == []


def test_only_so_many_are_kept() -> None:
    """The oldest go first."""
    log = DecisionLog(kept=3)
    for number in range(5):
        log.add(Decision("scale", "m", str(number), ""), number)
    assert [one["action"] for one in log.last(10, "", 5.0)] == ["4", "3", "2"]
    assert log.counts == {"scale": 5}, "those that are forgotten count on"
