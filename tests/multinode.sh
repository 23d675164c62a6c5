#!/usr/bin/env bash
# Trains on two hosts, each with its own address, and compares every loss with the same run on one.
#
#   bash tests/multinode.sh                 two hosts as network namespaces of this machine (root; on the CPU)
#   bash tests/multinode.sh --hosts a,b     real ones, by ssh: this checkout and folder are at the same place on both
#
#   --folder FOLDER   where the runs go (runs/multinode-test); --ranks N: on each host (one for each GPU, else 1)
#
# With real hosts the first name is the head, and must be one by which the other reaches it. The last line says PASS or
# FAIL; exit code 1 for FAIL.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launchers/cluster.sh
source "$root/launchers/cluster.sh"

hosts='' folder=runs/multinode-test ranks=''
while [ "$#" -gt 0 ]; do
    case "$1" in
    --hosts) hosts="${2:?--hosts needs two names}" && shift 2 ;;
    --folder) folder="${2:?--folder needs a folder}" && shift 2 ;;
    --ranks) ranks="${2:?--ranks needs a number}" && shift 2 ;;
    *) usage "${BASH_SOURCE[0]}" && exit 2 ;;
    esac
done
find_python "$root"
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
settings=(--set run.steps=6 --set run.validate_every=6 --set run.timeout_seconds=120 --overwrite)
processes=()

if [ -n "$hosts" ]; then
    IFS=, read -r first second <<<"$hosts"
    names=("$first" "$second") head="$first"
    on() { # HOST COMMAND...
        # shellcheck disable=SC2029  # quoted for the other side by printf
        ssh -o BatchMode=yes "$1" "cd $(printf %q "$PWD") && $(printf '%q ' env "MOBA_CP_PYTHON=${python[*]}" "${@:2}")"
    }
    ranks="${ranks:-$(on "$first" "${python[@]}" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
    alone="$ranks"
else
    if [ "$(id -u)" -ne 0 ] || ! command -v ip >/dev/null; then
        say "network namespaces need root and ip (iproute2); or name two machines by --hosts"
        exit 2
    fi
    names=("moba-$$-a" "moba-$$-b") head=10.77.0.1
    on() { MOBA_CP_PYTHON="${python[*]}" ip netns exec "$@"; }
    ip netns add "${names[0]}"
    trap 'ip netns delete "${names[0]}"; ip netns delete "${names[1]}" 2>/dev/null || true' EXIT
    ip netns add "${names[1]}"
    ip link add "ma$$" netns "${names[0]}" type veth peer "mb$$" netns "${names[1]}"
    for i in 0 1; do
        link="$([ "$i" = 0 ] && echo "ma$$" || echo "mb$$")"
        ip -n "${names[i]}" address add "10.77.0.$((i + 1))/24" dev "$link"
        ip -n "${names[i]}" link set lo up
        ip -n "${names[i]}" link set "$link" up
    done
    ranks="${ranks:-1}"
    alone="$((2 * ranks))"
    settings+=(--set run.device=cpu)
fi

say "one host, $alone ranks: $folder/one.txt"
on "${names[0]}" bash "$root/launchers/torchrun.sh" --ranks "$alone" "$root/configs/demo.yaml" "${settings[@]}" \
    --set run.directory="$folder/one" >"$folder/one.txt" 2>&1 || { tail -n 20 "$folder/one.txt" && exit 1; }
say "two hosts, $ranks ranks on each: $folder/host-0.txt, $folder/host-1.txt"
for i in 0 1; do
    on "${names[i]}" bash "$root/launchers/multinode.sh" --nodes 2 --head "$head" --ranks "$ranks" --wait 120 \
        "$root/configs/demo.yaml" "${settings[@]}" --set run.directory="$folder/two" >"$folder/host-$i.txt" 2>&1 &
    processes+=("$!")
done
failed=
for i in 0 1; do
    wait "${processes[i]}" || { failed=1 && say "host $i ended with an error:" && tail -n 20 "$folder/host-$i.txt"; }
done
[ -z "$failed" ] || { echo "FAIL" && exit 1; }
"${python[@]}" - "$folder" <<'PYTHON'
import json
import sys


def losses(name):
    records = [json.loads(line) for line in open(f"{sys.argv[1]}/{name}/log.jsonl")]
    return [record["loss"] for record in records if "loss" in record]


one, two = losses("one"), losses("two")
print("step   one host   two hosts")
for step, (a, b) in enumerate(zip(one, two, strict=True), 1):
    print(f"{step:4}   {a:8.5f}   {b:9.5f}")
wrong = [step for step, (a, b) in enumerate(zip(one, two), 1) if not abs(a - b) <= 1e-3 * a]
print("FAIL: steps that differ by more than 0.1 %: " + ", ".join(map(str, wrong)) if wrong else "PASS")
sys.exit(bool(wrong))
PYTHON
