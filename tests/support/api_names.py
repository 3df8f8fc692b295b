"""What a module of Python bindings offers: `api_names.py MODULE` prints {class: {attribute: signature}} as JSON.

Functions of the module itself stand under the class "". Signatures are the first lines of pybind11's docstrings, with
the module's own name taken out, so that two flavours of one API can be compared.
"""

import importlib
import json
import sys
from typing import Any


def signature(name: str, value: Any, module: str) -> str:
    """`name(self, argument: type) -> type`, a line for each overload; empty for what is no function."""
    lines = [line.strip() for line in (getattr(value, "__doc__", None) or "").splitlines()]
    found = [line for line in lines if line.lstrip("0123456789. ").startswith(f"{name}(") and "*args" not in line]
    text = "\n".join(line.lstrip("0123456789. ") for line in found) if callable(value) else ""
    return text.replace(f"{module}.{module.removesuffix('_bindings')}.", "")


def names(module_name: str) -> dict[str, dict[str, str]]:
    """All classes of the module."""
    module = importlib.import_module(module_name)
    found: dict[str, dict[str, str]] = {"": {}}
    for name, value in vars(module).items():
        if isinstance(value, type):
            found[name] = {key: signature(key, getattr(value, key), module_name) for key in dir(value)}
        else:
            found[""][name] = signature(name, value, module_name)
    return found


if __name__ == "__main__":
    print(json.dumps(names(sys.argv[1])))
