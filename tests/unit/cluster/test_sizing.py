"""From configuration and memory to sizes: invariants, and refusals whose remedies work."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import ClusterConfig
from cluster.device import HOST, KvUnit, gpu
from cluster.host_memory import free_memory_bytes
from cluster.models import ModelFacts
from cluster.sizing import GIB, MIB, plan_sizes
from memory_agent.errors import SettingsError
from memory_agent.lease_board import LIMIT_UNIT_BYTES

BLOCK = 128
SMOL_TOKEN_BYTES = 23040


def facts(
    max_model_len: int = 8192, kv_token_bytes: int = SMOL_TOKEN_BYTES, weights_bytes: int = 269 * MIB
) -> ModelFacts:
    return ModelFacts(Path("/m"), "bfloat16", max_model_len, weights_bytes, kv_token_bytes, 24_000, 480_000)


def config(**tree: object) -> ClusterConfig:
    return ClusterConfig.model_validate(tree)


def test_defaults_on_a_roomy_machine() -> None:
    """Two small replicas share one GiB; each may take all of it, and keeps a 64th at rest."""
    sizing = plan_sizes(ClusterConfig(), [facts()], 24 * GIB)
    (spec,) = sizing.specs
    assert sizing.budget_bytes == GIB
    assert spec.kv_guarantee_bytes >= (8192 // BLOCK + 2) * BLOCK * SMOL_TOKEN_BYTES
    assert GIB - BLOCK * SMOL_TOKEN_BYTES < spec.kv_ceiling_bytes <= GIB
    assert 0 < spec.kv_rest_bytes <= GIB // 64
    assert spec.engine_args == {"enforce_eager": True}


def test_memory_is_planned_for_the_most_replicas() -> None:
    """A model that begins with one replica and may have four needs the memory of four; where that is not there, the
    key that helps is named."""
    bounds = {"replicas": 1, "autoscaling_config": {"min_replicas": 0, "max_replicas": 4}}
    assert plan_sizes(config(models=[bounds]), [facts()], 24 * GIB) == plan_sizes(
        config(models=[{"replicas": 4}]), [facts()], 24 * GIB
    )
    with pytest.raises(SettingsError, match=r"set max_replicas to [123]"):
        plan_sizes(config(models=[bounds]), [facts()], 4 * GIB)


def test_a_paced_replica_needs_no_weights() -> None:
    """What runs no engine is sized as a process alone, and its pace reaches the replica."""
    paced = config(models=[{"replicas": 2, "elastic": False, "paced_tokens_per_s": 50.0}])
    sizing = plan_sizes(paced, [facts(weights_bytes=100 * GIB)], 4 * GIB)
    assert (sizing.specs[0].paced_tokens_per_s, sizing.budget_bytes) == (50.0, 0)
    with pytest.raises(SettingsError, match="which runs no engine"):
        plan_sizes(paced, [facts()], 2 * GIB)


@given(
    replicas=st.integers(1, 8),
    max_model_len=st.integers(1, 100_000),
    kv_token_bytes=st.sampled_from([64, 1000, SMOL_TOKEN_BYTES, 131072]),
    weights_bytes=st.integers(0, 20 * GIB),
    free_bytes=st.integers(0, 200 * GIB),
    rest=st.none() | st.integers(1, GIB),
    budget=st.none() | st.integers(1, 40 * GIB),
    ceiling=st.none() | st.integers(1, 40 * GIB),
)
def test_sizes_that_are_given_out_hold(
    replicas: int,
    max_model_len: int,
    kv_token_bytes: int,
    weights_bytes: int,
    free_bytes: int,
    rest: int | None,
    budget: int | None,
    ceiling: int | None,
) -> None:
    """Whatever is asked for: either it is refused, or every promise of the module's picture holds."""
    asked = config(models=[{"replicas": replicas, "kv_ceiling": ceiling}], memory={"budget": budget, "rest": rest})
    try:
        sizing = plan_sizes(asked, [facts(max_model_len, kv_token_bytes, weights_bytes)], free_bytes)
    except SettingsError as error:
        assert re.search(r"\d", str(error))
        return
    (spec,) = sizing.specs
    block_bytes = BLOCK * kv_token_bytes
    assert replicas * spec.guarantee_bytes + spec.spike_bytes <= sizing.budget_bytes
    assert (spec.weights_bytes, sizing.weights_bytes) == (weights_bytes, replicas * weights_bytes)
    assert sizing.needed_bytes <= free_bytes
    assert max_model_len * kv_token_bytes + 2 * block_bytes <= spec.kv_ceiling_bytes <= sizing.budget_bytes
    assert 2 * block_bytes <= spec.kv_rest_bytes <= spec.kv_ceiling_bytes // 4
    assert spec.kv_rest_bytes <= spec.guarantee_bytes, "a replica maps its rest before its lease can grow"
    assert spec.kv_ceiling_bytes % block_bytes == spec.kv_rest_bytes % block_bytes == 0
    assert sizing.budget_bytes % LIMIT_UNIT_BYTES == 0


@given(replicas=st.integers(1, 6), free_bytes=st.integers(GIB, 12 * GIB), max_model_len=st.integers(1024, 500_000))
def test_the_remedies_for_too_little_memory_work(replicas: int, free_bytes: int, max_model_len: int) -> None:
    """The number of replicas and the length that a refusal names do fit, and the next larger ones do not."""

    def plan(replicas: int, max_model_len: int) -> None:
        plan_sizes(config(models=[{"replicas": replicas}]), [facts(max_model_len)], free_bytes)

    try:
        plan(replicas, max_model_len)
        return
    except SettingsError as error:
        said = str(error)
    if "too small to be elastic" in said:
        return
    assert "too little memory" in said
    if fewer := re.search(r"set replicas to (\d+)", said):
        plan(int(fewer[1]), max_model_len)
        with pytest.raises(SettingsError):
            plan(int(fewer[1]) + 1, max_model_len)
    if shorter := re.search(r"max_model_len to at most (\d+)", said):
        fitting = int(shorter[1])
        if fitting >= 6 * BLOCK:  # below, a budget this small cannot be elastic, and says so
            plan(replicas, fitting)
        with pytest.raises(SettingsError):
            plan(replicas, fitting + 2 * BLOCK)
    if not fewer and not shorter:
        assert "Not even one replica" in said


def test_a_budget_below_one_longest_request_each_is_refused() -> None:
    """The refusal names the budget that is needed and the length that fits; both work."""
    tight = config(memory={"budget": "250MiB"})
    with pytest.raises(SettingsError, match=r"memory\.budget is 250MiB") as caught:
        plan_sizes(tight, [facts()], 24 * GIB)
    needed = re.search(r"raise it to (\d+MiB)", str(caught.value))
    tokens = re.search(r"max_model_len of (\d+)", str(caught.value))
    assert needed and tokens
    plan_sizes(config(memory={"budget": needed[1]}), [facts()], 24 * GIB)
    plan_sizes(tight, [facts(int(tokens[1]))], 24 * GIB)
    with pytest.raises(SettingsError):
        plan_sizes(tight, [facts(int(tokens[1]) + BLOCK)], 24 * GIB)


@pytest.mark.parametrize(
    ("tree", "cause", "remedy"),
    [
        ({"memory": {"budget": "40GiB"}}, "only", r"at most (\d+)MiB"),
        ({"models": [{"kv_ceiling": "100MiB"}]}, "one longest request needs", r"max_model_len to at most (\d+)"),
        ({"models": [{"kv_ceiling": "3GiB"}]}, "more than the budget", "1024MiB"),
        ({"models": [{"guarantee": "100MiB"}]}, "one longest request needs", r"raise it to that, or lower max_model"),
        ({"models": [{"guarantee": "3GiB", "kv_ceiling": "1GiB"}]}, "more than its kv_ceiling", "1024MiB"),
        ({"models": [{"guarantee": "1GiB", "elastic": False}]}, "elastic is false", "remove one"),
        ({"memory": {"rest": "600MiB"}}, "more than a quarter", r"at most (\d+)MiB"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(tree: dict[str, object], cause: str, remedy: str) -> None:
    """A budget beyond the machine, a ceiling below one request or above the budget, a rest above a quarter: cause and
    number."""
    with pytest.raises(SettingsError, match=cause) as caught:
        plan_sizes(config(**tree), [facts()], 24 * GIB)
    assert re.search(remedy, str(caught.value))


def test_chosen_guarantees_are_kept() -> None:
    """A guarantee above one longest request is promised to each replica; the engine's own stays one longest request."""
    models = [{"name": "a", "guarantee": "500MiB", "weight": 2.5}, {"name": "b", "replicas": 1}]
    sizing = plan_sizes(config(models=models), [facts(), facts()], 24 * GIB)
    assert sizing.guarantees_bytes[0] == 500 * MIB
    assert sizing.guarantees_bytes[1] == pytest.approx(sizing.specs[0].guarantee_bytes, abs=LIMIT_UNIT_BYTES)
    assert sizing.budget_bytes >= 2 * 500 * MIB + sizing.guarantees_bytes[1]
    assert [spec.weight for spec in sizing.specs] == [2.5, 1.0]
    with pytest.raises(SettingsError, match=r"need 1186MiB, .*; or with this budget, fewer replicas or lower"):
        plan_sizes(config(models=models, memory={"budget": "1GiB"}), [facts(), facts()], 24 * GIB)


def test_a_static_model_is_outside_the_budget() -> None:
    """Plain vLLM holds its KV memory all the time, so the budget is what the elastic models share."""
    both = config(models=[{"name": "a"}, {"name": "b", "elastic": False, "kv_ceiling": "500MiB"}])
    sizing = plan_sizes(both, [facts(), facts()], 24 * GIB)
    alone = plan_sizes(config(models=[{"name": "a"}]), [facts()], 24 * GIB)
    assert sizing.budget_bytes == alone.budget_bytes
    assert sizing.needed_bytes - alone.needed_bytes > 2 * (500 * MIB + sizing.specs[1].spike_bytes)
    assert sizing.weights_bytes == alone.weights_bytes
    assert sizing.specs[1].kv_rest_bytes == sizing.specs[1].kv_ceiling_bytes <= 500 * MIB
    assert plan_sizes(config(models=[{"elastic": False}]), [facts()], 24 * GIB).budget_bytes == 0


def test_engine_arguments_reach_the_engine() -> None:
    """What the user passes to vLLM stays, also in place of our default, and a block size changes the sizes."""
    asked = config(models=[{"engine_args": {"block_size": 32, "enforce_eager": False, "seed": 7}}])
    (spec,) = plan_sizes(asked, [facts()], 24 * GIB).specs
    assert spec.engine_args == {"block_size": 32, "enforce_eager": False, "seed": 7}
    assert spec.kv_guarantee_bytes < (8192 // 32 + 3) * 32 * SMOL_TOKEN_BYTES


def test_free_memory_is_bounded_by_the_container(tmp_path: Path) -> None:
    """A limit of the control group counts, less what is used, plus the page cache that the kernel can drop."""
    v2, v1 = tmp_path / "v2", tmp_path / "v1"
    for root in (v2, v1):
        root.mkdir()
    unlimited = free_memory_bytes(v2, v1)
    assert unlimited > 0
    (v2 / "memory.max").write_text("max\n")
    (v2 / "memory.current").write_text("1000\n")
    assert free_memory_bytes(v2, v1) > 5000
    (v2 / "memory.max").write_text("5000\n")
    (v2 / "memory.stat").write_text("anon 700\ninactive_file 200\n")
    assert free_memory_bytes(v2, v1) == 4200
    (v1 / "memory.limit_in_bytes").write_text("3000")
    (v1 / "memory.usage_in_bytes").write_text("3500")
    assert free_memory_bytes(v2, v1) == 0


def test_a_start_takes_more_where_the_model_is_compiled() -> None:
    """vLLM then runs its largest step at the start, before any request: its activations are part of the spike. On a GPU
    that is reserved for good, and no start needs anything of the budget."""
    compiled = config(models=[{"engine_args": {"enforce_eager": False}, "max_num_batched_tokens": 8192}])
    eager = config(models=[{"max_num_batched_tokens": 8192}])
    spikes = [plan_sizes(one, [facts()], 24 * GIB).specs[0].spike_bytes for one in (eager, compiled)]
    assert spikes[1] - spikes[0] > 8192 * facts().activation_token_bytes
    assert plan_sizes(compiled, [facts()], 24 * GIB, GPU).specs[0].spike_bytes == 0


def test_host_buffers_count_beside_the_budget() -> None:
    """Each elastic replica has one; memory that they need is not promised to KV memory."""
    asked = config(models=[{"replicas": 2}], memory={"host_buffer": "512MiB"})
    plain, buffered = (plan_sizes(one, [facts()], 24 * GIB) for one in (config(models=[{"replicas": 2}]), asked))
    assert buffered.specs[0].host_buffer_bytes == 512 * MIB
    assert buffered.needed_bytes == plain.needed_bytes + GIB
    static = config(models=[{"elastic": False}], memory={"host_buffer": "512MiB"})
    assert plan_sizes(static, [facts()], 24 * GIB).specs[0].host_buffer_bytes == 0


GPU = gpu(0)


def test_a_gpu_is_filled() -> None:
    """Weights, processes and a largest step of each replica are kept free; all else is budget, in blocks of vLLM's size
    on a GPU, and vLLM may capture its CUDA graphs."""
    sizing = plan_sizes(ClusterConfig(), [facts(kv_token_bytes=131072, weights_bytes=16 * GIB)], 76 * GIB, GPU)
    (spec,) = sizing.specs
    fixed = 2 * (GPU.replica_bytes + 16 * GIB + 2 * 2048 * 24_000)
    assert sizing.budget_bytes == pytest.approx(76 * GIB - fixed, abs=MIB)
    assert spec.kv_guarantee_bytes == -(-(8192 // 16 + 2) * 16 * 131072 // (16 * MIB)) * 16 * MIB
    assert spec.engine_args == {}
    host = plan_sizes(ClusterConfig(), [facts(kv_token_bytes=131072, weights_bytes=16 * GIB)], 76 * GIB, HOST)
    assert host.budget_bytes < sizing.budget_bytes


def test_host_buffers_take_nothing_of_a_gpu() -> None:
    """They lie in the host's memory, which is checked by itself."""
    with_buffer = config(memory={"host_buffer": "8GiB"})
    budgets = [plan_sizes(one, [facts()], 40 * GIB, GPU).budget_bytes for one in (ClusterConfig(), with_buffer)]
    assert budgets[0] == budgets[1]


@given(
    replicas=st.integers(1, 6),
    max_model_len=st.integers(1, 100_000),
    kv_token_bytes=st.sampled_from([1000, SMOL_TOKEN_BYTES, 114_688, 131_072]),
    weights_bytes=st.integers(0, 30 * GIB),
    free_bytes=st.integers(0, 80 * GIB),
    budget=st.none() | st.integers(1, 60 * GIB),
)
def test_sizes_on_a_gpu_hold_and_remedies_work(
    replicas: int, max_model_len: int, kv_token_bytes: int, weights_bytes: int, free_bytes: int, budget: int | None
) -> None:
    """Whatever is asked for: either the GPU has all of it, and a longest request fits its guarantee in the extents in
    which memory is mapped; or, where the budget is left to the cluster, the replicas and the length that the refusal
    names would fit."""

    def plan(replicas: int, max_model_len: int) -> None:
        tree = config(models=[{"replicas": replicas}], memory={"budget": budget})
        sizing = plan_sizes(tree, [facts(max_model_len, kv_token_bytes, weights_bytes)], free_bytes, GPU)
        (spec,) = sizing.specs
        blocks = -(-max_model_len // 16) + 1
        unit = KvUnit(GPU, 16 * kv_token_bytes)
        assert unit.bytes_for(blocks) <= spec.kv_guarantee_bytes <= spec.kv_ceiling_bytes <= sizing.budget_bytes
        assert unit.unit_bytes <= spec.kv_rest_bytes <= spec.kv_guarantee_bytes
        assert replicas * spec.kv_guarantee_bytes <= sizing.budget_bytes
        assert replicas * (GPU.replica_bytes + weights_bytes) + sizing.budget_bytes <= sizing.needed_bytes <= free_bytes

    try:
        plan(replicas, max_model_len)
    except SettingsError as refused:
        text = str(refused) if budget is None else ""
        if found := re.search(r"set replicas to (\d+)", text):
            plan(int(found[1]), max_model_len)
        if found := re.search(r"max_model_len to at most (\d+)", text):
            plan(replicas, int(found[1]))
