"""Run a function on several ranks: gloo processes, or threads of this process.

``run_ranks`` starts real processes, forked from one that has imported PyTorch and Megatron already: importing them
takes longer than what most tests do there. ``run_threads`` gives each rank a thread and a Communicator that exchanges
tensors in memory: the same library code, hundreds of cases a minute.
"""

import os
import pickle
import queue
import threading
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moba_cp.cp.comm import Communicator
from moba_cp.cp.symmetric_memory import PeerMemory

# A machine under load is slower than the limits of the tests allow for: 3 gives everything three times as long.
TIME_SCALE = float(os.environ.get("MOBA_CP_TEST_TIME_SCALE", "1"))
TIMEOUT_S = 120 * TIME_SCALE


def store_of(n: int) -> dist.TCPStore:
    """The store where ``n`` processes meet, on a port of the system's choice that is taken from now on.

    A port that was free when it was looked for may be another's when the ranks come to use it.
    """
    return dist.TCPStore("127.0.0.1", 0, n, is_master=True, wait_for_workers=False)


def environment_of(rank: int, n: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank: ``init_process_group`` then joins the store at ``port``, and starts none."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_RANK": str(rank),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def run_ranks(n: int, function, *args, timeout: float = 120, backend: str = "gloo", gpus: int = 1) -> list:
    """``function(rank, *args)`` on ``n`` ranks; returns their results in rank order.

    Ranks of NCCL share one GPU, or have one each where ``gpus`` is ``n``.

    ``function`` must be importable by the started processes. Any rank's exception, or silence for ``timeout`` seconds
    (times TIME_SCALE), kills all ranks and fails with every traceback.
    """
    timeout *= TIME_SCALE
    # CUDA does not survive a fork, and Triton's interpreter is chosen before kernels are imported.
    imports_anew = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    ctx = mp.get_context("spawn" if imports_anew else "forkserver")
    # Of no effect once the server runs.
    ctx.set_forkserver_preload(["moba_cp.train.start", "pytest"])
    results, store = ctx.Queue(), store_of(n)
    rest = n, store.port, timeout, backend, gpus, dict(os.environ), results, function, args
    processes = [ctx.Process(target=_rank_main, args=(rank, *rest), daemon=True) for rank in range(n)]
    for process in processes:
        process.start()
    reports: dict[int, tuple[bool, object]] = {}
    try:
        while len(reports) < n:
            try:
                rank, ok, value = results.get(timeout=timeout)
            except queue.Empty:
                raise AssertionError(f"ranks {sorted(set(range(n)) - set(reports))} silent for {timeout} s") from None
            reports[rank] = ok, value
            if not ok:
                break
    finally:
        for process in processes:
            if len(reports) < n or not all(ok for ok, _ in reports.values()):
                process.kill()
            process.join(timeout=30)
    failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in sorted(reports.items()) if not ok]
    assert not failures, "\n".join(failures)
    return [pickle.loads(reports[rank][1]) for rank in range(n)]


def _rank_main(rank, n, port, timeout, backend, gpus, environment, results, function, args):
    torch.set_num_threads(1)
    # A forked process has the variables that the server was started with.
    os.environ.clear()
    os.environ.update(environment | environment_of(rank, n, port))
    if "nccl" in backend and gpus == 1:
        # NCCL refuses two ranks on one GPU unless they look like two hosts.
        os.environ.update(NCCL_HOSTID=f"rank{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1", LOCAL_RANK="0")
    if "nccl" in backend:
        torch.cuda.set_device(rank % gpus)
    try:
        dist.init_process_group(backend, rank=rank, world_size=n, timeout=timedelta(seconds=timeout))
        value = function(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
        # By value: a tensor shared through the queue is lost if its process ends first.
        results.put((rank, True, pickle.dumps(value)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


class ThreadCommunicator(Communicator):
    """A Communicator whose ranks are threads: tensors change hands through a shared board.

    Ranks compute one at a time, since Triton's interpreter serves one thread only.
    """

    def __init__(self, rank: int, size: int, board: list, barrier: threading.Barrier, turn: threading.Lock):
        super().__init__(None)
        self.rank, self.size = rank, size
        self._board, self._barrier, self._turn = board, barrier, turn

    def _made(self, ranks):
        # Shared by these threads: the one that comes first makes it.
        parts = self._swap({ranks: ([None] * len(ranks), threading.Barrier(len(ranks)))})
        board, barrier = parts[ranks.start][ranks]
        part = ThreadCommunicator(ranks.index(self.rank), len(ranks), board, barrier, self._turn)
        return part.share_memory() if self.memory is not None else part

    def share_memory(self) -> "ThreadCommunicator":
        """From now on ranks read one another's memory where the library can do that."""
        self.memory = ThreadPeerMemory(self)
        return self

    def _swap(self, mine):
        self._board[self.rank] = mine
        self._meet()
        everybody = list(self._board)
        self._meet()
        return everybody

    def _meet(self):
        self._turn.release()
        try:
            self._barrier.wait(TIMEOUT_S)
        finally:
            self._turn.acquire()

    def _all_gather(self, x, what):
        out = torch.stack(self._swap(x))
        return lambda: out

    def _all_to_all(self, x, send, receive, what):
        assert x.shape[0] == sum(send) and len(send) == len(receive) == self.size
        everybody = self._swap(x.split(send))
        arrived = [parts[self.rank] for parts in everybody]
        assert [part.shape[0] for part in arrived] == receive, "the two sides disagree on what is sent"
        out = torch.cat(arrived)
        return lambda: out


class ThreadPeerMemory(PeerMemory):
    """Buffers of all ranks that are threads; they start as NaN."""

    def __init__(self, comm: ThreadCommunicator):
        super().__init__(comm.rank, comm.size)
        self._comm = comm

    def barrier(self):
        self._comm._meet()

    def _allocate(self, name, nbytes):
        # All bits set is NaN in every floating dtype.
        return self._comm._swap(torch.full((nbytes,), 255, dtype=torch.uint8))

    def _settle(self):
        self._comm._meet()

    def _all_ranks(self, value):
        return self._comm._swap(value)


class FilePeerMemory(PeerMemory):
    """Buffers of all ranks that are processes: files in a folder, mapped by all; they start as NaN."""

    def __init__(self, folder):
        super().__init__(dist.get_rank(), dist.get_world_size())
        self._folder, self._files = folder, 0

    def barrier(self):
        dist.barrier()

    def _allocate(self, name, nbytes):
        self._files += 1
        paths = [f"{self._folder}/{self._files}_{rank}" for rank in range(self.size)]
        with open(paths[self.rank], "wb") as file:
            file.write(b"\xff" * nbytes)
        dist.barrier()
        return [torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8) for path in paths]

    def _settle(self):
        dist.barrier()

    def _all_ranks(self, value):
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def run_threads(n: int, function, *args) -> list:
    """``function(communicator, *args)`` on ``n`` ranks that are threads; returns their results in rank order."""
    board, barrier, turn = [None] * n, threading.Barrier(n), threading.Lock()
    results, failures = [None] * n, []

    def main(rank):
        try:
            with turn:
                results[rank] = function(ThreadCommunicator(rank, n, board, barrier, turn), *args)
        except threading.BrokenBarrierError:
            pass
        except BaseException:
            failures.append(f"rank {rank}:\n{traceback.format_exc()}")
            barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert not failures, "\n".join(failures)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results
