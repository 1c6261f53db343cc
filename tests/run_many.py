"""Run the pipeline once for each setting in a file, in the processes that torchrun has started.

Run: torchrun --nproc-per-node 2 tests/run_many.py settings.json (test_processes.py does)
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from ppo_rlhf import Args, main

if __name__ == "__main__":
    torch.set_num_threads(1)
    for settings in json.loads(Path(sys.argv[1]).read_text()):
        main(Args(**settings))
    dist.destroy_process_group()  # else a thread of gloo may end the process with an error
