"""Serving with replicas: what must be settled before Ray is imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

from angelforge.errors import AngelForgeError
from angelforge.runtime.replicas.options import ReplicaOptions


def serve_replicas(options: ReplicaOptions, listening: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; `listening` gets the URL once requests are answered.

    Raises:
        AngelForgeError: Ray is not installed, cannot be started or reached, or a replica cannot load its engine.
        UsageError: the address cannot be listened on.
    """
    if find_spec("ray") is None:
        raise AngelForgeError("Replicas need Ray Serve: pip install 'angelforge[ray]'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to Ray's makers
    if options.cluster is None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray's own ports are open to the network
    from angelforge.runtime.replicas.cluster import run

    run(options, listening)
