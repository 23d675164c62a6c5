"""Speeds of links and kernels, by which ``bench exchange`` predicts times."""

from dataclasses import dataclass, field


def _speed(default: float, meaning: str):
    return field(default=default, metadata={"help": f"{meaning} (%(default)s)"})


@dataclass(frozen=True)
class Links:
    """Speeds for the prediction; the defaults are an H100 or H200 node with one 400 Gb/s card per GPU."""

    within_gbps: float = _speed(370.0, "GB/s per GPU and direction within a node")
    copy_gbps: float = _speed(300.0, "GB/s that copy engines bring a GPU from the others of its node")
    between_gbps: float = _speed(48.0, "GB/s per GPU and direction between nodes")
    within_latency_us: float = _speed(30.0, "microseconds per collective within a node")
    between_latency_us: float = _speed(90.0, "microseconds per collective between nodes")
    tflops: float = _speed(
        320.0,
        "TFLOP/s of a layer's attention, routing included, forward and backward (2.5 times the operations): an H100 at "
        "131,072 tokens in blocks of 512",
    )
