"""benchmarks/gpu.py runs at tiny sizes on a CPU, all of it but the default command."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def test_the_gpu_benchmark_runs_at_tiny_sizes():
    command = [sys.executable, SCRIPT, "--tiny", "--only", "part=large,reading"]
    process = subprocess.run(command, capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert process.returncode == 0, process.stderr
    assert '"perf/episodes_per_s"' in process.stdout and '"bfloat16_max"' in process.stdout
