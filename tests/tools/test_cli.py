"""The command line's frame: quick to answer, and every failure is a sentence with an exit code."""

import errno
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import angelforge
from angelforge.errors import AngelForgeError, UsageError
from angelforge.tools import cli
from angelforge.tools.options import NUMBER

HEAVY = ("onnx", "onnxruntime", "onnxscript", "onnx_ir", "numpy", "torch", "rich", "huggingface_hub", "tokenizers")
COMMANDS = cli.main.list_commands(click.Context(cli.main))


def whole_names() -> list[str]:
    """Commands as they are typed: `doctor`, and for a group each of its own: `bench step`."""
    context = click.Context(cli.main)
    found = []
    for name in COMMANDS:
        command = cli.main.get_command(context, name)
        parts = sorted(command.commands) if isinstance(command, click.Group) else []
        found += [f"{name} {part}" for part in parts] or [name]
    return found


Run = Callable[..., Result]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `angelforge doctor ARGS` where doctor is replaced by a command that raises the given error."""

    def run(error: BaseException, *args: str, before: tuple[str, ...] = ()) -> Result:
        @click.command()
        @click.option("--json", "as_json", is_flag=True)
        @click.option("--count", type=int)
        def doctor(as_json: bool, count: int | None) -> None:
            raise error

        monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: doctor)
        return CliRunner().invoke(cli.main, [*before, "doctor", *args])

    return run


def test_help_imports_nothing_heavy() -> None:
    """`angelforge --help` answers at once: it imports click and no library of numbers or models."""
    code = "import sys; from angelforge.tools.cli import main; main(['--help'], standalone_mode=False); "
    code += f"sys.exit(','.join(name for name in {HEAVY!r} if name in sys.modules) or 0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"imported: {result.stderr}"
    assert "doctor" in result.stdout


def test_help_lists_the_commands_that_exist_and_no_others() -> None:
    """The list is made from the files there are; a module that is no command is not in it."""
    folder = Path(cli.__file__).parent
    assert set(COMMANDS) == {name for name in cli.SUMMARIES if (folder / f"{name}.py").exists()}
    text = CliRunner().invoke(cli.main, ["--help"]).output
    assert all(cli.SUMMARIES[name] in text for name in COMMANDS)
    missing = set(cli.SUMMARIES) - set(COMMANDS)
    assert not [name for name in missing if cli.SUMMARIES[name] in text]


@pytest.mark.parametrize("name", whole_names())
def test_every_command_has_an_example_and_json(name: str) -> None:
    """`angelforge NAME --help` shows an example call and the option --json."""
    result = CliRunner().invoke(cli.main, [*name.split(), "--help"])
    assert result.exit_code == 0
    assert f"angelforge {name}" in result.output.split("Example")[1]
    assert "--json" in result.output


def test_version() -> None:
    result = CliRunner().invoke(cli.main, ["--version"])
    assert result.exit_code == 0
    assert angelforge.__version__ in result.output


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (AngelForgeError("the bundle has no engine"), 1, "error: the bundle has no engine\n"),
        (UsageError("--top-p is 2"), 2, "error: --top-p is 2\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (OSError(errno.ENOSPC, "x", "w.bin"), 1, "error: w.bin: no space left on device. Free some space"),
        (PermissionError(errno.EACCES, "x", "w.bin"), 1, "error: w.bin: permission denied. Change the permissions"),
        (FileNotFoundError(errno.ENOENT, "x", "a"), 1, "error: a: no such file or directory. Check the path.\n"),
        (OSError("connection lost"), 1, "error: connection lost.\n"),
        (MemoryError("12 GB"), 1, "error: out of memory (12 GB). Free memory"),
        (ModuleNotFoundError("x", name="onnx.checker"), 1, "error: the Python package 'onnx.checker' is missing."),
        (ImportError("libc.so.9: cannot open", name="x", path="x.so"), 1, "error: x.so cannot be loaded: libc.so.9"),
    ],
)
def test_failures_are_sentences(failing: Run, error: BaseException, code: int, said: str) -> None:
    """Every failure that a user can meet: its message on standard error, its exit code, and no traceback."""
    result = failing(error)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr.startswith(said)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("error", [AngelForgeError("no engine"), OSError(errno.ENOSPC, "x", "w.bin")])
def test_debug_shows_the_traceback(failing: Run, error: Exception) -> None:
    """For developers the traceback comes before the message, which stays last."""
    result = failing(error, before=("--debug",))
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert result.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("error", [ValueError("x"), ImportError("cannot import name 'x'", name="angelforge.config")])
def test_a_bug_is_not_hidden(failing: Run, error: Exception) -> None:
    """An error that no one expected is a bug, and a bug shows where it is."""
    assert failing(error).exception is error


def test_json_errors(failing: Run) -> None:
    """With --json the error is JSON on standard output too, with the same exit code."""
    result = failing(UsageError("--top-p is 2"), "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"error": "--top-p is 2"}
    assert "--top-p is 2" in result.stderr


@pytest.mark.parametrize("args", [("--count", "many"), ("--nope",), ("extra",)])
def test_wrong_options(failing: Run, args: tuple[str, ...]) -> None:
    """What click refuses ends with 2 and the usage line; as JSON too when asked for, wherever --json stands."""
    result = failing(AngelForgeError("never reached"), *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: main doctor")
    for order in ((*args, "--json"), ("--json", *args)):
        result = failing(AngelForgeError("never reached"), *order)
        assert result.exit_code == 2
        assert args[0] in json.loads(result.stdout)["error"] or "many" in json.loads(result.stdout)["error"]


def commands(group: click.Group) -> Iterator[click.Command]:
    """All of a group, those of groups in it too."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield from commands(command) if isinstance(command, click.Group) else [command]


def test_numbers_are_finite() -> None:
    """No option takes `nan` or `inf`."""
    numbers = 0
    for command in commands(cli.main):
        for option in command.params:
            if isinstance(option.type, click.types.FloatParamType):
                assert option.type is NUMBER, f"{command.name} {option.opts}"
                numbers += 1
    assert numbers > 10
    for text in ("nan", "inf", "-inf", "1e999", "three"):
        with pytest.raises(click.BadParameter, match=r"not a (finite number|valid float)"):
            NUMBER.convert(text, None, None)
    assert NUMBER.convert("1e3", None, None) == 1000


def test_unknown_command() -> None:
    result = CliRunner().invoke(cli.main, ["nope"])
    assert result.exit_code == 2
    assert "No such command 'nope'" in result.stderr


def test_a_module_that_is_no_command_cannot_be_called() -> None:
    """Names outside the table are unknown, even where a module of that name exists."""
    assert CliRunner().invoke(cli.main, ["output"]).exit_code == 2


def run_in_shell(args: str, redirect: str) -> subprocess.CompletedProcess[str]:
    """Run the command with redirections as a shell does them."""
    command = f"{shlex.quote(sys.executable)} -m angelforge.tools {args} {redirect}"
    return subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)


@pytest.mark.parametrize("redirect", ["| true", ">&-", "2>&- >&-"])
def test_reader_that_goes_away_is_quiet(redirect: str) -> None:
    """A reader that ends early and closed outputs show no traceback."""
    assert run_in_shell("doctor --json", redirect).stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("args", ["--help", "doctor --json"])
def test_full_disk_behind_the_output(args: str) -> None:
    """Output that cannot be written is a failure with a sentence."""
    result = run_in_shell(args, "> /dev/full")
    assert result.returncode in (1, 120)  # 120: Python could not flush its output at the end
    assert result.stderr.startswith("error: no space left on device. Free some space")
    assert "Traceback" not in result.stderr


def test_of_torchruns_processes_the_first_one_speaks(failing: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that all of them meet is told once; exit codes are the same."""
    monkeypatch.setattr("angelforge.tools.failures._FIRST_SPEAKS", 0.0)
    for rank, told in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        result = failing(UsageError("Too many ranks."))
        assert result.exit_code == 2
        assert ("Too many ranks." in result.stderr) is told
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert "Too many ranks." in failing(UsageError("Too many ranks.")).stderr


def test_an_interrupt_waits_until_torch_is_imported(tmp_path: Path) -> None:
    """torch's C++ parts end the process (SIGSEGV, SIGABRT) where Python raises KeyboardInterrupt among them."""
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\nfor _ in range(9): pass\nprint('loaded')\n")
    code = "import time; from angelforge.tools.failures import *\n"
    code += "with failures_as_messages(ErrorStyle()):\n  import torch\n  time.sleep(30)"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20)
    assert result.stdout == "loaded\n"
    assert result.stderr.endswith("Interrupted: interrupted\n")


def test_an_interrupt_that_is_repeated_meanwhile_is_one(tmp_path: Path) -> None:
    """Who sees nothing happen presses Ctrl-C again; what the first one ends is not interrupted by the others."""
    press = "import os, time\nfor _ in range(4):\n  os.kill(os.getpid(), 2)\n  time.sleep(0.02)\n"
    (tmp_path / "torch.py").write_text(press)
    code = "import sys, time; from angelforge.tools.failures import *\n"
    code += "try:\n  with failures_as_messages(ErrorStyle()):\n    import torch\n    time.sleep(30)\n"
    code += "except Interrupted:\n  time.sleep(0.5); print('ended')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=20)
    assert (result.stdout, result.stderr) == ("ended\n", "")
