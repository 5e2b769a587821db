r"""Shows what one run or several have done: writes report.html, one page that opens without a network.

    python scripts/report.py runs/a
    python scripts/report.py runs/a runs/b --output comparison.html
    python scripts/report.py runs/a --png loss.png

The page has the loss, throughput, machines, checkpoints, samples and the configuration; with several runs, their
curves in the same plots and a table of what differs. It also works while a run goes on, or after it has crashed.
"""

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

from forge_lib.config import flag
from forge_lib.distributed.reporting import report_errors
from forge_lib.errors import UserError
from forge_lib.flags import parse_config
from forge_lib.report.history import read_history
from forge_lib.report.page import write_report
from forge_lib.report.plots import write_png


@dataclass(kw_only=True)
class ReportConfig:
    """Every flag of this script."""

    _argument_group_name = "report"

    runs: list[str] = flag(MISSING, "run folders; may be given without the flag's name", "FOLDER")  # noqa: RUF009
    output: str = flag("", "the page; empty: report.html in the first run folder", "FILE")
    png: str = flag("", "write only the main plot, into this file", "FILE")


def main(config: ReportConfig) -> None:
    """Writes the page, or the plot.

    Raises:
        UserError: a folder is not that of a run, or a file cannot be written.
    """
    if config.png and config.output:
        raise UserError("--png writes only the plot, so --output has no effect: leave one of them out")
    folders = [Path(run).expanduser() for run in config.runs]
    if config.png:
        path = Path(config.png).expanduser()
        write_png([read_history(folder) for folder in folders], path)
    else:
        path = Path(config.output).expanduser() if config.output else folders[0] / "report.html"
        write_report(folders, path)
    print(path)


if __name__ == "__main__":
    with report_errors("report.py"):
        main(parse_config(ReportConfig, sys.argv[1:], description=__doc__, positional="runs"))
