"""What models are put to when they are trained, while their weights are there."""

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..train.config import TrainConfig
from ..train.mesh import close_mesh
from .mass import weigh
from .retrieval import answer
from .runs import RESULTS

TESTS: dict[str, Callable[[TrainConfig, Any], dict]] = {"retrieval": answer, "mass": weigh}


def run_tests(config: TrainConfig, tests: dict[str, Any]) -> None:
    """Put the model in the run's folder to ``tests``, name -> argument; the results go into ``tests.json`` there. A
    test that fails says why on stderr and has no result: hours of training are not lost by it."""
    found = {}
    for name, argument in tests.items():
        try:
            found[name] = TESTS[name](config, argument)
        except Exception:
            traceback.print_exc()
        finally:
            close_mesh()
    (Path(config.run.directory) / RESULTS).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
