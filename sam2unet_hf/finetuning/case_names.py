"""Cases and patients of the rows of a data set, and names of rows that can be names of files."""

import re
from collections import Counter

import datasets

from sam2unet_hf.cases_sam2unet import patient_of


# Columns that tell patients apart, beside `case_id`.
PATIENT_COLUMNS = ("patient_id", "patient", "subject_id", "subject")
# The rule for folders of images: the folder below them is the patient, or else the image itself.
BY_FOLDER = r"[^/]+"
NO_GROUPS = "none"


def to_file_name(text: str, separator: str = "_") -> str:
    """Replace each run of characters other than letters, digits, `_`, `.` and `-` by a separator."""
    return re.sub(r"[^\w.-]+", separator, text)


def case_ids(split: str, rows: datasets.Dataset) -> list[str]:
    """Return the case of each row, which must have one, or an empty list if there is no column `case_id`."""
    cases = list(rows["case_id"]) if "case_id" in rows.column_names else []
    if None in cases:
        raise SystemExit(
            f"Row {cases.index(None)} of the split {split} has no `case_id`, so its patient could be in another split "
            "too. Fill in the column, or remove it."
        )
    return list(map(str, cases))


def patients_of_rows(split: str, rows: datasets.Dataset, group_by: str | None = None) -> list[str]:
    """Return the patient of each row, whose rows must stay in one split.

    Args:
        split: Name of the split, for errors.
        rows: The rows, whose images are not read.
        group_by: The rule: a column; or a regular expression, searched in the `case_id` of a row, else in the path of
            its image, of which the first group, or all that matches, is the patient; or `"none"`. By default it is a
            column of `PATIENT_COLUMNS`, else `case_id` without the timepoint.

    Returns:
        A name per row; an empty list if nothing tells patients apart.
    """
    if group_by == NO_GROUPS:
        return []
    column = group_by or next((name for name in PATIENT_COLUMNS if name in rows.column_names), None)
    if column is None:
        return list(map(patient_of, case_ids(split, rows)))
    if column in rows.column_names:
        patients = list(rows[column])
        if None in patients:
            raise SystemExit(
                f"Row {patients.index(None)} of the split {split} has no `{column}`, so its patient could be in "
                "another split too. Fill in the column, or pass another --group_by."
            )
        return list(map(str, patients))
    try:
        matches = [re.search(column, path) for path in paths_of_rows(split, rows)]
    except re.error as err:
        raise SystemExit(
            f"--group_by {group_by} is no column of {', '.join(rows.column_names)}, and no regular expression ({err})."
        ) from err
    if None in matches:
        path = paths_of_rows(split, rows)[matches.index(None)]
        raise SystemExit(
            f"--group_by {group_by} is no column of {', '.join(rows.column_names)}, and as a regular expression it "
            f"matches nothing in {path} of the split {split}. Name a column, or write an expression whose first group "
            "is the patient in each path."
        )
    patients = [match[1] if match.re.groups and match[1] is not None else match[0] for match in matches]
    return list(map(patient_of, patients)) if group_by == BY_FOLDER else patients


def paths_of_rows(split: str, rows: datasets.Dataset) -> list[str]:
    """Return what tells the patient of each row: its case, else the path of its image."""
    if cases := case_ids(split, rows):
        return cases
    column = next((name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)), None)
    if column is None or not isinstance(rows, datasets.Dataset):
        return [""] * len(rows)
    return [
        file["path"] or "" if file else "" for file in rows.cast_column(column, datasets.Image(decode=False))[column]
    ]


def case_names(rows: datasets.Dataset) -> list[str]:
    """Name each row after its case and slice, or else its number; names are unique and can be names of files."""
    cases = rows["case_id"] if "case_id" in rows.column_names else [f"{index:05d}" for index in range(len(rows))]
    if "slice_index" in rows.column_names:
        cases = [f"{case}_{index or 0:03d}" for case, index in zip(cases, rows["slice_index"], strict=True)]
    names = [to_file_name(str(case)).lstrip(".")[:100] for case in cases]
    counts = Counter(names)
    unique = [name if counts[name] == 1 and name else f"{name}_row{i:05d}" for i, name in enumerate(names)]
    if len(set(unique)) < len(unique):  # a case has the name that another row just got
        unique = [f"{name}_row{i:05d}" for i, name in enumerate(names)]
    return unique
