"""Models of the Hugging Face hub: finds the folder of a model that is named by its path or its repository.

Needs huggingface_hub (`pip install 'far_scale[hub]'`) for repositories, and neither it nor the network for folders.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from far_scale.model.model_files import CONFIG_FILE, FORMAT, INDEX_FILE, MODEL_FILES, WEIGHTS_FILE, indexed_files
from far_scale.utils.errors import UserError
from far_scale.utils.io import read_json

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def is_repository(source: str | Path) -> bool:
    """Whether `source` names a repository of the hub, `org/name`, and not a path.

    It is a path where `org` exists in the working folder, so that a mistyped path is not looked up in the hub.
    """
    text = str(source)
    return _REPOSITORY.fullmatch(text) is not None and not os.path.lexists(text.partition("/")[0])


def find_model(source: str | Path, revision: str | None = None) -> Path:
    """The model directory at a path, or a repository's, which is downloaded into the hub's cache if it is not there.

    Only `config.json` and the safetensors files that belong to it are downloaded, all of one commit. huggingface_hub's
    environment variables apply: HF_TOKEN for private repositories, HF_HOME for the cache, HF_HUB_OFFLINE, HF_ENDPOINT.

    Args:
        source: a path, returned as it is, or `org/name` (`is_repository`).
        revision: branch, tag or commit of the repository; default: main.

    Raises:
        UserError: the repository or revision cannot be found or read, is not a model of far_scale, or the hub cannot
            be reached and the model is not in the cache; or a revision of a path.
    """
    if is_repository(source):
        return _download(str(source), revision)
    if revision is not None:
        raise UserError(
            f"{source}: is a path here, and revision={revision} is for repositories of the hub (org/name, where the "
            "working folder has no org); leave revision out, or run it in another folder"
        )
    return Path(source)


def _download(repository: str, revision: str | None) -> Path:
    named = repository if revision is None else f"{repository} at revision {revision}"
    config = _fetch(repository, CONFIG_FILE, revision)
    if config is None:
        raise _no_model(named, f"it has no {CONFIG_FILE}")
    values: Any = read_json(config, "config.json")
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise _no_model(named, f"the format in its {CONFIG_FILE} is {found!r:.80}, needed is {FORMAT!r}")
    commit = config.parent.name  # CACHE/models--ORG--NAME/snapshots/COMMIT/config.json
    if isinstance(values.get("files"), dict):
        names = list(values["files"])
    else:  # an older directory
        index = _fetch(repository, INDEX_FILE, commit)
        names = [WEIGHTS_FILE] if index is None else indexed_files(index)
    for name in names:
        if not isinstance(name, str) or MODEL_FILES.fullmatch(name) is None:  # nothing else is ever downloaded
            raise _no_model(named, f"it names {name!r:.80} as a file of weights")
        if _fetch(repository, name, commit) is None:
            raise _no_model(named, f"it has no {name}")
    return config.parent


def _no_model(named: str, problem: str) -> UserError:
    return UserError(
        f"{named}: is not a model of far_scale: {problem}; name a repository of what tools/export_checkpoint.py writes"
    )


def _fetch(repository: str, name: str, revision: str | None) -> Path | None:
    """The path of a repository's file in the hub's cache, downloaded if needed; None if the repository has no such one.

    huggingface_hub renames a file into its place when it is complete, and resumes a transfer that breaks off.
    """
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise UserError(
            f"{repository}: there is no such folder here, and loading it from the hub needs huggingface_hub, which "
            f"does not import here ({error}); pip install 'far_scale[hub]', or give the path of a model directory"
        ) from None
    named = repository if revision is None else f"{repository} at revision {revision}"
    try:
        return Path(hf_hub_download(repository, name, revision=revision, library_name="far_scale"))
    except GatedRepoError:
        problem = "this repository is gated; ask for access on its page in the hub, and set HF_TOKEN"
    except RepositoryNotFoundError:
        problem = (
            "there is no such folder here, and no such repository in the hub, or it is private; check the name, or set "
            "HF_TOKEN (or run hf auth login) to the token of an account that may read it"
        )
    except RevisionNotFoundError:
        problem = "the repository has no such revision; name a branch, tag or commit of it"
    except LocalEntryNotFoundError as error:  # there was no answer, and it is not in the cache
        if constants.is_offline_mode():
            problem = f"{name} is not in the hub's cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set; unset it"
        else:
            problem = (
                f"there is no such folder here, and {constants.ENDPOINT} gives no usable answer "
                f"({_one_line(error.__cause__ or error)}); check the connection and HF_ENDPOINT"
            )
        problem += ", or give the path of a model directory"
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        fix = "check HF_TOKEN" if error.response.status_code in (401, 403) else "try it again later"
        problem = f"{name} could not be downloaded ({_one_line(error)}); {fix}"
    except Exception as error:  # of the network's library, or of the disk
        problem = f"{name} could not be downloaded ({_one_line(error)}); run it again, complete files are kept"
    raise UserError(f"{named}: {problem}")


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
