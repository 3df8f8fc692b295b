"""Which kernels of ahead-of-time plugins TensorRT fetched: all whose launches it was told, or one for all profiles.

It asks for a kernel's launch (`get_launch_params`, with the sizes of a profile) and for its code (`get_kernel`, without
them) in two calls, and NVIDIA's class answers the second with the code of the latest launch. Were the launches of all
profiles asked for first, all of them would get the kernel of the last profile, and nothing would say so.
"""

from functools import cache

from angelforge.errors import AngelForgeError
from angelforge.plugins.tensorrt.library import Library


class Kernels:
    """The kernels of one build."""

    def __init__(self) -> None:
        self._told: dict[bytes, str] = {}  # code whose launch TensorRT knows → operator and tokens
        self._fetched: set[bytes] = set()

    def tell(self, code: bytes, what: str) -> str:
        """`code` as NVIDIA's class takes it: text, which it encodes when TensorRT fetches it. `what` is for messages.

        `code` must stay where it is as long as the process: TensorRT is given its address, and the bindings hold only
        what a plugin returned last.
        """
        self._told.setdefault(code, what)
        return _Code.of(code, self._fetched)

    def forget(self) -> None:
        """Another build begins."""
        self._told.clear()
        self._fetched.clear()

    def missing(self) -> list[str]:
        """The kernels that were told and never fetched."""
        return [what for code, what in self._told.items() if code not in self._fetched]

    def require_fetched(self) -> None:
        """Raises AngelForgeError if TensorRT put another kernel than the one it was told into a profile.

        Where none was seen to be fetched, other bindings read the text otherwise, and nothing can be said.
        """
        if self._fetched and (missing := self.missing()):
            raise AngelForgeError(
                f"TensorRT fetched no code for {len(missing)} kernels, first that of {missing[0]}: it took one "
                "profile's for another, and such an engine would compute nonsense. Build with --plugins python, and "
                "please report this."
            )


@cache
def kernels_of(library: Library) -> Kernels:
    """Those of the build that a process is at: TensorRT asks through functions that are registered once."""
    return Kernels()


class _Code(str):
    """Text that notes when it is encoded."""

    __slots__ = ("code", "fetched")
    code: bytes
    fetched: set[bytes]

    @classmethod
    def of(cls, code: bytes, fetched: set[bytes]) -> "_Code":
        made = cls(code.decode())
        made.code, made.fetched = code, fetched
        return made

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        """The bytes that it was made of."""
        self.fetched.add(self.code)
        return self.code
