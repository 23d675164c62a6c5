"""One rank of a job that srun started: ``srun ... python -m moba_cp.launchers.rank MODULE ARGUMENTS...``.

Sets what torchrun would set from what Slurm says, and becomes ``python -m MODULE ARGUMENTS...``: signals and exit codes
go straight to the ranks and come straight from them. MASTER_ADDR and MASTER_PORT are set before.
"""

import os
import sys
from collections.abc import Mapping

from .address import reach


def environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """The variables of a rank, by those that srun gave it."""
    found = {
        "RANK": slurm["SLURM_PROCID"],
        "WORLD_SIZE": slurm["SLURM_NTASKS"],
        "LOCAL_RANK": slurm["SLURM_LOCALID"],
        # On this node; of the form "8", as all nodes have equally many.
        "LOCAL_WORLD_SIZE": slurm["SLURM_STEP_TASKS_PER_NODE"].partition("(")[0],
    }
    interface = reach(slurm["MASTER_ADDR"])[0]
    return found | {name: interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if not slurm.get(name)}


if __name__ == "__main__":
    try:
        os.environ.update(environment(os.environ))
    except KeyError as error:
        sys.exit(f"moba_cp.launchers.rank: {error} is not set; srun sets it, and launchers/slurm.sbatch calls srun")
    except ValueError as error:
        sys.exit(f"moba_cp.launchers.rank: {error}")
    # The arguments are those of the launcher's own command line.
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[1:]])  # noqa: S606  # nosec B606
