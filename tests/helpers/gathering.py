"""Options by which ``auto`` plans, and then all-gathers although its plan would move less."""

from dataclasses import dataclass

from moba_cp.cp.options import ExchangeOptions


@dataclass(frozen=True)
class GatheringFrom(ExchangeOptions):
    """``auto`` that all-gathers where a plan moves ``share`` of all-gather's bytes, or more."""

    share: float = 0.01

    def share_to_gather(self, by_copy_engines: bool) -> float:
        """See :meth:`ExchangeOptions.share_to_gather`."""
        return self.share
