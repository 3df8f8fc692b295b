"""Standard streams as a command can meet them: closed by who started it, or of an encoding that lacks a character."""

import io
import os
import sys


def prepare_streams() -> None:
    """Make sure that reading and writing never fails for want of a stream or of a character.

    A stream that is closed (`<&-`, some daemons) becomes the null device: Python has None there, and the next file
    that is opened, a weight file for example, would get its number and what a library prints. A character that the
    encoding of the terminal lacks (GBK, Latin-1) is written as `?`.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # by number: the lowest free one is given
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
