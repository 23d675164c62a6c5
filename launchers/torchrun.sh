#!/usr/bin/env bash
# Trains on this machine, one rank for each GPU, or as many as --ranks says.
#
#   bash launchers/torchrun.sh configs/demo.yaml --set data.path=/data/books
#   bash launchers/torchrun.sh --ranks 2 configs/demo.yaml
#   bash launchers/torchrun.sh -m moba_cp.megatron.pretrain --moba-block-size 512 ...      Megatron-LM's trainer
#
# The same line again goes on with a run that was stopped, and does nothing once it has ended. SIGTERM, SIGUSR1 and
# SIGUSR2 to this script stop it: it saves and ends with exit code 75. Exit codes: docs/cluster.md.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launchers/cluster.sh
source "$root/launchers/cluster.sh"

ranks=
while [ "$#" -gt 0 ]; do
    case "$1" in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --ranks) ranks="${2:?--ranks needs a number}" && shift 2 ;;
    --ranks=*) ranks="${1#*=}" && shift ;;
    *) break ;;
    esac
done
find_python "$root"
take_command "$@"
ranks="${ranks:-$(gpus_here)}"
if [ "$ranks" -eq 0 ]; then
    say "no GPU here: one rank on the CPU; give more by --ranks"
    ranks=1
fi
check_command "$ranks"
settings "$ranks" "$(nproc)"
run "${python[@]}" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m "${module[@]}"
exit "$code"
