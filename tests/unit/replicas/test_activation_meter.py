"""What a worker's heap keeps between steps, and what is learned from steps that found it: measured in a process of its
own, because there is one heap a process."""

import subprocess
import sys

PROGRAM = """
import numpy
from replicas.activation_meter import ActivationMeter

MIB = 1 << 20
meter = ActivationMeter(charged=True)
for_good = []
for number, keep_mib in enumerate([0, 0, 400, 400, 400, 40, 0, 0, 0]):
    samples = meter.finish_step(keep_mib * MIB)
    if number > 1:
        (sample,) = samples
        print(-1 if sample.peak_bytes is None else sample.peak_bytes // MIB, sample.kept_bytes // MIB)
    meter.start_step(10, 1)
    buffers = [numpy.ones(8 * MIB, numpy.int8) for _ in range(12)]
    if number == 7:
        for_good.append(numpy.ones(2 * MIB, numpy.int8))
    del buffers
"""


def test_steps_keep_what_they_may_and_teach_only_what_they_took() -> None:
    """12 buffers of 8 MiB a step. Steps that may keep nothing show their peak; those that may keep 400 MiB leave them
    on the heap; where that is more than may be kept it goes back, and after that the peak can be seen again, but not
    that of a step which took something for good."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    exact, first_kept, kept, too_much, none, again, lasting = (
        tuple(map(int, line.split())) for line in done.stdout.splitlines()
    )
    for peak, held in (exact, again):
        assert (94 <= peak <= 104, held) == (True, 0)
    for peak, held in (first_kept, kept):
        assert (peak, held >= 80) == (-1, True)
    assert too_much == none == lasting == (-1, 0)
