"""Seeded volumes with lesions, and what the official code of BraTS 2026 makes of them.

Run as a script, it writes `fixtures/brats_2026.csv`, in an environment of its own:

    python -m venv official && official/bin/pip install brats-evaluation==0.0.10 panoptica==2.1.7
    official/bin/python tests/lesion_volumes.py tests/fixtures/brats_2026.csv
"""

import csv
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np


NUM_VOLUMES = 200
REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
# Three of four volumes have voxels of 1 mm, as those of BraTS have.
SPACINGS_MM = ((0.5, 0.75, 2.0), (0.7, 1.3, 2.5), (0.9375, 0.9375, 5.5), (1.2, 1.0, 0.8))
SMALLEST_MM3 = 27  # of a lesion that counts for metastases in BraTS 2026


def make_volumes(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Draw label ids of a prediction and its reference, of shape `(x, y, z)`, and the size of their voxels in mm.

    `RandomState`, whose numbers never change, and whole numbers give the same volumes with any version of NumPy.
    """
    random = np.random.RandomState(seed)
    shape = tuple(int(size) for size in random.randint(18, 49, 3))
    spacing_mm = SPACINGS_MM[seed // 4 % 4] if seed % 4 == 3 else (1.0, 1.0, 1.0)
    grid = np.ogrid[: shape[0], : shape[1], : shape[2]]

    def draw(volume: np.ndarray, centre: np.ndarray, radii: np.ndarray, core: int) -> None:
        # Oedema, in it the core, and in that the other label of the core; 144 is the square of 12.
        for label, twelfths in ((2, 12), (core, 9), (4 - core, 5)):
            reach = sum(
                (axis - at) ** 2 * 144 * 1000 // max(radius * twelfths, 4) ** 2
                for axis, at, radius in zip(grid, centre, radii, strict=True)
            )
            volume[reach <= 1000] = label

    def place() -> tuple[np.ndarray, np.ndarray, int]:
        largest = (9, 7, 5, 2)[random.randint(4)]
        return random.randint(0, shape), random.randint(0, largest + 1, 3), (1, 3)[random.randint(2)]

    lesions = [place() for _ in range(seed % 9)]
    prediction, reference = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for centre, radii, core in lesions:
        draw(reference, centre, radii, core)
        fate = random.randint(6)
        if fate == 0:  # missed
            continue
        shift, growth = random.randint(-1, 2, 3) * (0, 1, 1, 2)[random.randint(4)], random.randint(-1, 2)
        draw(prediction, centre + shift, np.maximum(radii + growth, 0), core if fate > 1 else 4 - core)
        if fate == 2:  # torn in two
            axis = random.randint(3)
            gap = min(int(centre[axis]), shape[axis] - 1)
            prediction[tuple(slice(gap, gap + 1) if other == axis else slice(None) for other in range(3))] = 0
    for _ in range(random.randint(4)):  # spurious
        draw(prediction, *place())
    for volume, kind in ((prediction, seed % 5), (reference, seed % 7)):
        if kind == 1:  # rough, so that voxels touch at edges and corners
            volume[random.randint(0, 5, shape) == 0] = 0
        if kind == 2:  # specks
            specks = random.randint(0, 3000, shape) == 0
            volume[specks] = random.randint(1, 4, shape)[specks]
    if seed % 23 == 7:
        prediction[:] = 0
    if seed % 29 == 11:
        prediction[:] = reference
    return prediction, reference, spacing_mm


def checksum(*volumes: np.ndarray) -> int:
    """Return a number that changes with any voxel of the volumes."""
    return zlib.crc32(b"".join(volume.tobytes() for volume in volumes))


def run_official(folder: Path) -> dict[str, dict[tuple[int, str], dict[str, str]]]:
    """Run the commands of `brats-evaluation` on all volumes; return table -> seed and region -> column -> value."""
    import nibabel as nib

    for seed in range(NUM_VOLUMES):
        *volumes, spacing_mm = make_volumes(seed)
        for name, volume in zip(("predictions", "references"), volumes, strict=True):
            (folder / name).mkdir(exist_ok=True)
            image = nib.Nifti1Image(volume, np.diag([*spacing_mm, 1.0]))
            nib.save(image, folder / name / f"BraTS-GLI-{seed:05d}-000.nii.gz")
    commands = Path(sys.executable).parent
    paths = ["--pred_path", folder / "predictions", "--ref_path", folder / "references"]
    summary = folder / "summary.json"
    subprocess.run([commands / "brats-evaluate", "--config", "gli", *paths, "--summary_json", summary], check=True)
    tables: dict[str, dict[tuple[int, str], dict[str, str]]] = {}
    for table, options in (
        ("seg", ["seg"]),
        ("mets", ["mets", "--vol_threshold", str(SMALLEST_MM3), "--overlap_threshold", "0.2"]),
        ("every", ["mets", "--vol_threshold", "0", "--overlap_threshold", "0.2"]),
    ):
        path = folder / f"{table}.csv"
        command = [commands / "brats-parse-metrics", *options, "--json_path", summary, "--output_csv_path", path]
        subprocess.run(command, check=True)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))[:NUM_VOLUMES]
        tables[table] = {
            (int(row["subject_id"][10:15]), region): {
                column.removesuffix(ending): value for column, value in row.items() if column.endswith(ending)
            }
            for row in rows
            for region in REGIONS
            for ending in [f"_{region.lower()}"]
        }
    return tables


def run_panoptica(seed: int) -> dict[str, dict[str, float]]:
    """Run panoptica itself, which takes tolerances and the spacing of whole regions too: region -> column -> value."""
    from panoptica import ConnectedComponentsInstanceApproximator, InputType, MaxBipartiteMatching, Panoptica_Evaluator
    from panoptica.metrics import Metric
    from panoptica.utils.edge_case_handling import EdgeCaseHandler, EdgeCaseResult, MetricZeroTPEdgeCaseHandling

    measures = {
        "hd95": lambda *masks: Metric.HD95(*masks, voxelspacing=spacing_mm),
        "nsd_0.5": lambda *masks: Metric.NSD(*masks, voxelspacing=spacing_mm, threshold=0.5),
        "nsd_1": lambda *masks: Metric.NSD(*masks, voxelspacing=spacing_mm, threshold=1.0),
    }
    prediction, reference, spacing_mm = make_volumes(seed)
    evaluator = Panoptica_Evaluator(
        expected_input=InputType.SEMANTIC,
        instance_approximator=ConnectedComponentsInstanceApproximator(),
        instance_matcher=MaxBipartiteMatching(Metric.DSC, 1e-6),
        instance_metrics=[Metric.DSC],
        global_metrics=[],
        edge_case_handler=EdgeCaseHandler({Metric.DSC: MetricZeroTPEdgeCaseHandling(EdgeCaseResult.NAN)}),
        log_intermediate_steps=True,
    )
    found = {}
    for region, label_ids in REGIONS.items():
        masks = [np.isin(volume, label_ids).astype(np.uint8) for volume in (reference, prediction)]
        if not (masks[0] & masks[1]).any():
            continue
        whole = {f"panoptica_{name}": measure(*masks) for name, measure in measures.items()}
        result = evaluator.evaluate(masks[1], masks[0], voxelspacing=spacing_mm)["ungrouped"]
        lesions = result.intermediate_steps_data["MATCHED_INSTANCE"]
        pairs = [(lesions.reference_arr == at, lesions.prediction_arr == at) for at in lesions.matched_instances]
        means = {
            f"panoptica_lesion_{name}": np.mean([measure(*pair) for pair in pairs])
            for name, measure in measures.items()
        }
        found[region] = {**whole, "panoptica_lesion_dsc": result.sq_dsc, **means}
    return found


def main(path: str) -> None:
    """Write the numbers of the official code for all volumes and regions; what is not defined is left empty."""
    with tempfile.TemporaryDirectory() as folder:
        tables = run_official(Path(folder))
    columns = {f"all_instance_{name}": name for name in ("tp", "fp", "fn", "f1")}
    columns |= {f"global_{name}": name for name in ("dsc", "hd95", "nsd")}
    means = {f"lesionwise_{name}_mean": name for name in ("dsc", "hd95", "nsd")}
    rows = []
    for seed in range(NUM_VOLUMES):
        directly, known = run_panoptica(seed), checksum(*make_volumes(seed)[:2])
        for region in REGIONS:
            seg, mets, every = (tables[name][seed, region] for name in ("seg", "mets", "every"))
            row: dict[str, object] = {"seed": seed, "region": region, "checksum": known}
            row |= {own: float(seg[official] or "nan") for official, own in columns.items()}
            for prefix, table in (("matched", seg), ("large", mets), ("every", every)):
                row |= {f"{prefix}_{own}": float(table[official] or "nan") for official, own in means.items()}
            row |= directly.get(region, {})
            rows.append(row)
    header = max(rows, key=len)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {name: f"{value:.10g}" for name, value in row.items() if isinstance(value, float)}
            writer.writerow(row | numbers | {name: "" for name, text in numbers.items() if text == "nan"})


if __name__ == "__main__":
    main(*sys.argv[1:])
