"""An engine's counts between two calls of its replica's ``stats``: none is lost, none told twice."""

from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

from replicas.engine_host import _with_counts_of, _without_counts


def step(running: int, hits: int, loaded: int | None) -> SchedulerStats:
    """What an engine says of a step; loaded: tokens that a connector has loaded, None where there is none."""
    stats = SchedulerStats(num_running_reqs=running)
    stats.prefix_cache_stats.record(100, hits, preempted=False)
    if loaded is not None:
        stats.connector_prefix_cache_stats = PrefixCacheStats()
        stats.connector_prefix_cache_stats.record(100 - hits, loaded, preempted=False)
    return stats


def test_counts_of_steps_are_added_until_they_are_told() -> None:
    stats = SchedulerStats()
    for number, loaded in enumerate((None, 30, 20, None)):
        stats = _with_counts_of(step(number, 10, loaded), stats)
    assert (stats.num_running_reqs, stats.prefix_cache_stats.queries, stats.prefix_cache_stats.hits) == (3, 400, 40)
    assert stats.connector_prefix_cache_stats is not None
    assert (stats.connector_prefix_cache_stats.queries, stats.connector_prefix_cache_stats.hits) == (180, 50)
    told = _without_counts(stats)
    assert (told.num_running_reqs, told.prefix_cache_stats.hits, told.connector_prefix_cache_stats) == (3, 0, None)
