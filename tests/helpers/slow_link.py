"""Ways across ranks against the speed of the link between two hosts: what each takes on the wire.

    python -m tests.helpers.slow_link --mbit 100,500       two ranks on each of two hosts of this machine, as root

The hosts are network namespaces, the link between them a pair of virtual cards held to a speed. Ranks compute on CPUs
and exchange by gloo, which overlaps nothing. So what is printed is a pass with its messages less the same pass with
these messages from memory, and speeds are scaled down to what CPUs keep up with.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.helpers.hosts import ADDRESSES, TwoHosts, missing

ROOT = Path(__file__).parents[2]
MODES = ("auto", "kv", "query", "allgather", "heads", "kv-heads2", "allgather-heads2")
GATES = ("concentrated", "uniform")


def shape_of(gate: str):
    """8 heads of query, key and value, blocks of 64 tokens."""
    from moba_cp import MoBAConfig
    from moba_cp.bench.shape import Shape

    return Shape(8, 8, 64, MoBAConfig(64, 4), "zigzag", gate)


def worker(n_tokens: int, repeats: int) -> None:
    """One of four ranks; rank 0 prints a line of JSON for each gate and mode."""
    import torch

    from moba_cp.bench.cluster.measure import Layer, Limits, overlap
    from moba_cp.bench.cluster.ranks import Ranks

    torch.set_num_threads(1)
    ranks = Ranks("cpu", 300)
    for gate in GATES:
        layer = Layer(shape_of(gate), n_tokens, ranks.size, ranks)
        for mode in MODES:
            layer.comm.reset_counters()
            row = overlap(layer, layer.moba(mode), Limits(repeats, 1e9))
            if ranks.first:
                found = {"gate": gate, "mode": mode, "on": row.both, "off": row.off_both, "note": row.note}
                print(json.dumps(found), flush=True)
    ranks.close()


def measured(hosts: TwoHosts, mbit: int, n_tokens: int, repeats: int, folder: Path) -> list[dict]:
    """Rows of :func:`worker` with the link held to a speed."""
    hosts.hold_to(mbit)
    commands = []
    for host in (0, 1):
        start = [
            "env", f"GLOO_SOCKET_IFNAME={hosts.link(host)}", "OMP_NUM_THREADS=1", f"PYTHONPATH={ROOT}",
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(host),
            "--nproc-per-node", "2", "--master-addr", ADDRESSES[0], "--master-port", "29511",
            "-m", "tests.helpers.slow_link", "--worker", "--tokens", str(n_tokens), "--repeats", str(repeats),
        ]  # fmt: skip
        commands.append(hosts.start(host, folder / f"{mbit}_{host}", *start, cwd=ROOT))
    for command in commands:
        assert command.wait(900) == 0, command.output
    return [json.loads(line) for line in commands[0].output.splitlines() if line.startswith('{"gate"')]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", default="100,500", help="speeds of the link, by commas (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.tokens, args.repeats)
    why = missing()
    if why:
        raise SystemExit(why)
    speeds = [int(word) for word in args.mbit.split(",")]
    with tempfile.TemporaryDirectory() as folder, TwoHosts() as hosts:
        rows = {mbit: measured(hosts, mbit, args.tokens, args.repeats, Path(folder)) for mbit in speeds}
    print("ms on the wire, forward and backward | " + " | ".join(f"{mbit} Mbit/s" for mbit in speeds))
    for number, row in enumerate(rows[speeds[0]]):
        times = [rows[mbit][number] for mbit in speeds]
        said = [
            f"{one['on'] - one['off']:.0f} (computing {one['off']:.0f})" if one["on"] else one["note"] for one in times
        ]
        print(f"{row['gate']:12} {row['mode']:18} | " + " | ".join(said))
    return None


if __name__ == "__main__":
    main()
