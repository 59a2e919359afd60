"""What a load will download, found out by the engine's own program before vLLM is imported.

vLLM finds out after twenty seconds of imports; a model that does not exist, that is gated or that the disk has no room
for is known here after one question to the hub. It imports Hugging Face's library, so only programs that run as their
own process import it; what it says is read off the log like all that vLLM says.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

ASK_SECONDS: Final = 10.0
MARGIN_BYTES: Final = 64 << 20
_ALWAYS: Final = (".json", ".txt", ".model", ".py", ".jinja", ".tiktoken")
_WEIGHTS: Final = (".safetensors", ".bin", ".pt")


def plan_download(
    model_name: str, revision: str | None, free_bytes: Callable[[Path], int] | None = None
) -> tuple[list[str], bool]:
    """Ask the hub what is missing here.

    Parameters
    ----------
    model_name, revision
        A name in the hub, and a branch, tag or commit.
    free_bytes
        Measures the room of the disk of a folder; the real one if not given.

    Returns
    -------
    tuple[list[str], bool]
        Lines for the log, and whether it makes sense to go on.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE or Path(model_name).expanduser().exists():
        return [], True
    try:
        info = HfApi().model_info(model_name, revision=revision, files_metadata=True, timeout=ASK_SECONDS)
    except GatedRepoError:
        return [f"llmkit: GatedRepoError: {model_name}"], False
    except RevisionNotFoundError:
        return [f"llmkit: RevisionNotFoundError: {model_name} {revision}"], False
    except RepositoryNotFoundError:
        return [f"llmkit: RepositoryNotFoundError: {model_name}"], False
    except Exception as error:  # noqa: BLE001  # its HTTP library has errors of its own; vLLM tries again by itself
        return [f"llmkit: the hub did not say what there is to download: {type(error).__name__}"], True
    repository = Path(constants.HF_HUB_CACHE) / f"models--{model_name.replace('/', '--')}"
    folder = repository / "blobs"
    missing = [file for file in _wanted(info.siblings or ()) if not _is_here(file, repository, str(info.sha))]
    size = sum(file.size or 0 for file in missing)
    if not size:
        return [], True
    room = free_bytes or (lambda path: shutil.disk_usage(path).free)
    here = next(path for path in (folder, *folder.parents) if path.exists())
    free = room(here)
    if free < size + MARGIN_BYTES:
        return [f"llmkit: not enough disk: {size} bytes to download, {free} bytes free in {folder}"], False
    return [f"llmkit: to download: {len(missing)} files, {size} bytes, into {folder}"], True


def _wanted(files: Iterable[Any]) -> list[Any]:
    """Choose what vLLM downloads: everything small, and the weights in the first format that there is."""
    listed = [file for file in files if "/" not in file.rfilename and not file.rfilename.startswith("consolidated")]
    formats = (s for s in _WEIGHTS if any(file.rfilename.endswith(s) for file in listed))
    weights = next(formats, ".safetensors")
    return [file for file in listed if file.rfilename.endswith((*_ALWAYS, weights))]


def _is_here(file: Any, repository: Path, commit: str) -> bool:
    here: bool = (repository / "snapshots" / commit / file.rfilename).exists()
    return here
