"""Cases of the rows of a data set, and names of rows that can be names of files."""

import re
from collections import Counter

import datasets


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
