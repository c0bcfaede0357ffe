"""Any host transport as the bridge between islands: MPI or gloo, where all nodes have the same one; or FlagCX.

ZeroMQ's bridge (comm/bridge.py) is the default; vendors' images rarely share an MPI or a torch. FlagCX joins vendors'
devices without a stop in host memory; nobody has run this package with it yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from .quirks import as_bytes
from .staging import StagedTransport
from .transport import Transport, Waits


class HostBridge(StagedTransport):
    """A host transport of the whole world with what islands ask of a bridge; tensors of any device.

    host: the address of this rank that the others reach. direct: a transport of the whole world for rows of device
    tensors, which then do not stop in host memory. Its `waits` give every peer of an exchange the whole wait.
    """

    def __init__(self, transport: Transport, host: str, direct: Transport | None = None) -> None:
        super().__init__(transport)
        self.name, self.host, self._direct = f"bridge:{(direct or transport).name}", host, direct
        self._waits = Waits(transport.size, exact=False)

    @property
    def waits(self) -> Waits:
        return self._waits

    def start(
        self,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Tensor],
        phase: str,
        detail: str = "",
        waits: Waits | None = None,
    ) -> Callable[[], None]:
        """See comm.pairwise.PairwiseTransport.start; one all-to-all of bytes, copied together and apart again.

        `waits` is given for exchanges of rows, in which every rank takes part with tensors of its own device.
        """
        places = {peer: as_bytes(tensor).view(-1) for peer, tensor in incoming.items()}
        parts = {peer: as_bytes(tensor).view(-1) for peer, tensor in outgoing.items()}
        over = self._host
        if self._direct is not None and waits is not None and any(part.device.type != "cpu" for part in parts.values()):
            over = self._direct
        else:
            parts = {peer: part.cpu() for peer, part in parts.items()}
        send_counts, recv_counts = (
            [len(each[peer]) if peer in each else 0 for peer in range(self.size)] for each in (parts, places)
        )
        sent = torch.cat([parts[peer] for peer in sorted(parts)] or [torch.empty(0, dtype=torch.uint8)])
        finish = over.start_all_to_all_v(sent, send_counts, recv_counts, phase)

        def wait() -> None:
            began = time.monotonic()
            received = finish()
            for peer, part in enumerate(received.split(recv_counts)):
                if peer in places:
                    places[peer].copy_(part)
                    if waits is not None:
                        waits.add(peer, time.monotonic() - began)

        return wait
