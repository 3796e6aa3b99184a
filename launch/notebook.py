"""Runs launch/colab_evaluate.ipynb from top to bottom, as CI does (`make notebook`).

python launch/notebook.py [--update]

BEACON_SMOKE=1 makes every cell small enough for a CPU. The first error ends the run
with the cell's traceback. --update keeps the outputs of the cells tagged "result" in
the file, so that a reader of the repository sees them, and none of the others.
"""

import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "colab_evaluate.ipynb"
SECONDS = 600  # per cell
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Folders of this machine, which nobody else has.
LOCAL = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|private|opt)/\S*")


def main() -> None:
    update = sys.argv[1:] == ["--update"]
    if sys.argv[1:] and not update:
        sys.exit(f"error: unknown arguments {sys.argv[1:]}: use --update or nothing.")
    shutil.rmtree(ROOT / "out" / "colab", ignore_errors=True)  # training would go on
    os.environ.update({"BEACON_SMOKE": "1", "JAX_PLATFORMS": "cpu"})
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(ROOT)}},
        on_cell_executed=Clock().executed,
    )
    started = time.perf_counter()
    try:
        client.execute()
    except CellExecutionError as error:
        sys.exit(f"error: {COLOUR.sub('', str(error))}")
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    print(f"{len(cells)} cells in {time.perf_counter() - started:.0f} s")
    strip(cells)
    if update:
        notebook.metadata.pop("widgets", None)
        notebook.metadata["language_info"] = {"name": "python"}
        nbformat.write(notebook, NOTEBOOK)
        print(f"wrote {NOTEBOOK.relative_to(ROOT)}")


class Clock:
    """Says which cell is done, and how long it took."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def executed(self, cell: Any, cell_index: int, execute_reply: Any) -> None:
        now = time.perf_counter()
        title = cell.source.splitlines()[0].removeprefix("# @title").split("{")[0]
        status = execute_reply["content"]["status"]
        print(f"[{cell_index}]{title}: {status}, {now - self.last:.0f} s", flush=True)
        self.last = now


def strip(cells: list[Any]) -> None:
    """Leaves the outputs of results, which must not tell where they were made.

    Raises:
      SystemExit: a result without output, or with a folder of this machine in it.
    """
    for cell in cells:
        cell.execution_count = None
        cell.metadata.pop("execution", None)
        if "result" not in cell.metadata.get("tags", ()):
            cell.outputs = []
            continue
        if not cell.outputs:
            sys.exit(f"error: no output of the result cell\n{cell.source}")
        for output in cell.outputs:
            output.pop("execution_count", None)
            if found := LOCAL.search(str(output.get("text", "")) + texts(output)):
                sys.exit(f"error: {found[0]} in the output of\n{cell.source}")


def texts(output: Any) -> str:
    """The text parts of an output, pictures left out."""
    parts = output.get("data", {})
    return "".join(str(v) for k, v in parts.items() if k.startswith("text/"))


if __name__ == "__main__":
    main()
