"""`python -m lorafold`: the command."""

from lorafold.cli import main

main()
