"""Errors that a user can act on; the command line prints their message and nothing else."""


class AngelForgeError(Exception):
    """Something failed for a reason outside the program. The message says what was found, expected, and the fix."""


class UsageError(AngelForgeError):
    """The request itself is wrong (an option, a prompt, a parameter); the command line exits with code 2."""
