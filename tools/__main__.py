"""`python -m angelforge.tools` is the command `angelforge`, where its script is not on the PATH."""

from angelforge.tools.cli import main

if __name__ == "__main__":
    main(prog_name="angelforge")
