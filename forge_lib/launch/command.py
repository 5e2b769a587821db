"""The command p2p-llm-forge: starts a run, or with the word `status` first, tells how a run is doing."""

import sys


def main(argv: list[str] | None = None) -> None:
    """Runs the command, and exits with its code."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["status"]:
        from forge_lib.launch.status import main as run  # imports little: it answers at once

        run(words[1:])
    else:
        from forge_lib.launch.start import main as run

        run(words)


if __name__ == "__main__":
    main()
