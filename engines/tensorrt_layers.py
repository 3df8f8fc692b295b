"""Layers and memory of a built engine, from the log of its build: also on a machine that cannot load the engine."""

import re
from dataclasses import dataclass
from pathlib import Path

from angelforge.diskerrors import explained

LOGS = {"target": "build.log", "draft": "draft.log"}  # in the engine's folder, by the graph's role
_LAYER = re.compile(
    r"^(?:Name: )(?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], (?:Constants|Out)"
)
_PROFILE = re.compile(r" \[profile (\d+)\]")
_SUFFIX = re.compile(r"(_myl\d+_\d+)?$")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
# Kinds under which TensorRT runs plugins.
PLUGIN_KINDS = {"custom_layer", "PluginV", "PluginV3"}


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine in one profile."""

    name: str  # the ONNX node's where it is one
    kind: str  # TensorRT's word: custom_layer is a plugin, kgen a generated kernel
    profile: int

    @property
    def is_plugin(self) -> bool:
        """Whether it launches a kernel of this project."""
        return self.kind in PLUGIN_KINDS


def read_layers(log: Path) -> list[EngineLayer]:
    """All layers that TensorRT listed at the end of a build; empty where it listed none.

    Raises:
        AngelForgeError: the log cannot be read.
    """
    with explained("read", log), log.open(encoding="utf-8", errors="replace") as file:
        return [_layer(match) for line in file if (match := _LAYER.match(line))]


def read_activation_bytes(log: Path) -> tuple[int, ...]:
    """Bytes of activations that TensorRT reserves in each profile; empty where it did not say.

    Raises:
        AngelForgeError: the log cannot be read.
    """
    with explained("read", log), log.open(encoding="utf-8", errors="replace") as file:
        return tuple(int(match[1]) for line in file if (match := _ACTIVATIONS.search(line)))


def _layer(match: re.Match[str]) -> EngineLayer:
    profile = _PROFILE.search(match["name"]) or _PROFILE.search(match["inputs"])
    name = _SUFFIX.sub("", _PROFILE.sub("", match["name"]))
    return EngineLayer(name, match["kind"], int(profile[1]) if profile else 0)
