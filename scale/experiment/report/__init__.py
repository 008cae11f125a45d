"""What a sweep has shown: tables with intervals, figures, checks, and the paper's numbers beside ours."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from dbtheory.files import write_atomically
from scale.experiment.report import figures, paper, write
from scale.experiment.report.checks import check_table
from scale.experiment.report.claims import claim_table
from scale.experiment.report.frame import Frame, Results, load_results
from scale.experiment.report.front import front_table
from scale.experiment.report.lambdas import lambda_table
from scale.experiment.report.means import gain_table, mean_table, share_table
from scale.experiment.report.sheet import sheet
from scale.experiment.report.wins import win_table

FIGURES: Mapping[str, Callable[[Results], Figure | str]] = {
    "pareto": figures.pareto, "weighted": figures.weighted, "lambda": figures.over_lambda,
    "rewards-count": figures.rewards_count, "certificate": figures.certificate, "sheet": sheet,
}  # fmt: skip

INTERVALS = (
    "Brackets hold 95 % intervals: a percentile bootstrap over prompts, each with all its seeds (seeds of one prompt "
    "are not independent); over images where there is one prompt alone, and then they speak of that prompt only. "
    "The base model, which follows no preference, is weighed by that of each row."
)
TABLES: Mapping[str, tuple[str, Callable[[Results], Frame | str], str]] = {
    "claims": (
        "The paper's claims", claim_table,
        "What did not reproduce stands first. Verdicts come from one interval each, not corrected for their number; "
        "the paper gives no thresholds for \"close\", so the goals are ours.",
    ),
    "means": ("Means", mean_table,
        "Costs are per image; peak memory is in bytes, the largest batch's. The images of one batch are scored while "
        "the next is made, which seconds and memory then share.",
    ),
    "gains": ("Gains over the base model", gain_table, "Image by image, paired by prompt and seed."),
    "shares": (
        "Shares of MORL's gain", share_table,
        "Weighted reward, at the same preference and lambda. A row is left out where MORL's gain is not above 0.",
    ),
    "lambdas": ("DB-KLA minus the expert of each lambda", lambda_table, "Weighted reward, image by image."),
    "wins": (
        "Win rates", win_table,
        "Weighted reward, by prompt and seed; a tie counts half, and prompts weigh alike.",
    ),
    "hypervolume": (
        "Hypervolume", front_table,
        "Of the mean gains over base. The reference point is the worst mean of any cell in each reward. Only the "
        "column of shared preferences and images compares methods.",
    ),
    "certificate": (
        "The certificate against the loss to MORL", figures.certificate_points,
        "`agreement` is the correlation, over prompts, of a blend's mean certificate with what MORL gains over it.",
    ),
    "checks": (
        "GenEval-style checks", check_table,
        "Share of images that pass, by a detector that learns nothing and shares nothing with the alignment reward. "
        "Wilson's 95 % intervals take images as independent.",
    ),
}  # fmt: skip
PAPER = ("paper-ratios", "paper-times", "paper")  # tables of `_paper`


def write_report(folders: Sequence[Path], out: Path, *, beside_paper: bool = False) -> dict[str, Any]:
    """Read the runs, write `report.md`, `report.json`, a CSV a table and a PNG a figure into `out`; what JSON holds.

    Tables and figures of an earlier report in `out` that this one does not have are removed.

    Raises:
        ValueError: folders that hold no runs, or runs that do not go together; `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"the output folder {out} is a file; choose another folder")
    results = load_results(folders)
    wanted = _figures(results)
    sections: dict[str, tuple[str, str]] = {}
    found: dict[str, Any] = {"runs": [str(folder) for folder in folders], "missing": results.missing, "tables": {}}
    left_out: dict[str, str] = {}
    tables = dict(TABLES) | (_paper(results) if beside_paper else {})
    for name, (heading, make, text) in tables.items():
        table = make(results)
        if isinstance(table, str):
            left_out[name] = table
        elif not table.empty:
            write.write_table(out / f"{name}.csv", table)
            found["tables"][name] = write.records(table)
            sections[heading] = (text, write.markdown(table))
    found["figures"] = []
    with rc_context({"text.parse_math": False}):  # a prompt of two prices is no formula
        for name in wanted:
            figure = FIGURES[name](results)
            if isinstance(figure, str):
                left_out[name] = figure
                continue
            write.write_figure(out / f"{name}.png", figure)
            found["figures"].append(f"{name}.png")
            sections[f"Figure: {name}"] = ("", f"![{name}]({name}.png)")
    found["left_out"] = left_out
    _remove_stale(out, {f"{name}.csv" for name in found["tables"]} | set(found["figures"]))
    title = " and ".join(dict.fromkeys(str(run.get("title") or "A sweep") for run in results.runs))
    text = write.page(title, _lead(results, left_out), sections)
    write_atomically(out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    lines = json.dumps(found, indent=1, allow_nan=False) + "\n"
    write_atomically(out / "report.json", lambda path: path.write_text(lines, encoding="utf-8"))
    return found | {"out": str(out)}


def _figures(results: Results) -> list[str]:
    """Those that the runs' configs name; all, where they name none."""
    named = [name for run in results.runs for name in run.get("figures") or ()]
    if unknown := [name for name in named if name not in FIGURES]:
        raise ValueError(f"no figure {', '.join(map(str, unknown))}; they are {', '.join(FIGURES)}")
    return list(dict.fromkeys(named)) or list(FIGURES)


def _remove_stale(out: Path, written: Collection[str]) -> None:
    """What an earlier report wrote under our names, and this one has not."""
    ours = [f"{name}.csv" for name in (*TABLES, *PAPER)] + [f"{name}.png" for name in FIGURES]
    for name in ours:
        if name not in written:
            (out / name).unlink(missing_ok=True)


def _lead(results: Results, left_out: Mapping[str, str]) -> list[str]:
    """What the report is of, and what it lacks."""
    frame = results.frame
    images = frame["path"].nunique()
    lines = [
        f"{images} images of {frame['prompt'].nunique()} prompts, rewards {', '.join(results.rewards)}. {INTERVALS}"
    ]
    if results.missing:
        lines.append(
            f"**Unfinished: {results.missing} images have yet to be made; everything below is of the others.**"
        )
    if (shared := frame.groupby("seed")["prompt"].nunique().max()) > 1:
        lines.append(
            f"**{shared} prompts share their seeds, so their noise: intervals over prompts do not hold how much other "
            "noise would change. A config whose `seeds` is a count gives every prompt its own.**"
        )
    skipped = {(cell["label"], cell["reason"]) for run in results.runs for cell in run.get("skipped") or ()}
    lines += [f"{label} is not everywhere: {reason}." for label, reason in sorted(skipped)]
    if left_out:
        lines.append("Left out: " + "; ".join(f"{name} ({why})" for name, why in left_out.items()) + ".")
    return lines


def _paper(results: Results) -> dict[str, tuple[str, Callable[[Results], Frame | str], str]]:
    tables = paper.chosen(results)
    lacking = "; ".join(paper.missing_numbers(tables)) or "none"
    ratios = (
        "How many times DB-MPA's weighted gain at w = 0.5 is another method's. The ratios that the paper prints are "
        "not those of its own Table 1; CoDe and RGG look exchanged. The text's gains of DB-MPA and DB-MPA-LS are "
        "0.42 and 0.39; Table 1 gives 0.42 and 0.405."
    )
    times = (
        "The paper's are seconds on its GPU; only the multiples compare. Ours leave out scoring for the record, but "
        "not what CoDe and RGG, which ask the same scorers, wait for it."
    )
    of_table_1 = {
        "paper-ratios": ("The paper's claim at w = 0.5", paper.ratio_table, ratios),
        "paper-times": ("Seconds an image, beside Table 1", paper.time_table, times),
    }
    return (of_table_1 if any(table["table"] == 1 for table in tables) else {}) | {
        "paper": (
            "Beside the paper's tables", paper.comparison,
            f"{paper.label_of_models(results)} Gains are of the weighted reward over the base model. "
            f"Numbers that our text of the paper lacks: {lacking}. {paper.notes(tables)}",
        ),
    }  # fmt: skip
