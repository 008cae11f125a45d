"""What `dblend toy` and `dblend demo` print."""

from collections.abc import Mapping
from typing import Any


def toy_table(results: Mapping[str, Any]) -> str:
    """The distances at one preference, what was left out and why, and where the files lie."""
    first, second = results["rewards"]
    clouds = results["clouds"]
    lines = [
        f"{results['toy']}: sliced W2 to the target, reward {clouds['w']:g} {first} + {1 - clouds['w']:g} {second}"
    ]
    lines += [f"{method:>20}  {error:.3f}" for method, error in clouds["errors"].items()]
    lines += [f"{method:>20}  refused: {why}" for method, why in clouds["refused"].items()]
    lines += [f"no {what}: {why}" for what, why in results["skipped"].items()]
    return "\n".join([*lines, "", *(f"written: {file}" for file in [*results["figures"].values(), results["json"]])])


def demo_tables(results: Mapping[str, Any]) -> str:
    """The demo's two tables, and where its files lie."""
    toy, images = results["toy"], results["images"]
    columns = list(toy["rows"][0])
    lines = [
        f"Toy: {toy['toy']}, reward w {toy['rewards'][0]} + (1 - w) {toy['rewards'][1]}; sliced W2 to the exact target"
    ]
    lines += ["".join(f"{column:>12}" for column in columns)]
    lines += ["".join(f"{row[column]:12.3f}" for column in columns) for row in toy["rows"]]
    names = [name for name in images["rows"][0] if name != "model"]
    lines += [
        "",
        f"Images: {images['prompts']} held-out prompts, w colorfulness + (1 - w) jpeg; means +- standard errors",
    ]
    lines += [f"{'':>12}" + "".join(f"{name:>20}" for name in names)]
    for row in images["rows"]:
        cells = (f"{row[name][0]:.3f} +- {row[name][1]:.3f}" for name in names)
        lines.append(f"{row['model']:>12}" + "".join(f"{cell:>20}" for cell in cells))
    files = [toy["figure"], *images["figures"], results["json"]]
    return "\n".join([*lines, "", *(f"written: {file}" for file in files)])
