"""What malloc does with freed memory."""

import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource
from train.memory import keep_freed_memory
kept = {keep}
for _ in range(2):
    bytearray(2**26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(2**26)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_used_again_without_asking_the_kernel() -> None:
    found = []
    for keep in ("False", "keep_freed_memory()"):
        command = [sys.executable, "-c", _FAULTS.format(keep=keep)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        found.append((output[0], int(output[1])))
    (plain, faults), (kept, faults_kept) = found
    assert (plain, kept) == ("False", "True")
    assert faults_kept < 0.1 * faults
