"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported.

The other tests of this process use the plain PyTorch path, so the files here run in processes of their own, which
test_interpreted.py starts. Those kernels that it cannot run are at least compiled, by test_hopper_compiles.py;
test_index_compiles.py does so with kernels that Triton lowers in a way of its own, test_in_place_compiles.py with those
whose threads need an order that the interpreter has anyway, test_key_conv_compiles.py with those that round each
product and sum by itself, as the interpreter does anyway.
"""

import os
from pathlib import Path

import torch

HERE = Path(__file__).parent
WITHOUT_GPU = ("test_interpreted.py", "test_hopper_compiles.py", "test_in_place_compiles.py", "test_index_compiles.py",
               "test_key_conv_compiles.py")  # fmt: skip

if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    collect_ignore = [*WITHOUT_GPU]
else:
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name not in WITHOUT_GPU]
