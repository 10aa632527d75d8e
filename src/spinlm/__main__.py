"""`python -m spinlm` is the command line."""

from spinlm.cli.app import main

main()
