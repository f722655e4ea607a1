"""The agent actor's own parts, without Ray; its logic is LeaseKeeper's."""

import subprocess
import sys
from pathlib import Path

import pytest

from memory_agent.agent import AgentSpec, agent_name, board_path
from memory_agent.errors import SettingsError
from tests.unit.memory_agent.board_players import BUDGET


def test_agent_whose_own_task_fails_ends_its_process() -> None:
    """An agent that no longer keeps leases exits with 1, so that Ray starts it again, instead of answering calls."""
    code = """
import asyncio
from memory_agent.agent import _die_with
async def fail(): raise RuntimeError("broken on purpose")
async def main():
    task = asyncio.create_task(fail())
    task.add_done_callback(_die_with)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert "broken on purpose" in ended.stderr


def test_spec_names_its_board_and_refuses_what_is_no_name() -> None:
    """The board lies in shared memory under the cluster's and the device's name; a path in a name is refused."""
    spec = AgentSpec("c1", "cpu", BUDGET)
    assert board_path(spec) == Path("/dev/shm/ellm-c1-cpu.board")
    assert agent_name("n", "cpu") != agent_name("n", "gpu0")
    for bad in ("../x", "", "a b"):
        with pytest.raises(SettingsError, match="file name"):
            AgentSpec(bad, "cpu", BUDGET)
    with pytest.raises(SettingsError, match="above 0"):
        AgentSpec("c1", "cpu", 0)
