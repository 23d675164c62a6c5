#!/usr/bin/env bash
# Trains on several machines: the same line on each of them, no file to edit.
#
#   bash launchers/multinode.sh --nodes 2 --head 10.0.0.1 configs/demo.yaml --set run.directory=/shared/run
#   bash launchers/multinode.sh --nodes 2 --head 10.0.0.1 -m moba_cp.megatron.pretrain --moba-block-size 512 ...
#
#   --nodes N             machines
#   --head ADDRESS[:PORT] of one of them, by which the others reach it (port 29400)
#   --ranks N             ranks on each machine; default: one for each GPU
#   --restarts N          how often to begin again from the last checkpoint after a failure here or elsewhere (0)
#   --wait SECONDS        how long to wait for the other machines, at the start and after a failure (600)
#
# run.directory, the data and this checkout are at the same place on all machines, on a shared file system. Rank 0, which
# prints, is on one of them. SIGTERM, SIGUSR1 or SIGUSR2 to this script on any of them stops the run on all: it saves and
# ends with exit code 75. Exit codes: docs/cluster.md.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launchers/cluster.sh
source "$root/launchers/cluster.sh"

nodes='' head='' ranks='' restarts=0 patience=600
while [ "$#" -gt 0 ]; do
    case "$1" in
    -h | --help) usage "${BASH_SOURCE[0]}" && exit ;;
    --nodes | --head | --ranks | --restarts | --wait)
        if [ "$#" -lt 2 ]; then
            say "$1 needs a value; see --help"
            exit 2
        fi
        option="$1=$2"
        shift 2
        ;;
    --nodes=* | --head=* | --ranks=* | --restarts=* | --wait=*) option="$1" && shift ;;
    *) break ;;
    esac
    value="${option#*=}"
    case "$option" in
    --nodes=*) nodes="$value" ;;
    --head=*) head="$value" ;;
    --ranks=*) ranks="$value" ;;
    --restarts=*) restarts="$value" ;;
    --wait=*) patience="$value" ;;
    esac
    case "$option" in
    --head=*) ;;
    *=*[!0-9]* | *=)
        say "$option: expected a whole number"
        exit 2
        ;;
    esac
done
if [ -z "$nodes" ] || [ -z "$head" ]; then
    say "--nodes N and --head ADDRESS are needed; see --help"
    exit 2
fi
port=29400
case "$head" in
*:*) port="${head##*:}" head="${head%:*}" ;;
esac

find_python "$root"
take_command "$@"
ranks="${ranks:-$(gpus_here)}"
[ "$ranks" -gt 0 ] || ranks=1
check_command "$((nodes * ranks))"
settings "$ranks" "$(nproc)"
here="$("${python[@]}" -m moba_cp.launchers.address "$head")" || exit 2
read -r interface address is_head <<<"$here"
# A machine's name often resolves to 127.0.1.1, and the first interface by name may be a bridge that leads nowhere: take
# the interface by which this machine reaches the head.
export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$interface}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$interface}"
rendezvous=(
    --rdzv-backend c10d --rdzv-endpoint "$head:$port" --rdzv-id "moba_cp-$port"
    --rdzv-conf "is_host=$is_head,join_timeout=$patience,read_timeout=$patience" --local-addr "$address"
)
attempt=0
while :; do
    say "this machine: $address ($interface), ranks: $ranks; waiting up to $patience s for $nodes machines at $head:$port"
    run "${python[@]}" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$ranks" "${rendezvous[@]}" \
        -m "${module[@]}"
    case "$code" in
    0 | 75) exit "$code" ;;
    esac
    [ -z "$asked_to_stop" ] || exit 75
    if [ "$attempt" -ge "$restarts" ]; then
        say "the ranks on this machine ended with an error, told above, or because another machine's did: look there too;" \
            "the same line on every machine goes on from the last checkpoint"
        exit "$code"
    fi
    attempt=$((attempt + 1))
    say "the ranks ended with an error, here or on another machine: beginning again, $attempt of $restarts"
    sleep 5
done
