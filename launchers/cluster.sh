# shellcheck shell=bash disable=SC2034
# Sourced by torchrun.sh, multinode.sh and slurm.sbatch: what to run, with which settings, and how to stop it.
#
#   MOBA_CP_PYTHON   the command that starts Python, in words: "apptainer exec --nv moba_cp.sif python3" for a container;
#                    default: the environment that quickstart.sh makes (.venv, or VENV=...), else python3
#   STOP_PATH        where the file that asks ranks to stop is made; default: a temporary one of this machine

say() { echo "$(basename "$0"): $*" >&2; }

usage() { # SCRIPT: its comment from the second line on is its help
    awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
}

find_python() { # ROOT: sets python and torch_version
    if [ -n "${MOBA_CP_PYTHON:-}" ]; then
        read -ra python <<<"$MOBA_CP_PYTHON"
    elif [ -x "${VENV:-$1/.venv}/bin/python" ]; then
        python=("${VENV:-$1/.venv}/bin/python")
    else
        python=(python3)
    fi
    if ! torch_version="$("${python[@]}" -c 'import importlib.metadata as m, moba_cp; print(m.version("torch"))')"; then
        say "${python[*]} cannot import moba_cp; run launchers/quickstart.sh once, or set VENV or MOBA_CP_PYTHON"
        exit 2
    fi
}

take_command() { # CONFIG [FLAGS...] | -m MODULE [FLAGS...]: sets module, a Python module with its arguments, and trainer
    trainer=
    if [ "${1:-}" = -m ]; then
        if [ "$#" -lt 2 ]; then
            say "-m needs the name of a module, such as moba_cp.megatron.pretrain"
            exit 2
        fi
        module=("${@:2}")
        return
    fi
    if [ "$#" -eq 0 ]; then
        say "name a config, such as configs/demo.yaml, or -m MODULE; see --help"
        exit 2
    fi
    trainer=1
    module=(moba_cp train "$@")
    case " $* " in
    *" --resume"[\ =]* | *" --overwrite "*) ;;
    # The same line starts a run, goes on with it, and does nothing once it has ended.
    *) module+=(--resume auto) ;;
    esac
}

check_command() { # RANKS: end with code 2 and one line if the trainer would refuse its config; sets directory
    directory=
    [ -n "$trainer" ] || return 0
    local resolved
    resolved="$("${python[@]}" -m "${module[@]}" --dry-run --ranks "$1")" || exit 2
    directory="$(sed -n '/^run:/,$ s/^  directory: //p' <<<"$resolved" | tr -d "'\"")"
}

newest_checkpoint() { # the name of the newest checkpoint in the run's folder
    local path newest=
    for path in "${directory:-/nonexistent}"/checkpoints/step-*; do
        case "$path" in
        *[0-9]) [ ! -d "$path" ] || newest="$(basename "$path")" ;;
        esac
    done
    echo "$newest"
}

gpus_here() { "${python[@]}" -c 'import torch; print(torch.cuda.device_count())'; }

settings() { # RANKS_OF_THIS_MACHINE CPUS: what NCCL and PyTorch are told; what is set already stays
    # One line of warnings from NCCL says more than the timeout that follows from what went wrong.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # The flight recorder: the last collectives of each rank, written when one times out, show which rank did not come.
    local size=TORCH_FR_BUFFER_SIZE files=TORCH_FR_DUMP_TEMP_FILE
    case "$torch_version" in
    2.?.* | 2.10.* | 2.11.*) size=TORCH_NCCL_TRACE_BUFFER_SIZE files=TORCH_NCCL_DEBUG_INFO_TEMP_FILE ;; # as they were called then
    esac
    export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}" "$size=${!size:-2000}"
    if [ -z "$trainer" ]; then
        # The trainer says itself where: in the run's folder.
        export "$files=${!files:-$PWD/flight-rank}"
    fi
    # Threads for what runs on the CPU: each rank its share of the cores, so that ranks do not take them from each other.
    local threads=$(($2 / $1))
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads < 1 ? 1 : threads))}"
    # Megatron-LM wants it with tensor or context parallelism, up to Hopper: communication is issued before computation.
    [ -n "$trainer" ] || export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
}

asked_to_stop=
interrupted=

ask_to_stop() { # in a trap: ranks of the trainer look for the file; another program's get SIGTERM
    interrupted=1 asked_to_stop=1
    say "asked to stop: the ranks save and end"
    [ -s "$stop" ] || : >"$stop"
    if [ -z "$trainer" ]; then
        signal_ranks
    fi
}

signal_ranks() { # the ranks alone: torchrun would kill them 30 seconds after a SIGTERM of its own
    pkill -TERM -P "$child" || true
}

run() { # COMMAND...: run it to its end, asking it to stop at SIGTERM, SIGUSR1 or SIGUSR2; sets code and saved
    stop="${STOP_PATH:-$(mktemp -u "${TMPDIR:-/tmp}/moba_cp-stop-XXXXXX")}"
    rm -f "$stop"
    export MOBA_CP_STOP_FILE="$stop"
    trap ask_to_stop TERM USR1 USR2
    # Ctrl-C reaches torchrun, which ends the ranks, as it reaches this shell.
    trap 'interrupted=1' INT
    "$@" &
    child=$!
    while :; do
        interrupted='' code=0
        wait "$child" || code=$?
        # A signal ends the waiting, not the command.
        if [ -z "$interrupted" ] || ! kill -0 "$child" 2>/dev/null; then
            break
        fi
    done
    if [ -n "$interrupted" ]; then
        code=0
        wait "$child" || code=$?
    fi
    trap - TERM USR1 USR2 INT
    saved=
    if [ -s "$stop" ]; then
        saved="$(cat "$stop")"
        code=75
    elif [ -n "$asked_to_stop" ] && [ -z "$trainer" ] && [ "$code" -eq 0 ]; then
        # Another program does not say whether it has done all its steps; called again it will know.
        code=75
    fi
    rm -f "$stop"
}
