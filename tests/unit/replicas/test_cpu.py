"""Which CPUs compute bfloat16 slowly."""

from pathlib import Path

import pytest

from replicas import cpu

WIDE = "avx2 avx512f avx512dq avx512bw avx512vl"


@pytest.mark.parametrize(
    ("flags", "machine", "cpu_build", "slow"),
    [
        (WIDE, "x86_64", True, False),
        ("avx avx2", "x86_64", True, True),
        ("avx2 avx512f", "x86_64", True, True),
        ("avx avx2", "x86_64", False, False),
        ("asimd", "aarch64", True, False),
    ],
)
def test_bfloat16_is_slow_without_avx512(
    flags: str, machine: str, cpu_build: bool, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "computes_on_cpu", lambda: cpu_build)
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
    assert cpu.has_slow_half_precision(cpuinfo) is slow


def test_an_unknown_cpu_is_taken_for_a_fast_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "computes_on_cpu", lambda: True)
    monkeypatch.setattr(cpu.platform, "machine", lambda: "x86_64")
    assert cpu.has_slow_half_precision(tmp_path / "none") is False
    (tmp_path / "odd").write_text("nothing here\n")
    assert cpu.has_slow_half_precision(tmp_path / "odd") is False
