"""`python -m lorafold`."""

from lorafold.cli import main

main()
