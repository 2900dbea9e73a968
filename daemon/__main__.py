"""`python -m daemon` is `inspectd`."""

from daemon.cli import main

main()
