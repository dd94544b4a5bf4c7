"""Documents that show commands with their output: run the commands again, and write what they print now.

    python -m abccl.tools.blocks docs/tuning.md

A fenced block that begins with `$ COMMAND` holds commands and their output. One whose first line is `# NAME` with a
suffix, as in `# steps.py`, is a file that commands after it can use. Commands run one after the other, in a folder of
their own and with a cache of the tuner's that is empty at first.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w-]+\.\w+)\n")
CACHE = "~/.cache/abccl"
"""What stands for the cache in the document."""


def rewritten(text: str, folder: Path) -> str:
    """The document with the output of its commands made anew, in an empty folder.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """

    def block(found: re.Match[str]) -> str:
        language, body = found.groups()
        if named := _FILE.match(body):
            (folder / named[1]).write_text(body)
        if not body.startswith("$ "):
            return found[0]
        commands = re.findall(r"^\$ (.*)$", body, re.MULTILINE)
        outputs = "\n".join(f"$ {command}\n{run(command, folder)}" for command in commands)
        return f"```{language}\n{outputs}```"

    return _FENCED.sub(block, text)


def run(command: str, folder: Path) -> str:
    """What a command prints.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ABCCL_")}
    environment["ABCCL_CACHE_DIR"] = str(folder / "cache")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, timeout=600, check=True
    )
    lines = done.stdout.replace(environment["ABCCL_CACHE_DIR"], CACHE).splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


@click.command()
@click.argument("documents", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(documents: tuple[Path, ...]) -> None:
    """Run the commands in these documents again and write what they print now."""
    for document in documents:
        with tempfile.TemporaryDirectory() as folder:
            document.write_text(rewritten(document.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")


if __name__ == "__main__":
    main()
