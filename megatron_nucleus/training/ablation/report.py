"""The results of the bench as a page of tables, figures and one JSON file; negative results stand as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_nucleus.training.ablation import figures
from megatron_nucleus.training.ablation.rows import SKILLS, Rows
from megatron_nucleus.training.ablation.statistics import (
    Difference,
    Spread,
    paired_difference,
    spread,
    verdict,
)
from megatron_nucleus.training.ablation.suites import Arm, Suite
from megatron_nucleus.utils.files import write_atomic, write_json_atomic

LOSS_AT = "valid_loss at sigma "  # + noise level, a measure
HEAD = """# Ablations

Made by `{command}`; written by the tool, not by hand.

Every arm of a suite gets the same training FLOPs: matrix products of the model, forward and backward, as
`training/flops.py` counts them (the optimizer's own work and elementwise work are not in it). A derived arm (merged
checkpoints) trains nothing of its own. Figures are mean ± sample standard deviation over n seeds. A difference is
arm - baseline, paired by seed (same data order, noise and noise levels), ± its standard error. The verdict is "no
difference seen at this size" below 2 standard errors; with so few seeds 2 standard errors are a weak bar (with 3 seeds
chance alone passes it in 18 % of cases), so a difference that Student's 95 % interval does not confirm says so. Many
comparisons stand here; one in twenty passes that bar by chance.

Validation loss is the flow loss on held-out images at equidistant noise levels, lower is better. Score is the mean of
the six skills of the scenes benchmark, higher is better; all arms and seeds draw the same prompts, whose choice is not
in the error bars.
"""


def write_report(folder: Path, suites: Sequence[Suite], rows: Rows, command: str) -> dict:
    """``README.md``, ``results.json`` and figures of all suites with a finished row; returns what results.json holds.

    command: what makes it again, for the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, results = [HEAD.format(command=command)], {"command": command, "suites": {}}
    for suite in suites:
        by_arm = {name: rows.of(suite, arm) for name, arm in suite.arms.items()}
        if not any(by_arm.values()):
            continue
        result = summarise_suite(suite, by_arm)
        results["suites"][suite.name] = result
        pictures = figures.draw(suite, by_arm)
        for name, png in pictures.items():
            write_atomic(folder / name, png)
        page.append(_section(suite, by_arm, result, list(pictures)))
    write_atomic(folder / "README.md", "\n".join(page))
    write_json_atomic(folder / "results.json", results)
    return results


def summarise_suite(suite: Suite, by_arm: Mapping[str, Mapping[int, dict]]) -> dict:
    """Spreads of every arm, differences to the suite's baseline, the comparisons, and the rows themselves."""
    arms = {}
    for name, rows in by_arm.items():
        if not rows:
            continue
        values = _measures(rows)
        arms[name] = {
            "changes": suite.arms[name].changes,
            "seeds": sorted(rows),
            **{measure: _plain(spread(list(by_seed.values()))) for measure, by_seed in values.items()},
            "difference": None if name == suite.baseline else _compare(by_arm[suite.baseline], rows),
        }
    comparisons = [
        {"name": c.name, "claim": c.claim, "baseline": c.baseline, "arm": c.arm}
        | _compare(by_arm[c.baseline], by_arm[c.arm])
        for c in suite.comparisons
    ]
    return {
        "budget_flops": suite.budget_flops,
        "text_tokens": suite.text_tokens,
        "seeds": list(suite.seeds),
        "baseline": suite.baseline,
        "evaluate": suite.evaluate,
        "arms": arms,
        "comparisons": comparisons,
        "rows": [row for rows in by_arm.values() for row in rows.values()],
    }


def _measures(rows: Mapping[int, dict]) -> dict[str, dict[int, float]]:
    """Measure -> seed -> value."""
    out = {"valid_loss": {s: r["valid_loss"] for s, r in rows.items()}}
    out |= {
        f"{LOSS_AT}{sigma}": {s: r["valid_loss_by_sigma"][sigma] for s, r in rows.items()}
        for sigma in next(iter(rows.values()))["valid_loss_by_sigma"]
    }
    out |= {
        key: {
            s: r["valid_routing"][key]
            for s, r in rows.items()
            if (r["valid_routing"] or {}).get(key) is not None
        }
        for key in figures.ROUTING
    }
    for skill in ("mean", *SKILLS):
        out[skill] = {s: r["scores"][skill] for s, r in rows.items() if r["scores"][skill] is not None}
    out["train_s"] = {s: r["train_s"] for s, r in rows.items()}
    return out


def _compare(baseline: Mapping[int, dict], arm: Mapping[int, dict]) -> dict:
    """Paired differences of loss and score, with verdicts."""
    out = {}
    for name, lower in (("valid_loss", True), ("mean", False)):
        values = [_measures(rows)[name] if rows else {} for rows in (baseline, arm)]
        difference = paired_difference(*values)
        out[name] = _plain(difference) | {"verdict": verdict(difference, lower)}
    return out


def _plain(value: Spread | Difference | None) -> dict:
    return value._asdict() if value else {"n": 0}


def _section(
    suite: Suite, by_arm: Mapping[str, Mapping[int, dict]], result: dict, pictures: list[str]
) -> str:
    lines = [
        f"## {suite.name}",
        "",
        _facts(suite, result["rows"]),
        "",
        *_results_table(suite, result),
        "",
        *_claims_table(result),
        *[f"![{Path(name).stem.replace('_', ' ')}]({name})\n" for name in pictures],
        *_noise_table(result, by_arm),
        "",
        *_skills_table(result),
        "",
        *_routing_table(by_arm),
        *_cost_table(suite, by_arm),
        "",
    ]
    return "\n".join(lines)


def _facts(suite: Suite, rows: list[dict]) -> str:
    """What was run, on what, and what is missing."""
    part, wanted = suite.arms[suite.baseline].parts[-1], len(suite.arms) * len(suite.seeds)
    pictures = sorted({row["scores"]["samples"] for row in rows})
    images = suite.budget_flops // part.flops_per_image
    facts = (
        f"Budget {suite.budget_flops:.3g} training FLOPs per run ({images:,} images of the baseline at "
        f"{part.values['data']['resolution_px']} px), seeds {', '.join(map(str, suite.seeds))}, "
        f"{' or '.join(map(str, pictures))} pictures per score. {_set(rows, 'hardware')}; torch "
        f"{_set([row['versions'] for row in rows], 'torch')}; {_commits(rows)}."
    )
    if len(rows) < wanted:
        facts += f"\n\nNot finished: {wanted - len(rows)} of {wanted} rows are missing."
    return facts


def _results_table(suite: Suite, result: dict) -> list[str]:
    lines = [
        "| arm | n | validation loss | difference | verdict | score | difference | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in result["arms"].items():
        difference = arm["difference"]
        cells = [f"**{name}** (baseline)" if name == suite.baseline else name, str(len(arm["seeds"]))]
        for measure, digits in (("valid_loss", 4), ("mean", 3)):
            cells.append(_pm(arm[measure], "std", digits))
            cells += _difference_cells(difference, measure, digits) if difference else ["", ""]
        lines.append(_row(cells))
    return lines


def _claims_table(result: dict) -> list[str]:
    if not result["comparisons"]:
        return []
    lines = [
        "| claim | compared | loss | verdict | score | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for c in result["comparisons"]:
        cells = [f"{c['name']}: {c['claim']}", f"{c['arm']} against {c['baseline']}"]
        for measure, digits in (("valid_loss", 4), ("mean", 3)):
            cells += _difference_cells(c, measure, digits)
        lines.append(_row(cells))
    return [*lines, ""]


def _noise_table(result: dict, by_arm: Mapping[str, Mapping[int, dict]]) -> list[str]:
    """The loss at every noise level; bold where Student's 95 % interval confirms a difference to the baseline."""
    arms = result["arms"]
    if result["baseline"] not in arms:
        return []
    measures = [key for key in arms[result["baseline"]] if key.startswith(LOSS_AT)]
    lines = [
        "Validation loss by noise level; bold: a difference to the baseline that the 95 % interval confirms. Training",
        "sees some levels seldom; the mean over equidistant levels counts them as much as the others.",
        "",
        _row(["arm", *(key.removeprefix(LOSS_AT) for key in measures)]),
        _row(["---"] * (len(measures) + 1)),
    ]
    base = _measures(by_arm[result["baseline"]])
    for name, arm in arms.items():
        own, cells = _measures(by_arm[name]), [name]
        for key in measures:
            text, difference = _pm(arm[key], "std", 3), paired_difference(base[key], own[key])
            sure = verdict(difference, lower_is_better=True) in ("better", "worse")
            cells.append(f"**{text}**" if sure else text)
        lines.append(_row(cells))
    return lines


def _skills_table(result: dict) -> list[str]:
    lines = [_row(["arm", *(s.replace("_", " ") for s in SKILLS)]), _row(["---"] * (len(SKILLS) + 1))]
    for name, arm in result["arms"].items():
        lines.append(_row([name, *(_pm(arm[skill], "std", 2) for skill in SKILLS)]))
    return lines


def _routing_table(by_arm: Mapping[str, Mapping[int, dict]]) -> list[str]:
    """Routing stability of the arms with experts; the chance that two noise levels agree stands beside it."""
    columns = figures.ROUTING | {"mean/agreement_chance": "same tokens by chance"}
    lines = []
    for name, rows in by_arm.items():
        found = [spread(figures.routing_values(rows, key)) for key in columns]
        if any(found):
            lines.append(_row([name, *(_pm(_plain(value), "std", 3) for value in found)]))
    return (
        [
            _row(["arm", *(words.replace("\n", " ") for words in columns.values())]),
            _row(["---"] * (len(columns) + 1)),
            *lines,
            "",
        ]
        if lines
        else []
    )


def _cost_table(suite: Suite, by_arm: Mapping[str, Mapping[int, dict]]) -> list[str]:
    """What every trained arm was given, and what it took."""
    lines = [
        "| arm | parameters | active | steps | images | FLOPs planned/budget | counted/planned | training s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in by_arm.items():
        arm = suite.arms[name]
        if arm.source or not rows:
            continue
        first = next(iter(rows.values()))
        counted = spread([r["counted_flops"] / r["planned_flops"] for r in rows.values()])
        seconds = spread([r["train_s"] for r in rows.values()])
        lines.append(
            _row([
                name, f"{arm.parameters / 1e6:.2f} M", f"{arm.active_parameters / 1e6:.2f} M",
                " + ".join(str(p.steps) for p in arm.parts), f"{first['samples']:,}",
                f"{first['planned_flops'] / suite.budget_flops:.4f}", f"{counted.mean:.3f}",
                _pm(_plain(seconds), "std", 0),
            ])
        )  # fmt: skip
    return lines


def _difference_cells(compared: dict, measure: str, digits: int) -> list[str]:
    difference = compared[measure]
    if not difference["n"]:
        return ["", "not measured yet"]
    return [_pm(difference, "standard_error", digits, sign="+"), difference["verdict"]]


def _pm(value: dict, error: str, digits: int, sign: str = "") -> str:
    """``mean ± error``; the mean alone where there is no error bar."""
    if not value["n"]:
        return "-"
    mean = f"{value['mean']:{sign}.{digits}f}"
    return mean if value[error] is None else f"{mean} ± {value[error]:.{digits}f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _set(rows: Sequence[Mapping], key: str) -> str:
    """The values that occur, each with its count where there are several."""
    return _kinds([str(row[key]) for row in rows])


def _kinds(values: Sequence[str]) -> str:
    kinds = sorted(set(values))
    return kinds[0] if len(kinds) == 1 else "; ".join(f"{kind} ({values.count(kind)} rows)" for kind in kinds)


def _commits(rows: Sequence[Mapping]) -> str:
    """Which commits trained the weights and which scored them; rows from before these were told apart say so."""
    trained, scored = [], []
    for row in rows:
        old = "trained_commits" not in row
        trained.append("not recorded" if old else ", then ".join(map(str, row["trained_commits"])))
        scored.append(str(row["commit"] if old else row["scored_commit"]))
    if set(trained) == set(scored) and len(set(trained)) == 1:
        return f"commit {trained[0]}"
    return (
        f"trained at commit {_kinds(trained)}; scored (derived arms: merged, too) at commit {_kinds(scored)}"
    )


def plan_table(suite: Suite) -> str:
    """What every arm of a suite will be given, as text, before anything runs."""
    lines = [
        f"suite {suite.name}: {suite.budget_flops:.4g} training FLOPs per run, seeds {' '.join(map(str, suite.seeds))}",
        f"  {'arm':<22}{'active':>10}{'FLOPs/image':>14}{'steps':>16}{'images':>12}{'of budget':>11}",
    ]
    for arm in suite.arms.values():
        lines.append("  " + (_derived_line(arm) if arm.source else _trained_line(suite, arm)))
    return "\n".join(lines)


def _derived_line(arm: Arm) -> str:
    return f"{arm.name:<22}last {arm.merge.last} checkpoints of {arm.source}, {arm.merge.weights}"


def _trained_line(suite: Suite, arm: Arm) -> str:
    flops = sum(p.flops for p in arm.parts)
    images = sum(p.samples for p in arm.parts)
    steps = " + ".join(str(p.steps) for p in arm.parts)
    return (
        f"{arm.name:<22}{arm.active_parameters / 1e6:>8.3f} M{flops / images:>14.4g}{steps:>16}{images:>12,}"
        f"{flops / suite.budget_flops:>11.4f}"
    )
