"""What a worker's heap keeps between steps, and what is learned from steps that found it: measured in a process of its
own, because there is one heap a process."""

import subprocess
import sys

PROGRAM = """
import numpy
from replicas.activation_meter import ActivationMeter

MIB = 1 << 20
meter = ActivationMeter(charged=True)
for number, keep_mib in enumerate([0, 0, 400, 400, 400, 40, 0, 0]):
    samples = meter.finish_step(keep_mib * MIB)
    if number > 1:
        (sample,) = samples
        peak = -1 if sample.peak_bytes is None else sample.peak_bytes // MIB
        print(peak, sample.left_bytes // MIB, sample.kept_bytes // MIB)
    meter.start_step(10, 1)
    buffers = [numpy.ones(8 * MIB, numpy.int8) for _ in range(12)]
    del buffers
"""


def test_steps_keep_what_they_may_and_teach_only_what_they_took() -> None:
    """12 buffers of 8 MiB a step. Steps that may keep nothing show their peak; those that may keep 400 MiB leave them
    on the heap; where that is more than may be kept it goes back, and after that the peak can be seen again."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    samples = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    exact, first_kept, kept, too_much, none, again = samples
    assert 94 <= exact[0] <= 104
    assert exact[2] == 0
    for peak, left, held in (first_kept, kept):
        assert (peak, left <= 4, held >= 80) == (-1, True, True)
    assert too_much == (-1, too_much[1], 0)
    assert (none[0], none[2]) == (-1, 0)
    assert 94 <= again[0] <= 104
    assert max(too_much[1], none[1], again[1]) <= 4
