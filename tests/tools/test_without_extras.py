"""What the package does with its required dependencies alone, as README's first command installs it."""

import subprocess
import sys
from pathlib import Path

import pytest

# The packages of pyproject.toml's extras: an entry of None makes `import` say that there is none.
EXTRAS = ("fastapi", "llguidance", "prometheus_client", "ray", "tensorrt", "tensorrt_rtx_bindings", "torch", "triton")
PROGRAM = f"""
import sys
sys.modules.update(dict.fromkeys({(*EXTRAS, "uvicorn")!r}))
from angelforge.tools.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def bundle(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an engine, made without any extra."""
    folder = tmp_path_factory.mktemp("plain") / "bundle"
    for command in (("export", small_checkpoint, folder), ("build", folder)):
        result = angelforge(*command)
        assert result.returncode == 0, result.stderr
    (folder.parent / "ids.json").write_text("[5, 17, 9]")
    return folder


def angelforge(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize(
    "command",
    [
        ("run", "{}", "--tokens", "{}/../ids.json", "--max-tokens", "2"),
        ("score", "{}", "--tokens", "{}/../ids.json", "--output", "{}/../logits.npy"),
        ("validate", "{}", "--random", "1", "--length", "4"),
        ("plan", "{}"),
        ("inspect", "{}", "--html", "{}/../page.html"),
        ("inspect", "{}/engines/cpu"),
    ],
    ids=lambda command: " ".join(command).replace("{}", "bundle"),
)
def test_works_without_extras(bundle: Path, command: tuple[str, ...]) -> None:
    """Nothing that runs on a CPU asks for triton, torch, TensorRT or the server's packages."""
    result = angelforge(*(part.replace("{}", str(bundle)) for part in command))
    assert result.returncode == 0, result.stderr
