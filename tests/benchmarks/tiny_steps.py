"""The commands of the GPU steps at tiny sizes, all in this one process: the imports take longest.

TRITON_INTERPRET=1 DILKERN_CACHE=PACK/cache python tests/benchmarks/tiny_steps.py FOLDER PACK STEP...
"""

import runpy
import sys
import time
from pathlib import Path

from benchmarks import real_models
from tools import gpu

if __name__ == "__main__":
    folder, pack, *steps = sys.argv[1:]
    real_models.HH = Path(pack) / real_models.HH.name
    real_models.WEIGHTS = Path(folder, "none")
    for step in steps:
        stem = Path(folder, step, "tiny")
        stem.parent.mkdir()
        for command in gpu.commands(step, stem, tiny=True):
            name, *arguments = command[command.index("-m") + 1 :]
            sys.argv = [name, *arguments]
            start = time.monotonic()
            try:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            except SystemExit as end:
                if end.code:
                    sys.exit(f"{step}: {' '.join(command)} ended with {end.code}")
            print(f"[{step}: {name} took {time.monotonic() - start:.1f} s]", flush=True)
