"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before they are imported.

The other tests of this process use the plain PyTorch path, so the files here run in processes of their own, which
test_interpreted.py starts.
"""

import os
from pathlib import Path

import torch

HERE = Path(__file__).parent

if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
    collect_ignore = ["test_interpreted.py"]
else:
    collect_ignore = [path.name for path in HERE.glob("test_*.py") if path.name != "test_interpreted.py"]
