"""`python -m thetau`."""

from thetau.cli import main

main()
