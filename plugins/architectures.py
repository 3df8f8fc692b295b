"""What architectures of GPUs give a block of threads."""

# Compute capability → bytes of shared memory that a block may have ("Maximum amount of shared memory per thread block",
# technical specifications of compute capabilities in the CUDA C++ Programming Guide 13.0).
_SHARED = {
    75: 64 * 1024,
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    103: 227 * 1024,
    110: 227 * 1024,
    120: 99 * 1024,
    121: 99 * 1024,
}
SMALL_BLOCKS = 99 * 1024  # bytes a block: kernels whose tiles need more have others for such GPUs


def shared_limit(architecture: str) -> int:
    """Most bytes of shared memory a block on an architecture, such as "sm_90"; on unknown ones what most have."""
    return _SHARED.get(int(architecture.removeprefix("sm_")), SMALL_BLOCKS)
