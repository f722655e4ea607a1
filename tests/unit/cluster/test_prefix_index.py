"""Which replicas a router takes to hold a prompt's beginning."""

from cluster.prefix_index import PrefixIndex


def test_matches_count_from_the_first_block() -> None:
    """Each replica's count ends at the first block that it lacks."""
    index = PrefixIndex(100)
    index.insert([1, 2, 3], 0)
    index.insert([1, 2], 2)
    assert list(index.matches([1, 2, 3, 4], 3)) == [3, 0, 2]
    assert list(index.matches([2, 3], 3)) == [2, 0, 1]
    assert list(index.matches([9], 3)) == [0, 0, 0]


def test_a_replica_forgets_what_it_used_least_recently() -> None:
    """Beyond its size the oldest blocks go, and one that was used again is not old."""
    index = PrefixIndex(3)
    index.insert([1, 2, 3], 0)
    index.insert([1, 4], 0)
    assert (index.matches([1], 1)[0], index.matches([2], 1)[0], index.size(0)) == (1, 0, 3)


def test_a_lost_cache_is_forgotten_for_one_replica_alone() -> None:
    """Others keep theirs."""
    index = PrefixIndex(10)
    index.insert([1], 0)
    index.insert([1], 1)
    index.forget(0)
    index.forget(5)
    assert list(index.matches([1], 2)) == [0, 1]


def test_blocks_move_with_their_replicas() -> None:
    """When replicas come and go each keeps its blocks in its new row, and those of one that is gone are nobody's."""
    index = PrefixIndex(10)
    index.insert([1, 2], 0)
    index.insert([1], 1)
    index.insert([1, 3], 2)
    index.move({2: 0, 1: 2})
    assert list(index.matches([1, 3], 3)) == [2, 0, 1]
    assert list(index.matches([1, 2], 3)) == [1, 0, 1]
    assert [index.size(row) for row in range(3)] == [2, 0, 1]
    index.most = 1
    index.insert([4], 0)
    assert list(index.matches([1], 3)) == [0, 0, 1]
