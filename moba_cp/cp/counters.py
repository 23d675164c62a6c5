"""How much moved between ranks."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Counters:
    """What moved since the last :meth:`reset`, on this rank; bytes between this rank and others."""

    sent: Counter[str] = field(default_factory=Counter)
    """Bytes sent to other ranks, by kind of message."""
    received: Counter[str] = field(default_factory=Counter)
    """Bytes received from other ranks, by kind of message."""
    dense_ring: int = 0
    """Bytes a dense ring would have received for the same calls."""
    planned: int = 0
    """Bytes, forward and backward, that the plans say this rank's requests and the answers to them take."""
    needed: int = 0
    """(KV head, block) pairs of other ranks that local queries selected or lie in."""
    remote: int = 0
    """(KV head, block) pairs of other ranks that some local query could have selected."""
    hottest: int = 0
    """Most local rows that selected one (KV head, block) in one call."""

    def reset(self) -> None:
        """Start again from zero."""
        self.__init__()

    def summary(self) -> dict[str, int | float | None]:
        """Flat numbers for a log; ``needed_share`` is None where nothing was planned."""
        flat = {f"sent_{kind}_bytes": n for kind, n in sorted(self.sent.items())}
        flat |= {f"received_{kind}_bytes": n for kind, n in sorted(self.received.items())}
        return flat | {
            "sent_bytes": sum(self.sent.values()),
            "received_bytes": sum(self.received.values()),
            "planned_bytes": self.planned,
            "dense_ring_bytes": self.dense_ring,
            "hottest_rows": self.hottest,
            "needed_share": self.needed / self.remote if self.remote else None,
        }
