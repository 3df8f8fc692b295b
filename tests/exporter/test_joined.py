"""Matrices that several tensors of a checkpoint make: their blocks are those of the whole, whoever's rows they hold."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fp8 import quantise_by_definition

from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.dtypes import DType
from angelforge.exporter.openfiles import OpenFiles
from angelforge.exporter.pieces import Piece, Quantized
from angelforge.exporter.quantizing import FileQuantizer
from angelforge.exporter.synthetic import small_config
from angelforge.shards import open_tensors
from angelforge.tensorfile import encode_header

HEIGHTS = st.lists(st.sampled_from([1, 40, 64, 127, 128, 129, 300]), min_size=1, max_size=4)
TYPES = st.sampled_from([DType.BF16, DType.F16, DType.F32])
CONFIG = ModelConfig.from_dict(small_config())


@settings(max_examples=25)
@given(HEIGHTS, st.integers(1, 200), st.integers(0, 60), st.lists(TYPES, min_size=4, max_size=4), st.randoms())
def test_joined_pieces_are_quantised_as_one_matrix(heights, width, left, types, random):
    """Of any heights and types, cut from wider tensors, asked for in pieces of any size, scales first or last."""
    rng = np.random.default_rng(random.getrandbits(32))
    names = [f"draft.{index}" for index in range(len(heights))]
    arrays = [
        (rng.standard_normal((rows, left + width + 3)) * 10.0 ** rng.uniform(-3, 3, (rows, 1))).astype(dtype.numpy)
        for rows, dtype in zip(heights, types, strict=False)
    ]
    with tempfile.TemporaryDirectory() as folder, OpenFiles() as files:
        specs = [(name, dtype, array.shape) for name, dtype, array in zip(names, types, arrays, strict=False)]
        data = encode_header(specs, {}) + b"".join(array.tobytes() for array in arrays)
        (Path(folder) / "model.safetensors").write_bytes(data)
        checkpoint = Checkpoint(Path(folder), CONFIG, open_tensors(Path(folder), lambda name: True))
        cut = (left, left + width)
        pieces = tuple(Piece(name, array.shape, columns=cut) for name, array in zip(names, arrays, strict=True))
        quantizer = FileQuantizer(checkpoint, files)
        found = {}
        for part in random.sample(["codes", "scales"], 2):
            (run,) = quantizer.runs(Quantized(pieces, part, (128, 128), joined=True))
            out, offset = np.empty(run.nbytes, np.uint8), 0
            while offset < run.nbytes:
                size = min(run.nbytes - offset, 4 * random.randint(1, 4096))
                run.fill(out[offset : offset + size].data, offset)
                offset += size
            found[part] = out.tobytes()
    whole = np.concatenate([array[:, left : left + width].astype(np.float32) for array in arrays])
    codes, scales = quantise_by_definition(whole)
    assert found["codes"] == codes.tobytes()
    assert found["scales"] == scales.tobytes()
    assert quantizer.errors["draft"].count == whole.size
