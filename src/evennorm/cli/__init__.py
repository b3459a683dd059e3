"""Define the `evennorm` command: one verb per tool; printing and exit codes only.

Exit codes: 0 clean, 1 findings, 2 failure (bad input, or the machine said no), 130 interrupted.
"""

import sys

from evennorm.errors import MissingExtra

try:
    import click
except ImportError:  # the one dependency without which there is no command at all
    print(MissingExtra("the evennorm command", "tools", "click"), file=sys.stderr)
    sys.exit(2)

from evennorm import __version__
from evennorm.cli.bench import bench
from evennorm.cli.check import check
from evennorm.cli.compare import compare
from evennorm.cli.doctor import doctor
from evennorm.cli.explain import explain
from evennorm.cli.fold import fold
from evennorm.cli.group import Group
from evennorm.cli.migrate import migrate
from evennorm.cli.recalibrate import recalibrate


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="evennorm")
def main() -> None:
    """Batch normalization you can see, trust and afford.

    `evennorm COMMAND --help` says what a command takes, with examples.
    """


main.add_command(explain)
main.add_command(compare)
main.add_command(check)
main.add_command(fold)
main.add_command(recalibrate)
main.add_command(migrate)
main.add_command(bench)
main.add_command(doctor)
