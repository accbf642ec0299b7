"""`python -m minference.cli`."""

from minference.cli import main

main()
