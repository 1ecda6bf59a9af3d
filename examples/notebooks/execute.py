"""Run the notebooks of this folder and store their results, with pictures that stay small.

    pip install 'fcvgg[docs,timm,examples,train,stream]'
    python examples/notebooks/execute.py [photograph.ipynb ...]

Every notebook runs in an empty folder, so that nothing it writes is left behind.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).parent
QUALITY = 78
"""Pictures are stored as JPEG, which takes a tenth of the bytes of PNG for photographs."""


def main() -> None:
    """Run those that are named, or all."""
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, without ipywidgets
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            NotebookClient(notebook, resources=resources, record_timing=False).execute()
        for cell in notebook.cells:
            for output in cell.get("outputs", ()):
                if "image/png" in output.get("data", {}):
                    output["data"]["image/jpeg"] = as_jpeg(output["data"].pop("image/png"))
        notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"]}
        nbformat.write(notebook, path)
        print(f"wrote {path}: {path.stat().st_size / 1000:.0f} kB")


def as_jpeg(png: str) -> str:
    """A picture in base64, from PNG to JPEG."""
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    main()
