"""Ways across ranks against the speed of the link between two hosts: what each takes.

    python -m tests.helpers.slow_link --mbit 20,100       two ranks on each of two hosts of this machine, as root

The hosts are network namespaces, the link between them a pair of virtual cards held to a speed. Ranks compute on CPUs
and exchange by gloo, which overlaps nothing, so speeds are scaled down to what CPUs keep up with. Times are the
shortest of a few passes, forward and backward; bytes are what the cards counted, in the busier direction.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.hosts import ADDRESSES, TwoHosts, missing

ROOT = Path(__file__).parents[2]
MODES = ("auto", "kv", "query", "allgather", "heads", "kv-heads2", "query-heads2", "allgather-heads2")
GATES = ("concentrated", "uniform")


def shape_of(gate: str):
    """8 heads of query, key and value, blocks of 64 tokens."""
    from moba_cp import MoBAConfig
    from moba_cp.bench.shape import Shape

    return Shape(8, 8, 64, MoBAConfig(64, 4), "zigzag", gate)


def worker(n_tokens: int, repeats: int, modes: list[str]) -> None:
    """One of four ranks; rank 0 prints a line of JSON for each gate and mode."""
    import torch

    from moba_cp.bench.cluster.measure import Layer
    from moba_cp.bench.cluster.ranks import Ranks
    from moba_cp.cp.heads.choice import news

    torch.set_num_threads(1)
    ranks = Ranks("cpu", 300)
    card = Path("/sys/class/net", os.environ["GLOO_SOCKET_IFNAME"], "statistics")

    def crossed() -> list[int]:
        ranks.settle(ranks.size)
        return [int((card / f"{direction}_bytes").read_text()) for direction in ("tx", "rx")]

    for gate in GATES:
        layer = Layer(shape_of(gate), n_tokens, ranks.size, ranks)
        for mode in modes:
            candidate = layer.moba(mode)
            candidate.run(True)
            times, moved = [], []
            for _ in range(repeats):
                before, began = crossed(), time.perf_counter()
                candidate.run(True)
                times.append(ranks.most(1e3 * (time.perf_counter() - began), ranks.size))
                moved.append(max(after - b for after, b in zip(crossed(), before, strict=True)))
            if ranks.first:
                found = {"gate": gate, "mode": mode, "ms": min(times), "mb": min(moved) / 1e6, "why": news()}
                print(json.dumps(found), flush=True)
    ranks.close()


def measured(hosts: TwoHosts, mbit: int, n_tokens: int, repeats: int, folder: Path, modes=MODES) -> list[dict]:
    """Rows of :func:`worker` with the link held to a speed."""
    hosts.hold_to(mbit)
    commands = []
    for host in (0, 1):
        start = [
            "env", f"GLOO_SOCKET_IFNAME={hosts.link(host)}", "OMP_NUM_THREADS=1", f"PYTHONPATH={ROOT}",
            sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(host),
            "--nproc-per-node", "2", "--master-addr", ADDRESSES[0], "--master-port", "29511",
            "-m", "tests.helpers.slow_link", "--worker", "--tokens", str(n_tokens), "--repeats", str(repeats),
            "--modes", ",".join(modes),
        ]  # fmt: skip
        commands.append(hosts.start(host, folder / f"{mbit}_{host}", *start, cwd=ROOT))
    for command in commands:
        assert command.wait(900) == 0, command.output
    return [json.loads(line) for line in commands[0].output.splitlines() if line.startswith('{"gate"')]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", default="20,100", help="speeds of the link, by commas (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", default=",".join(MODES), help="as bench cluster names them (default: %(default)s)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    modes = args.modes.split(",")
    if args.worker:
        return worker(args.tokens, args.repeats, modes)
    why = missing()
    if why:
        raise SystemExit(why)
    speeds = [int(word) for word in args.mbit.split(",")]
    with tempfile.TemporaryDirectory() as folder, TwoHosts() as hosts:
        rows = {mbit: measured(hosts, mbit, args.tokens, args.repeats, Path(folder), modes) for mbit in speeds}
    print("ms, forward and backward (MB over the link) | " + " | ".join(f"{mbit} Mbit/s" for mbit in speeds))
    for number, row in enumerate(rows[speeds[0]]):
        said = [f"{rows[mbit][number]['ms']:.0f} ({rows[mbit][number]['mb']:.1f})" for mbit in speeds]
        print(f"{row['gate']:12} {row['mode']:18} | " + " | ".join(said))
    for mbit in speeds:
        print(*(f"{mbit} Mbit/s: {line}" for row in rows[mbit] for line in row["why"]), sep="\n")
    return None


if __name__ == "__main__":
    main()
