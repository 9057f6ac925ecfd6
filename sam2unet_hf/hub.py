"""Sharing on the Hugging Face Hub: what is pushed of a model, a run or an ensemble, and metrics as Spaces.

python -m sam2unet_hf.hub card runs/phantom
python -m sam2unet_hf.hub ensemble runs/cv your_name/brain-tumors --private
python -m sam2unet_hf.hub metric dice my_dice_space
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from transformers import PreTrainedModel

from .clean_up_sam2unet import CLEAN_UP_FILE, CleanUp
from .configuration_sam2unet import Sam2UNetConfig, did_you_mean
from .image_processing_sam2unet import Sam2UNetImageProcessor
from .members_sam2unet import ENSEMBLE_FILE, check_alike, find_ensemble, read_members
from .metrics.space import write_metric_space
from .model_card import PICTURES, has_valid_checksum, pictures_in_card, render_model_card, write_model_card
from .weights_sam2unet import is_local_source, is_pretrained_weight, read_safetensors


WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# What a model repository holds, of all that a run leaves in its folder. Nothing in it is a pickle.
CHECKPOINT_FILES = ("config.json", "preprocessor_config.json", *WEIGHT_FILES, CLEAN_UP_FILE, "*_sam2unet.py")


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files of a folder that belong to its checkpoint."""
    return [path for pattern in CHECKPOINT_FILES for path in sorted(folder.glob(pattern))]


def files_to_push(folder: str | os.PathLike) -> list[str]:
    """Return patterns of what goes to the Hub of a run's folder: checkpoint, card and the pictures in the card."""
    card = Path(folder) / "README.md"
    return [*CHECKPOINT_FILES, card.name, *pictures_in_card(card.read_text() if card.is_file() else "")]


def push_folder(
    folder: Path, repo_id: str, *, token: str | bool | None = None, with_card: bool = True, **upload_kwargs: Any
) -> Any:
    """Upload what belongs to a model repository of all that a folder holds, and remove what it replaces there.

    These are the checkpoint, and the card with its pictures if there is a card in the folder. Weights on the Hub that
    are not among the files go, since weights in one file would be loaded instead of new ones in shards. So do
    pictures that the card does not show, the list of an ensemble that the checkpoint takes the place of, and a
    clean-up that is not among the files, since its rules are for other weights.

    Args:
        folder: Checkpoint folder or output folder of a run.
        repo_id: Repository `user/name`, which exists.
        token: Token with the right to write.
        with_card: `False` leaves out a card in the folder, such as one that tells of an older run.
        **upload_kwargs: Arguments of `HfApi.upload_folder`, such as `commit_message` and `run_as_future`.

    Returns:
        What `HfApi.upload_folder` returns.

    Raises:
        OSError: If the Hub cannot be reached or refuses.
    """
    files, outdated = list(CHECKPOINT_FILES), [*WEIGHT_FILES, ENSEMBLE_FILE, CLEAN_UP_FILE]
    if with_card and (folder / "README.md").is_file():
        files = files_to_push(folder)
        outdated += [name for name in PICTURES if name not in files]
    # By name, since the Hub's patterns reach into folders, such as those of checkpoints.
    names = [path.name for pattern in files for path in folder.glob(pattern)]
    return HfApi(token=token).upload_folder(
        repo_id=repo_id, folder_path=folder, allow_patterns=names, delete_patterns=outdated, **upload_kwargs
    )


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    loaded_from: Mapping[str, Any],
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> str:
    """Upload a model, see [`~modeling_sam2unet.Sam2UNetForSemanticSegmentation.push_to_hub`].

    `loaded_from` is `revision` and `subfolder` of the checkpoint in the repository or folder `model.name_or_path`.
    """
    api = HfApi(token=token)
    repo_id = make_repo(api, repo_id, private, revision)
    with tempfile.TemporaryDirectory() as name:
        folder, source = Path(name), str(model.name_or_path)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        run = Path(source) if source and have_equal_weights(folder, Path(source)) else None
        if run is not None or not api.file_exists(repo_id, "preprocessor_config.json", revision=revision):
            try:
                processor = Sam2UNetImageProcessor.from_pretrained(source, token=token, **loaded_from)
            except OSError:  # a new model, or a folder without one
                processor = Sam2UNetImageProcessor()
            processor.regions = model.config.regions
            processor.save_pretrained(folder)
        if run is not None and (run / CLEAN_UP_FILE).is_file():
            shutil.copyfile(run / CLEAN_UP_FILE, folder / CLEAN_UP_FILE)
        add_model_card(folder, run, api, repo_id, revision, tags)
        return push_folder(
            folder,
            repo_id,
            token=token,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def make_repo(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Make a repository and a branch of it where there is none yet, and return the name of the repository."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def push_ensemble(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Upload an ensemble, which [`~volume_sam2unet.Sam2UNetVolumePipeline`] loads from there.

    These are `ensemble.json`, of each member weights, configuration, image processor and code, one card with the table
    of `patients.json`, where patients have numbers in place of names, and at the top the code that segments volumes,
    and `clean_up.json` if there is one. A card that somebody edited is kept. Of an older model or ensemble in the
    repository the checkpoints are removed.

    Args:
        folder: Holds `ensemble.json` and the folders of the members.
        repo_id: Repository `user/name`, made if need be.
        private: Make the repository private, if it is new.
        token: Token with the right to write.
        commit_message: Title of the commit.
        revision: Branch, made if need be.
        create_pr: Open a pull request instead of a commit.

    Raises:
        FileNotFoundError: If the list of members or a file of a member is missing.
        OSError: If the Hub cannot be reached or refuses.
        ValueError: If the list or the clean-up is wrong, members differ in what they segment, or the encoder of a
            member lies on this machine alone.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}{did_you_mean(folder)}. Name the folder of an ensemble.")
    if (listed := find_ensemble(folder)) is None:
        raise FileNotFoundError(
            f"{folder} holds no ensemble: there is no {ENSEMBLE_FILE} in it that lists the folders of its members."
        )
    members = read_members(listed)
    files: dict[str, Path | bytes] = {
        f"{member}/{path.name}": path for member in members for path in checkpoint_files(folder / member)
    }
    check_members_to_push(folder, members, files)
    if (folder / CLEAN_UP_FILE).is_file():
        files[CLEAN_UP_FILE] = folder / CLEAN_UP_FILE
    files |= {path.name: path for path in Path(__file__).parent.glob("*_sam2unet.py")}
    files[ENSEMBLE_FILE] = (json.dumps({"members": members}, indent=2) + "\n").encode()
    api = HfApi(token=token)
    repo_id = make_repo(api, repo_id, private, revision)
    if (card := card_to_push(folder, folder, api, repo_id, revision)) is not None:
        files["README.md"] = card.encode()
    there = api.list_repo_files(repo_id, revision=revision)
    folders = {"", *members}
    if ENSEMBLE_FILE in there:
        folders |= set(read_members(api.hf_hub_download(repo_id, ENSEMBLE_FILE, revision=revision)))
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, content) for name, content in files.items()),
            *(
                CommitOperationDelete(name)
                for name in there
                if name not in files and is_outdated(PurePosixPath(name), folders)
            ),
        ],
        commit_message=commit_message or "Upload ensemble",
        revision=revision,
        create_pr=create_pr,
    )


def is_outdated(path: PurePosixPath, folders: set[str]) -> bool:
    """Whether a file of a repository is of a checkpoint in one of these folders, or a picture of its card."""
    patterns = (*CHECKPOINT_FILES, *PICTURES)
    return str(path.parent).strip(".") in folders and any(fnmatch(path.name, pattern) for pattern in patterns)


def check_members_to_push(folder: Path, members: Sequence[str], files: Mapping[str, Any]) -> None:
    """Check that members are whole, segment the same, and can be loaded elsewhere, and that the clean-up is theirs."""
    configs, processors = [], []
    for member in members:
        for patterns in (("config.json",), ("preprocessor_config.json",), WEIGHT_FILES):
            if not any(fnmatch(name, f"{member}/{pattern}") for name in files for pattern in patterns):
                raise FileNotFoundError(
                    f"{folder / member} lacks {patterns[0]}. Finish its training, or leave it out of {ENSEMBLE_FILE}."
                )
        config = Sam2UNetConfig.from_pretrained(folder / member)
        if config.encoder_sha256 is not None and is_local_source(config.encoder_source):
            raise ValueError(
                f"{folder / member} leaves out its encoder, which comes from {config.encoder_source} on this machine. "
                "Save the model whole, with `trainable_only=False`."
            )
        configs.append(config)
        processors.append(Sam2UNetImageProcessor.from_pretrained(folder / member))
    check_alike(members, configs, processors)
    if (folder / CLEAN_UP_FILE).is_file():
        regions: Any = configs[0].regions
        CleanUp.load(folder / CLEAN_UP_FILE, regions)


def add_model_card(
    folder: Path,
    run: Path | None,
    api: HfApi,
    repo_id: str,
    revision: str | None = None,
    tags: Sequence[str] | None = None,
) -> None:
    """Put a card of the model and of its run, with its pictures, into a folder that is about to be uploaded."""
    text = card_to_push(folder, run, api, repo_id, revision, tags)
    if text is None:
        return
    (folder / "README.md").write_text(text, encoding="utf-8")
    for name in pictures_in_card(text):
        if run is not None and (run / name).is_file():
            shutil.copyfile(run / name, folder / name)


def card_to_push(
    folder: Path,
    run: Path | None,
    api: HfApi,
    repo_id: str,
    revision: str | None = None,
    tags: Sequence[str] | None = None,
) -> str | None:
    """Return the card of a folder and its run.

    A card that somebody edited is kept: that of the run as it is, and that on the Hub by returning none.
    """
    text = None
    if run is not None and (run / "README.md").is_file():
        text = (run / "README.md").read_text(encoding="utf-8")
    if text is None or has_valid_checksum(text):
        if api.file_exists(repo_id, "README.md", revision=revision):
            current = Path(api.hf_hub_download(repo_id, "README.md", revision=revision))
            if not has_valid_checksum(current.read_text(encoding="utf-8")):
                return None
        text = render_model_card(folder, repo_id, tags, run)
    return text


def have_equal_weights(folder: Path, other: Path) -> bool:
    """Whether two checkpoints agree in regions, in all that was trained, and in the encoder if both hold one."""
    try:
        configs = [json.loads((path / "config.json").read_text()) for path in (folder, other)]
        first, second = read_safetensors(folder), read_safetensors(other)
    except (OSError, ValueError):
        return False
    if configs[0]["regions"] != configs[1]["regions"]:
        return False
    for names in (first.keys() - second.keys(), second.keys() - first.keys()):
        if not all(map(is_pretrained_weight, names)):
            return False
    return all(torch.equal(first[name], second[name]) for name in first.keys() & second.keys())


def main(argv: Sequence[str] | None = None, prog: str = "python -m sam2unet_hf.hub") -> None:
    """Run the command line.

    Args:
        argv: Arguments, those of the process by default.
        prog: What its usage calls it.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    metric = commands.add_parser("metric", help="write one metric as a Space, ready to upload")
    metric.add_argument("name", help="such as dice or segmentation_report")
    metric.add_argument("folder", type=Path, help="empty or new folder")
    about = "write the model card of a run or an ensemble anew, from the files in its folder"
    card = commands.add_parser("card", help=about, description=f"{about.capitalize()}.")
    card.add_argument("folder", type=Path, help="output folder of the run, or folder of the ensemble")
    card.add_argument("--repo_id", help="where on the Hub it will be")
    ensemble = commands.add_parser("ensemble", help="upload an ensemble with one card")
    ensemble.add_argument("folder", type=Path, help=f"folder with {ENSEMBLE_FILE} and the folders of the members")
    ensemble.add_argument("repo_id", help="repository, such as your_name/brain-tumors")
    ensemble.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    args = parser.parse_args(argv)
    try:
        if args.command == "card":
            message = f"Wrote {write_model_card(args.folder, args.repo_id)}.\n"
        elif args.command == "ensemble":
            message = f"Uploaded {push_ensemble(args.folder, args.repo_id, private=args.private).commit_url}\n"
        else:
            names = ", ".join(file.name for file in write_metric_space(args.name, args.folder))
            message = (
                f"Wrote {names} to {args.folder}. Upload them with\n"
                f"  hf upload YOUR_NAME/{args.name} {args.folder} --repo-type space\n"
            )
    except (OSError, ValueError) as err:
        parser.error(str(err))
    parser.exit(message=message)


__all__ = ["push_ensemble", "push_folder", "render_model_card", "write_metric_space", "write_model_card"]


if __name__ == "__main__":
    main()
