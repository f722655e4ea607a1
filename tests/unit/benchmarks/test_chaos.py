"""The pure parts of the fault soak: whose turn it is, where answers part, what a run comes to."""

import itertools
import json

from benchmarks.chaos.comparison import Mismatch, first_mismatch
from benchmarks.chaos.kills import Kill, Kind, Turns, most_streams
from benchmarks.chaos.streams import ANSWER_TOKENS, PROMPT_TOKENS, Stream, made_prompts
from benchmarks.chaos.summary import Found, details, headline
from benchmarks.chaos.view import Engine, Snapshot, back_after

WITHOUT_INGRESS = set(Kind) - {Kind.INGRESS}


def engine(name: str, node: str = "one") -> Engine:
    return Engine(name, 1, node, requests=0, used_bytes=0, conservation_failures=0)


def snapshot(*engines: Engine, controller_pid: int = 7, **agents: int) -> Snapshot:
    return Snapshot(controller_pid, agents, {one.engine_id: one for one in engines})


def test_each_round_has_every_kind_once() -> None:
    """The ingress only where it is asked for; the order follows from the seed, and differs from round to round."""
    rounds = [list(itertools.islice(Turns(3), start, start + 6)) for start in range(0, 60, 6)]
    assert all(set(one) == WITHOUT_INGRESS for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert list(itertools.islice(Turns(4), 60)) != list(itertools.chain(*rounds))
    assert set(itertools.islice(Turns(3, ingress=True), 7)) == set(Kind)


def test_the_victim_has_the_most_requests() -> None:
    """None where no engine that may be killed has any."""
    running = {"a": 1, "b": 3, "c": 5}
    assert most_streams(running, running) == "c"
    assert most_streams(running, {"a", "b"}) == "b"
    assert most_streams({"a": 0}, {"a"}) is None
    assert most_streams({}, {"a"}) is None


def test_where_answers_part() -> None:
    """The first token that differs, or the end of the shorter one."""
    assert first_mismatch(0, [1, 2, 3], [1, 2, 3]) is None
    assert first_mismatch(4, [1, 2, 3], [1, 5, 3]) == Mismatch(4, 1, right=2, got=5)
    assert first_mismatch(4, [1, 2, 3], [1, 2]) == Mismatch(4, 2, right=3, got=None)
    assert first_mismatch(4, [1, 2], [1, 2, 2]) == Mismatch(4, 2, right=None, got=2)


def test_prompts_are_distinct_and_follow_from_the_seed() -> None:
    prompts = made_prompts(50, 1)
    assert prompts == made_prompts(50, 1) != made_prompts(50, 2)
    assert len({tuple(one.ids) for one in prompts}) == 50
    assert all(PROMPT_TOKENS[0] <= len(one.ids) <= PROMPT_TOKENS[1] for one in prompts)
    assert all(ANSWER_TOKENS[0] <= one.tokens <= ANSWER_TOKENS[1] for one in prompts)


def test_the_longest_pause_of_a_stream() -> None:
    """Between two pieces; how long the first one took is none."""
    stream = Stream(made_prompts(1, 1)[0])
    for at_s in (10.0, 10.5, 13.0, 13.1):
        stream.take([1], at_s)
    assert stream.longest_pause_s == 2.5 and stream.last_s == 13.1 and stream.ids == [1, 1, 1, 1]


def test_when_what_was_killed_is_back() -> None:
    """Replicas by their number without those that are gone, agents and controllers by another process."""
    before = snapshot(engine("a"), engine("b", "two"), one=11, two=12)
    is_back = back_after(Kind.ENGINE, before, "a", 2)
    assert not is_back(before) and not is_back(snapshot(engine("b", "two")))
    assert is_back(snapshot(engine("b", "two"), engine("c")))
    node = back_after(Kind.RAYLET, before, "one", 2)
    assert not node(snapshot(engine("a"), engine("b", "two"))) and node(
        snapshot(engine("b", "two"), engine("c", "two"))
    )
    agent = back_after(Kind.AGENT, before, "one", 2)
    assert not agent(before) and not agent(snapshot(two=12)) and agent(snapshot(one=13, two=12))
    controller = back_after(Kind.CONTROLLER, before, "", 2)
    assert not controller(before) and controller(snapshot(controller_pid=8))


def test_the_headline_counts_kills_and_not_drains() -> None:
    kills = [
        Kill(Kind.ENGINE, 20.0, "a", 3, 7, recovered_s=12.0),
        Kill(Kind.DRAIN, 40.0, "b", 2, 8, recovered_s=0.5),
        Kill(Kind.ENGINE, 60.0, "c", 2, 6),
    ]
    found = Found(kills=kills, answers=9, migrations={"moved": 2, "failed": 1}, lost=["prompt 1: refused"])
    assert headline(found) == {
        "requests_lost": 1,
        "wrong_tokens": 0,
        "kills_by_kind": {"engine": 2},
        "inflight_at_kill": [7, 6],
        "recovered": 1,
        "migrations_completed": 2,
    }
    assert details(found)["recovered_s_by_kind"] == {"engine": [12.0], "drain": [0.5]}
    json.dumps(details(found))


def test_what_fails_a_run() -> None:
    """Anything lost, wrong, not conserved, not at rest, left behind or not back."""
    assert not Found(kills=[Kill(Kind.AGENT, 20.0, "a", None, 7, recovered_s=1.0)]).failed
    assert Found(kills=[Kill(Kind.AGENT, 20.0, "a", None, 7)]).failed
    assert all(
        one.failed
        for one in (
            Found(lost=["x"]),
            Found(wrong=[Mismatch(0, 0, 1, 2)]),
            Found(conservation_failures=1),
            Found(unsettled=["x"]),
            Found(left=["x"]),
        )
    )
