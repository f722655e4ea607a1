"""How requests have fared in all ingress processes, asked of each."""

from cluster.ingress_peers import IngressPeers
from cluster.slo_ledger import SloLedger, SloReport


class SloReports:
    """Belongs to the event loop of its ingress, whose own report is always there."""

    def __init__(self, own: SloLedger, peers: IngressPeers) -> None:
        self._own, self._peers = own, peers

    async def read(self) -> list[SloReport]:
        """Of all ingress processes; of this one alone where another does not answer soon."""
        return await self._peers.ask("slo_report") or [self._own.report()]
