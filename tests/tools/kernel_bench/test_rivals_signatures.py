"""The stand-ins of other engines take the arguments that the installed packages take, by their sources.

Nothing of the packages is imported: most need a GPU for that. Where one is not installed, its test is skipped; the
versions that were looked at stand in `tools/kernel_bench/rivals/`.
"""

import ast
import re
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import pytest
from support import engines_in_torch as stand_ins

DEEPGEMM = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_masked", "m_grouped_fp8_gemm_nt_contiguous")
SOURCES: dict[str, dict[str, tuple[str, ...]]] = {
    "deep_gemm": {"_C.py": DEEPGEMM},
    "vllm": {
        "third_party/deep_gemm/_C.py": DEEPGEMM,
        "_custom_ops.py": (
            "rms_norm", "fused_add_rms_norm", "rms_norm_per_block_quant", "cutlass_scaled_mm", "grouped_topk",
            "silu_and_mul_per_block_quant", "fused_qk_norm_rope",
        ),
        "model_executor/layers/fused_moe/fused_moe.py": (
            "try_get_optimal_moe_config", "invoke_fused_moe_triton_kernel",
        ),
        "model_executor/layers/fused_moe/moe_align_block_size.py": ("moe_align_block_size",),
        "model_executor/layers/quantization/utils/fp8_utils.py": ("w8a8_triton_block_scaled_mm",),
        "vllm_flash_attn/flash_attn_interface.py": ("flash_attn_varlen_func",),
    },
    "flashinfer": {
        "norm/__init__.py": ("rmsnorm", "fused_add_rmsnorm"),
        "gemm/gemm_base.py": ("fp8_blockscale_gemm_sm90",),
        "rope.py": ("apply_rope_with_cos_sin_cache_inplace",),
        "decode.py": ("BatchDecodeWithPagedKVCacheWrapper",),
        "prefill.py": ("BatchPrefillWithPagedKVCacheWrapper",),
    },
}  # fmt: skip
CASES = [(package, path, name) for package, files in SOURCES.items() for path, names in files.items() for name in names]


def package_folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def definition(source: str, name: str) -> list[Any]:
    """The last definition of a function, class or alias ('name': other) in a source; of overloads the last holds."""
    alias = re.search(rf"'{name}': (\w+)", source)
    wanted = alias[1] if alias else name
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds) and node.name == wanted][-1:]


def compare(real: ast.FunctionDef, own: Any) -> None:
    """What the stand-in takes by position stands at that place; what the real one must get, the stand-in takes."""
    arguments, parameters = real.args, signature(own).parameters
    places = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names = {*places, *(argument.arg for argument in arguments.kwonlyargs)}
    for place, parameter in enumerate(parameters.values()):
        if parameter.kind == Parameter.POSITIONAL_OR_KEYWORD and parameter.default is Parameter.empty:
            assert places[place] == parameter.name
        else:
            assert parameter.name in names or arguments.kwarg is not None
    needed = places[: len(places) - len(arguments.defaults)]
    needed += [a.arg for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None]
    assert set(needed) <= set(parameters)


@pytest.mark.parametrize(("package", "path", "name"), CASES)
def test_arguments_are_those_of_the_installed_package(package: str, path: str, name: str) -> None:
    source = package_folder(package) / path
    if package == "deep_gemm" and not source.exists():
        pytest.skip("this DeepGEMM is compiled as a whole")
    found = definition(source.read_text(encoding="utf-8"), name)
    assert found, f"{source} has no {name}"
    own = getattr(stand_ins, name)
    if not isinstance(found[0], ast.ClassDef):
        compare(found[0], own)
        return
    methods = {node.name: node for node in found[0].body if isinstance(node, ast.FunctionDef)}
    for method in ("__init__", "plan", "run"):
        compare(methods[method], getattr(own, method))
