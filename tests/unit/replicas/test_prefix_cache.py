"""What an engine's prefix cache keeps, and what goes to the host buffer."""

from replicas.prefix_cache import PrefixCache


def test_matches_only_from_the_first_block_on() -> None:
    """A later block without the one before it is of no use."""
    cache = PrefixCache(blocks_each=4)
    cache.hold([1, 2, 3])
    assert cache.match([1, 2, 9, 3]) == (2, 0)
    assert cache.match([2, 3]) == (2, 0)
    assert cache.match([9, 1]) == (0, 0)


def test_kept_until_the_last_user_is_gone_and_then_until_memory_is_needed() -> None:
    """A block that two requests hold is idle when both are done; the least recently used goes first."""
    cache = PrefixCache(blocks_each=4)
    cache.hold([1])
    cache.hold([1, 2])
    cache.release([1])
    assert (cache.held_blocks, cache.idle_blocks) == (8, 0)
    cache.release([1, 2])
    assert (cache.held_blocks, cache.idle_blocks) == (0, 8)
    cache.push_out(3)  # a part of a block is the whole of it
    assert cache.match([1, 2]) == (1, 0)


def test_what_is_pushed_out_is_found_in_the_host_buffer() -> None:
    """Blocks on the device come first, those in the host buffer continue them; the oldest there make room."""
    cache = PrefixCache(blocks_each=4, host_blocks=8)
    cache.hold([1, 2, 3])
    cache.release([1, 2, 3])
    cache.push_out(8)
    assert cache.match([1, 2, 3]) == (1, 2)
    assert cache.host_used_blocks == 8
    assert cache.store("other", 4)
    assert cache.match([1, 2, 3]) == (1, 1)  # 3 was pushed out first
    assert not cache.store("too large", 9)


def test_what_is_taken_back_is_gone_from_the_host_buffer() -> None:
    """A request that resumes takes its own blocks once."""
    cache = PrefixCache(blocks_each=4, host_blocks=8)
    assert cache.store("mine", 5)
    assert cache.take_back("mine") and not cache.take_back("mine")
    assert cache.host_used_blocks == 0
