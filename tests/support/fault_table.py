"""Prints the table of planted faults of docs/validation.md: `make faults`."""

from pathlib import Path
from tempfile import TemporaryDirectory

from support.faults import FAULTS
from support.faulty_runs import judged_bundle, locate, row


def main() -> None:
    """Builds two small models, plants every fault, and prints what a validation says."""
    with TemporaryDirectory() as scratch:
        root = Path(scratch)
        judged = {kind: judged_bundle(kind, root / kind) for kind in ("fp32", "fp8")}
        print("| planted | bundle | place | operator | tensor | relative error | worst element: expected → found | |")
        print("|---|---|---|---|---|---|---|---|")
        for number, fault in enumerate(FAULTS):
            found = locate(judged[fault.bundle], fault, root / str(number))
            print(f"| {fault.name} | **not found** |" if found is None else row(fault, found))


if __name__ == "__main__":
    main()
