"""Which replica answers a request: the one whose cache may have the prompt's begin, while it is not the busier one."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

_SLACK = 4  # requests by which the preferred replica may be busier than the idlest
_PROBED = 8  # of very many replicas only so many are asked for their load


class PrefixRouter(RequestRouter):
    """Rendezvous hashing (Thaler and Ravishankar 1998) of the prompt's begin over the replicas, bounded by load.

    The same begin leads to the same replica, and only what belonged to a replica moves when that one comes or goes.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas in the order in which they are tried; Ray takes the idlest of a group."""
        if not candidate_replicas:
            return []
        prefix = _prefix(pending_request)
        if not prefix:
            return [_some(candidate_replicas)]
        preferred = max(candidate_replicas, key=lambda replica: _weight(prefix, str(replica.replica_id)))
        others = [replica for replica in candidate_replicas if replica is not preferred]
        if not others:
            return [[preferred]]
        load = {replica.replica_id: self.replica_queue_len_cache.get(replica.replica_id) for replica in others}
        idlest = min(queued or 0 for queued in load.values())
        own = self.replica_queue_len_cache.get(preferred.replica_id) or 0
        if own - idlest > _SLACK:
            return [_some(others), [preferred]]
        return [[preferred], _some(others)]


def _prefix(request: PendingRequest | None) -> str:
    first: Any = request.args[0] if request is not None and request.args else None
    return getattr(first, "prefix", "")


def _weight(prefix: str, replica: str) -> bytes:
    return blake2b(f"{replica}\n{prefix}".encode("utf-8", "replace"), digest_size=8).digest()


def _some(replicas: list[RunningReplica]) -> list[RunningReplica]:
    return replicas if len(replicas) <= _PROBED else random.sample(replicas, _PROBED)
