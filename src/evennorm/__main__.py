"""Run the `evennorm` command by `python -m evennorm`."""

from evennorm.cli import main

main()
