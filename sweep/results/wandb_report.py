"""A recipe (plain data) -> a W&B Report: built, and saved under the same id every time.

The only module that knows wandb-workspaces, which is a public preview: what it changes is mended here. Building needs
neither a login nor a network. It runs in the process of mirror.py, and nothing of it is imported before it is needed.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

SPEED = {
    "Generated tokens per second": ["server/generated_tokens_per_s"],
    "Prompt tokens per second": ["server/prompt_tokens_per_s"],
    "Requests per second": ["progress/requests_per_s"],
    "In flight: allowed, running, waiting": ["server/concurrency", "server/running", "server/waiting"],
    "KV cache in use": ["server/kv_cache_use"],
    "Prompt tokens found in the prefix cache": ["server/prefix_cache_hit_rate"],
    "Preemptions": ["server/preemptions"],
    "GPU use": ["server/gpu_use"],
}
"""Title of a panel -> keys of the history."""

COSTS = {"Seconds of all cells": "cost/wall_s", "Generated tokens": "cost/generated_tokens"}
"""Title of a panel -> key of the summary."""

_WIDTH = 24
"""Of W&B's grid, in columns."""


def build(recipe: Mapping[str, Any], *, entity: str) -> Any:
    """The Report as an object that is not saved."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    def models(columns: Sequence[str] = ()) -> Any:
        shown = {"visible_columns": [f"summary:{key}" for key in columns], "lock_columns": True} if columns else {}
        return runs("models", recipe["models"], **shown)

    def runs(name: str, ids: Sequence[str], **shown: Any) -> Any:
        # Without entity and project, which would be asked of the server at once, the Report's own are meant.
        # By id, since other sweeps of this name share the group.
        return wr.Runset(name=name, filters=expr.And(expr.Metric("ID").isin(list(ids))), **shown)

    def grid(runset: Any, panels: Sequence[Any], *, across: int, height: int = 8) -> Any:
        width = _WIDTH // across
        for number, panel in enumerate(panels):
            panel.layout = wr.Layout(x=number % across * width, y=number // across * height, w=width, h=height)
        return wr.PanelGrid(runsets=[runset], panels=list(panels))

    bars = recipe["bars"]
    blocks: list[Any] = [wr.MarkdownBlock(text=recipe["intro"]), wr.TableOfContents()]
    blocks += [wr.H1(text="Leaderboard"), wr.MarkdownBlock(text=recipe["leaderboard"])]
    table = wr.WeavePanelSummaryTable(table_name="leaderboard")
    blocks.append(grid(runs("overview", [recipe["overview"]]), [table], across=1, height=12))
    if bars:
        # A bar of W&B is one key of the summary; it has no place for a standard error, which the tables above give.
        plots = [wr.BarPlot(title=bar["title"], metrics=[wr.SummaryMetric(bar["key"])]) for bar in bars]
        blocks += [wr.H1(text="Tasks"), wr.MarkdownBlock(text=recipe["bars_note"])]
        blocks.append(grid(models([bar["key"] for bar in bars]), plots, across=2))
    lines = [wr.LinePlot(title=title, x="progress/elapsed_s", y=list(keys)) for title, keys in SPEED.items()]
    costs = [wr.BarPlot(title=title, metrics=[wr.SummaryMetric(key)]) for title, key in COSTS.items()]
    blocks += [wr.H1(text="Speed and cost"), grid(models(), [*lines, *costs], across=2)]
    blocks += [wr.H1(text="Runs side by side")]
    blocks.append(grid(models(), [wr.RunComparer(diff_only="split")], across=1, height=16))
    for title, text in recipe["texts"].items():
        blocks += [wr.H1(text=title), wr.MarkdownBlock(text=text)]
    blocks += [wr.H1(text="Settings"), wr.CodeBlock(code=json.dumps(recipe["settings"], indent=1), language="json")]
    return wr.Report(
        entity=entity,
        project=recipe["project"],
        title=recipe["title"][:128],  # W&B refuses longer ones; it is part of the address as it stands
        description=recipe["description"],
        blocks=blocks,
        width="fluid",
    )


def save(recipe: Mapping[str, Any], *, entity: str, id: str, share_link: bool) -> dict[str, str]:
    """Make the Report, or give the one with this id its present content: its `id`, its `url`, `share_url` if asked.

    What people changed in it there is overwritten.
    """
    report = build(recipe, entity=entity)
    report.id = id
    report.save()
    made = {"id": report.id, "url": report.url}
    if share_link:
        made["share_url"] = report.enable_share_link()
    return made


def end_share_link(id: str, *, entity: str, project: str) -> None:
    """Nobody reads the Report without an account from now on. Raises RuntimeError where W&B keeps the link."""
    import wandb_workspaces.reports.v2 as wr

    report = wr.Report(entity=entity, project=project)
    report.id = id
    # It says no also where there was no link.
    if not report.disable_share_link() and report.get_share_url():
        raise RuntimeError("it can still be read by anyone who has the link")
