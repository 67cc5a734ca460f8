"""`python -m streammerge.cli`."""

from streammerge.cli import main

main(prog_name="streammerge")
