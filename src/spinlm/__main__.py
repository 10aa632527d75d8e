"""`python -m spinlm` is the command line."""

from spinlm.cli import main

main()
