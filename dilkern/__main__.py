"""`python -m dilkern`."""

from dilkern.cli import main

main()
