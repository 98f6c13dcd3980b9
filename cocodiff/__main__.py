"""`python -m cocodiff` is the command line."""

from cocodiff.cli import main

main()
