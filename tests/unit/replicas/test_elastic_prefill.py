"""Who is set aside for a prompt, who comes back, and how far that may go. No engine."""

from hypothesis import given
from hypothesis import strategies as st

from replicas.elastic_prefill import Claim, ElasticPrefill, Line, Objectives, choose

CLAIMS = st.lists(st.integers(1, 9), max_size=5)


def claims(name: str, blocks: list[int]) -> list[Claim]:
    return [Claim(f"{name}{i}", count) for i, count in enumerate(blocks)]


def line(
    free: int, newcomer: int | None = None, aside: tuple[int, ...] = (), movable: tuple[int, ...] = (), running: int = 1
) -> Line:
    new = Claim("new", newcomer) if newcomer is not None else None
    return Line(free, new, claims("aside", list(aside)), claims("run", list(movable)), running=bool(running))


def test_a_prompt_that_fits_moves_nobody() -> None:
    choice = choose(line(free=5, newcomer=5, movable=(4,)), logical_blocks=100)
    assert (list(choice.displace), choice.admit) == ([], "new")


def test_the_first_of_the_movable_make_way() -> None:
    """As few as the prompt needs, in their order."""
    choice = choose(line(free=1, newcomer=6, movable=(2, 3, 4)), logical_blocks=100)
    assert (list(choice.displace), choice.admit) == (["run0", "run1"], "new")


def test_nobody_moves_where_it_does_not_help() -> None:
    """Not for a prompt that would not fit even then, and not beyond the logical size."""
    assert not choose(line(free=1, newcomer=9, movable=(2, 3)), logical_blocks=100).displace
    assert not choose(line(free=1, newcomer=6, movable=(2, 3)), logical_blocks=4).displace
    assert not choose(line(free=1, newcomer=6, movable=(5,), aside=(6,)), logical_blocks=10).displace


def test_newcomers_go_first_up_to_the_logical_size_and_then_wait() -> None:
    """A place that became free: within the logical size it computes the next prompt; beyond, the oldest that was set
    aside takes it, and the prompt waits although it would fit."""
    place = line(free=4, newcomer=4, aside=(4, 4))
    early = choose(place, logical_blocks=12)
    assert (list(early.resume), early.admit) == ([], "new")
    late = choose(place, logical_blocks=11)
    assert (list(late.resume), late.admit) == (["aside0"], None)


def test_the_oldest_is_not_overtaken() -> None:
    """One that was set aside and does not fit yet is not passed by smaller ones behind it, nor by prompts."""
    choice = choose(line(free=4, newcomer=2, aside=(6, 1)), logical_blocks=8)
    assert (list(choice.resume), choice.admit) == ([], None)


def test_somebody_always_runs() -> None:
    """Where nothing runs, the oldest goes on even where the lease is below what it needs."""
    assert list(choose(line(free=0, aside=(6, 1), running=0), logical_blocks=8).resume) == ["aside0"]


@given(st.integers(-5, 20), st.none() | st.integers(1, 9), CLAIMS, CLAIMS, st.integers(0, 40))
def test_what_is_chosen_fits(
    free: int, newcomer: int | None, aside: list[int], movable: list[int], logical: int
) -> None:
    """What is let in fits what is free, what is set aside fits the logical size, and the order is kept."""
    choice = choose(line(free, newcomer, tuple(aside), tuple(movable)), logical)
    moved = [claim.blocks for claim in claims("run", movable) if claim.request_id in choice.displace]
    back = [claim.blocks for claim in claims("aside", aside) if claim.request_id in choice.resume]
    assert list(choice.displace) == [f"run{i}" for i in range(len(moved))]
    assert list(choice.resume) == [f"aside{i}" for i in range(len(back))]
    taken = sum(back) + (newcomer or 0) * bool(moved)
    assert not taken or taken <= free + sum(moved)
    assert not moved or sum(aside) + sum(moved) <= logical
    assert not moved or choice.admit


def test_who_is_set_aside_stays_out_until_there_is_room() -> None:
    """Nobody new overtakes one that is set aside, but the prompt that it made way for."""
    prefill = ElasticPrefill(Objectives(1.0, 1.0), floor_blocks=50, ceiling_blocks=50)
    prefill.arrive("new", 0.0)
    prefill.observe(0.6, "new", tokens={})
    assert list(prefill.decide(line(free=0, newcomer=3, movable=(3,)))) == ["run0"]
    assert prefill.holds("run0", new=False)
    assert not prefill.holds("new", new=True)
    assert prefill.holds("behind", new=True)
    prefill.decide(Line(3, None, [Claim("run0", 3)], [], running=True))
    assert list(prefill.aside) == []
    assert not prefill.holds("run0", new=False)
    assert not prefill.holds("behind", new=True)


def test_those_who_can_wait_longest_make_way_and_those_who_cannot_do_not() -> None:
    """The answer that began last has most of its time left; one whose time is nearly over is left alone."""
    prefill = ElasticPrefill(Objectives(ttft_s=4.0, tpot_s=1.0), floor_blocks=50, ceiling_blocks=50)
    prefill.observe(0.0, newcomer=None, tokens={"early": 1})
    prefill.observe(30.0, newcomer=None, tokens={"early": 1, "late": 1})
    assert prefill.movable(["early", "late"]) == ["late", "early"]
    prefill.observe(62.0, newcomer=None, tokens={"early": 1, "late": 1})
    assert prefill.movable(["early", "late"]) == ["late"]
    prefill.forget("late")
    prefill.observe(70.0, newcomer=None, tokens={"early": 1, "new": 1})
    assert prefill.movable(["early", "new"]) == ["new"]


def test_nobody_moves_while_there_is_time() -> None:
    """A prompt that has waited for less than a fifth of its objective displaces nobody."""
    prefill = ElasticPrefill(Objectives(1.0, 1.0), floor_blocks=50, ceiling_blocks=50)
    prefill.arrive("new", 7.0)
    prefill.observe(7.1, "new", tokens={})
    assert not prefill.decide(line(free=0, newcomer=3, movable=(3,)))
    prefill.observe(7.3, "new", tokens={})
    assert prefill.decide(line(free=0, newcomer=3, movable=(3,)))


def test_the_size_follows_the_objectives() -> None:
    """It begins with the whole host buffer. Answers that are late, one that is set aside too, let fewer in; late first
    tokens more again."""
    prefill = ElasticPrefill(Objectives(ttft_s=1.0, tpot_s=0.5), floor_blocks=4, ceiling_blocks=12)
    assert prefill.logical_blocks == 12
    for step in range(400):
        prefill.observe(now_s=step / 5, newcomer=None, tokens={"a": 1})
    assert prefill.logical_blocks == 4
    prefill.forget("a")
    prefill.arrive("new", 98.0)
    for step in range(200):
        prefill.observe(now_s=100 + step / 10, newcomer="new", tokens={})
    assert prefill.logical_blocks == 12
