#!/usr/bin/env bash
# From a fresh machine to a trained model: makes .venv (or VENV=...), installs, and trains configs/demo.yaml with
# torchrun on 2 ranks: on the CPU (gloo), or one per GPU where there are GPUs (NCCL).
#   bash launchers/quickstart.sh --set run.steps=400             arguments go to moba-cp train
#   bash launchers/quickstart.sh --resume --set run.steps=400    goes on with it
# PYTHON=... names the interpreter that makes the environment.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/launchers/environment.sh"
make_environment train

gpus="$("$venv/bin/python" -c 'import torch; print(torch.cuda.device_count())')"
ranks=2
if [ "$gpus" -eq 1 ]; then
    ranks=1
fi
# One thread for each rank: two ranks on two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

cd "$root"
train=(train configs/demo.yaml "$@")
# A second call replaces the run of the first, unless --resume is given.
case " $* " in
*" --resume"[\ =]*) ;;
*) train+=(--overwrite) ;;
esac
# Check the arguments first: an error is one line here, while torchrun would add its own report.
"$venv/bin/moba-cp" "${train[@]}" --dry-run --ranks "$ranks" >/dev/null
exec "$venv/bin/torchrun" --standalone --nproc_per_node "$ranks" --no-python "$venv/bin/moba-cp" "${train[@]}"
