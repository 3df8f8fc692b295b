"""`angelforge bench`: figures of this machine, each from one command. Ratios are taken side by side in one run."""

import click

from angelforge.tools.bench_decode import decode
from angelforge.tools.bench_device import device
from angelforge.tools.bench_headers import headers
from angelforge.tools.bench_host import host
from angelforge.tools.bench_kernels import kernels
from angelforge.tools.bench_pack import pack
from angelforge.tools.bench_sampling import sampling
from angelforge.tools.bench_serve import serve
from angelforge.tools.bench_step import step


@click.group()
def bench() -> None:
    """Measure packing, headers, steps, kernels, sampling, a GPU's decoding step, generation and servers here.

    \b
    Example:
      angelforge bench step demo/bundle
    """


for command in (pack, headers, step, host, kernels, sampling, device, decode, serve):
    bench.add_command(command)
