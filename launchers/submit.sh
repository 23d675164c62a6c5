#!/usr/bin/env bash
# Checks a config where you are, in seconds, and then submits launchers/slurm.sbatch: a mistake costs no allocation.
#
#   bash launchers/submit.sh --nodes=2 --gpus-per-node=8 --cpus-per-gpu=8 --time=1-0 -- configs/demo.yaml [FLAGS...]
#
# In front of -- are sbatch's flags, behind it what launchers/slurm.sbatch takes. Exit code 2 and one line if something is
# wrong.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launchers/cluster.sh
source "$root/launchers/cluster.sh"

flags=() nodes=1 gpus='' tasks=''
while [ "$#" -gt 0 ] && [ "$1" != -- ]; do
    case "$1" in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    -N | --nodes) nodes="${2:-1}" ;;
    --nodes=*) nodes="${1#*=}" ;;
    -N*) nodes="${1#-N}" ;;
    --gpus-per-node) gpus="${2##*:}" ;;
    --gpus-per-node=*) gpus="${1##*[:=]}" ;;
    --ntasks-per-node) tasks="${2:-}" ;;
    --ntasks-per-node=*) tasks="${1#*=}" ;;
    esac
    flags+=("$1")
    shift
done
if [ "$#" -eq 0 ]; then
    say "-- and a config are missing; see --help"
    exit 2
fi
shift
find_python "$root"
take_command "$@"
check_command "$((nodes * ${gpus:-${tasks:-1}}))"
exec sbatch "${flags[@]}" "$root/launchers/slurm.sbatch" "$@"
