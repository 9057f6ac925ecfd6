"""Writing slices as Parquet files with a data set card, and pushing them to the Hub."""

import glob
import logging
import os
import shlex
import shutil
import string
import tempfile
from importlib import resources
from pathlib import Path

import filelock
import huggingface_hub
import numpy as np
from datasets.info import DatasetInfosDict
from huggingface_hub.errors import HTTPError  # of its HTTP library, which is not the same in all versions
from PIL import Image

from sam2unet_hf.cases_sam2unet import patient_of
from sam2unet_hf.model_card import counted

from ..phantom import is_phantom
from .brats_slices import OPTIONS, BratsSlices, citation_of
from .card_facts import describe_split, draw_card_picture, read_columns, statistics_table


logger = logging.getLogger(__name__)

# What the card says of scans that must not be passed on, and of scans that may be.
PRIVATE_TERMS = {
    "license": "license: other\nlicense_name: brats-data-use\nlicense_link: https://www.synapse.org/brats",
    "source": "of the Brain Tumor Segmentation (BraTS) challenge",
    "terms": "The scans are under the terms of the challenge: register there to use them, and do not pass them on. "
    "Keep this data set\nprivate.",
}
PUBLIC_TERMS = {
    "license": "license: unknown",
    "source": "in the layout of the Brain Tumor Segmentation (BraTS) challenge",
    "terms": "Whoever published this data set states that its scans may be passed on. They are not those of the "
    "challenge, which\nmay not.",
}
DECATHLON_TERMS = {
    "license": "license: cc-by-sa-4.0",
    "source": "of task 1 of the [Medical Segmentation Decathlon](http://medicaldecathlon.com)",
    "terms": "The Decathlon gives its scans under CC BY-SA 4.0: name their authors, and pass on what you make of them "
    "under the\nsame licence.",
}
PHANTOM_TERMS = {
    "license": "license: apache-2.0",
    "source": "made up in the layout of the Brain Tumor Segmentation (BraTS) challenge",
    "terms": "No scan is of a person: `dataset_scripts.phantom` drew them, and they may be passed on.",
}
CARD_PICTURE = "card_slices.png"
# What a push replaces, so that the repository shows nothing of an earlier one. Its history keeps all of it.
REPLACED = ["data/*", CARD_PICTURE]
PICTURE_TEXT = """## Slices

![Slices of a few patients, with the outlines of the tumour]({picture})

A row for each of a few {split} patients: {columns}, and the outlines of whole tumour (vermilion), tumour core (blue)
and enhancing tumour (yellow).

"""
LOCK = "building.lock"  # in the folder that becomes the data set
SIZE_CATEGORIES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (float("inf"), "100K<n<1M"))  # the Hub's


def write_dataset(
    builder: BratsSlices,
    output_dir: Path,
    num_proc: int = 1,
    repo_id: str | None = None,
    public: bool = False,
    show_slices: bool = False,
) -> dict[str, str]:
    """Build a data set and write it to a new or empty folder, which appears whole or not at all.

    The card names `repo_id`, where the data set will be on the Hub, and says whether the scans may be passed on. It
    shows slices of a phantom, and of patients only with `show_slices`.
    Returns why cases have no rows, by case id.
    """
    output_dir = Path(os.path.abspath(output_dir))
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        advice = "Remove it or choose another `--output_dir`."
        card_path = output_dir / "README.md"
        if repo_id and card_path.is_file() and f'load_dataset("{repo_id}")' in card_path.read_text(encoding="utf-8"):
            advice += f" Or, to upload what an earlier run wrote there: {upload_command(output_dir, repo_id, public)}"
        raise FileExistsError(f"`{output_dir}` is not empty. {advice}")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output_dir.name}-"
    _remove_leftovers(output_dir.parent, prefix)
    with (
        tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=prefix) as staging,
        filelock.FileLock(Path(staging, LOCK)),
    ):
        build, whole = Path(staging, "build"), Path(staging, "whole")
        builder.download_and_prepare(str(build), file_format="parquet", num_proc=num_proc)
        (whole / "data").mkdir(parents=True)
        for path in sorted(build.glob("*.parquet")):
            name = path.stem.removeprefix(f"{builder.dataset_name}-")
            path.rename(whole / "data" / f"{name if '-of-' in name else f'{name}-00000-of-00001'}.parquet")
        skipped = builder.skipped_cases
        picture = None
        if show_slices or has_phantom_alone(builder):
            picture = whole / CARD_PICTURE
            draw_slices(builder, whole / "data").save(picture)
        card = render_card(builder, whole / "data", skipped, repo_id or output_dir.name, public, picture)
        (whole / "README.md").write_text(card, encoding="utf-8")
        if output_dir.exists():
            output_dir.rmdir()
        whole.rename(output_dir)
    return skipped


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what killed builds of the same data set left; a build that is running holds its lock."""
    for lock in folder.glob(f"{glob.escape(prefix)}*/{LOCK}"):
        try:
            with filelock.FileLock(lock, timeout=0):
                pass
        except (filelock.Timeout, OSError):
            continue
        logger.info("Removing what a build that was killed left: %s", lock.parent)
        shutil.rmtree(lock.parent, ignore_errors=True)


def has_phantom_alone(builder: BratsSlices) -> bool:
    """Whether no scan is of a person."""
    return all(is_phantom(case.case_id) for case in builder.config.cases)


def files_of_splits(builder: BratsSlices, data_folder: Path) -> dict[str, list[Path]]:
    """Return the Parquet files of each split, in order."""
    return {split: sorted(data_folder.glob(f"{split}-*")) for split in builder.info.splits}


def first_split(builder: BratsSlices) -> str:
    """Return the split whose slices the card may show."""
    return next(iter(builder.info.splits))


def draw_slices(builder: BratsSlices, data_folder: Path) -> Image.Image:
    """Draw slices of a few patients."""
    regions_of = {case.case_id: case.regions for case in builder.config.cases}
    paths = files_of_splits(builder, data_folder)[first_split(builder)]
    return draw_card_picture(paths, builder.config.columns, regions_of)


def describe_picture(builder: BratsSlices, picture: Path) -> str:
    """Return the section of the card that shows the slices."""
    split = first_split(builder)
    split = "training" if split == "train" else split
    columns = ", ".join(f"`{name}`" for name in builder.config.columns)
    return PICTURE_TEXT.format(picture=picture.name, split=split, columns=columns)


def render_card(
    builder: BratsSlices,
    data_folder: Path,
    skipped: dict[str, str],
    load_path: str,
    public: bool,
    picture: Path | None = None,
) -> str:
    """Fill the template of the card with the options and with what the Parquet files hold."""
    config, info = builder.config, builder.info.copy()
    terms = PUBLIC_TERMS if public else PRIVATE_TERMS
    if all(case.decathlon for case in config.cases):
        terms = DECATHLON_TERMS
    elif has_phantom_alone(builder):
        terms = PHANTOM_TERMS
    citation = citation_of(case.case_id for case in config.cases)
    counts, facts = {}, {}
    # A volume is known where all slices that may show the tumour are there.
    is_whole = config.slices in ("all", "head") or (config.slices == "tumor" and config.min_tumor_pixels == 1)
    for split, paths in files_of_splits(builder, data_folder).items():
        facts[split] = describe_split(paths, config.columns, is_whole)
        table = read_columns(paths, ["case_id", "wt_pixels"])
        cases = set(table["case_id"].to_pylist())
        n_patients = len(set(map(patient_of, cases)))
        counts[split] = (n_patients, len(cases), len(table), np.count_nonzero(table["wt_pixels"]))
    n_patients, n_cases, n_slices, _ = map(sum, zip(*counts.values(), strict=True))
    options = {**{name: getattr(config, name) for name in OPTIONS}, "modalities": config.columns}
    for name, value in options.items():
        options[name] = " ".join(map(str, value)) if isinstance(value, list) else value
    if config.slices != "tumor":
        options["min_tumor_pixels"] = "not used"
    if config.labels is None:
        options["labels"] = "as the names tell"
    # Without sizes, `load_dataset` would return what an older data set in the same folder left in its cache.
    info.download_size = sum(path.stat().st_size for path in data_folder.iterdir())
    metadata = huggingface_hub.DatasetCardData()
    DatasetInfosDict(default=info).to_dataset_card_data(metadata)
    folder = resources.files(__package__)
    template = folder.joinpath("README.md").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        size_category=next(name for limit, name in SIZE_CATEGORIES if n_slices < limit),
        dataset_info=metadata.to_yaml(),
        data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*" for split in info.splits),
        sessions=counted(n_cases, "scanning session"),
        patients=counted(n_patients, "patient"),
        load_path=load_path,
        statistics=statistics_table(facts),
        slices="" if picture is None else describe_picture(builder, picture),
        split_rows="\n".join(f"| {split} | {' | '.join(map(str, row))} |" for split, row in counts.items()),
        image_columns=", ".join(f"`{name}`" for name in config.columns),
        version=builder.VERSION,
        option_rows="\n".join(f"| `{name}` | {value} |" for name, value in options.items()),
        skipped=f"Cases without rows: {', '.join(skipped)}." if skipped else "All cases found have rows.",
        masks="tumours as they were drawn" if terms is PHANTOM_TERMS else "reference masks by experts",
        citation=f"## Citation\n\n```bibtex\n{citation}```" if citation else "",
        **terms,
    )


def prepare_repository(repo_id: str, public: bool) -> huggingface_hub.RepoUrl:
    """Find or make a data set repository that may be written to, before hours are spent on building the data set.

    Unless `public`, a new one is private and an existing public one an error, for BraTS forbids to pass the scans on.
    """
    api = huggingface_hub.HfApi()
    api.whoami()  # has the clearest error for a missing or wrong token
    url = api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
    # Check that it can be written to, because `exist_ok` accepts a repository that can only be read.
    api.auth_check(url.repo_id, repo_type="dataset", write=True)
    if not public and not api.repo_info(url.repo_id, repo_type="dataset").private:
        raise ValueError(
            f"`{url.repo_id}` is public, and the terms of BraTS forbid to pass the scans on. Make the repository "
            "private or name another one. `--public` is for scans that you may pass on."
        )
    return url


def push_dataset(folder: Path, repo_id: str, public: bool) -> None:
    """Upload what `write_dataset` wrote, in place of the data that is in the repository.

    The history of the repository keeps what was replaced, so a warning names the remedy if there was a picture.
    """
    api = huggingface_hub.HfApi()
    try:
        had_picture = api.file_exists(repo_id, CARD_PICTURE, repo_type="dataset")
        api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, delete_patterns=REPLACED)
    except (RuntimeError, ValueError, OSError, HTTPError) as err:
        command = upload_command(folder, repo_id, public)
        raise OSError(f"{err}\nThe data set is complete in `{folder}`. To upload it: {command}") from err
    if had_picture:
        logger.warning(
            "The history of %s still holds the `%s` of an earlier push. If it shows patients, delete the repository, "
            'or its history: huggingface_hub.HfApi().super_squash_history("%s", repo_type="dataset")',
            repo_id,
            CARD_PICTURE,
            repo_id,
        )


def upload_command(folder: Path, repo_id: str, public: bool) -> str:
    """Return the shell command that does what `push_dataset` does."""
    words = ["hf", "upload", repo_id, os.path.abspath(folder), "--repo-type", "dataset"]
    words += [word for pattern in REPLACED for word in ("--delete", pattern)]
    return shlex.join(words if public else [*words, "--private"])
