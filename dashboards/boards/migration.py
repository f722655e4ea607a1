"""Running requests that go on at another replica: why, how it went, and what their clients noticed."""

from dashboards.board import Board
from dashboards.panel import Draw, Panel, Query
from dashboards.promql import MODEL, OF_MODEL, RATE, rate

MIGRATION = Board(
    "ellm-migration",
    "ellm: migration",
    "Running requests that go on at another replica: why, how it went, and what their clients noticed.",
    (
        Panel(
            "Migrations by outcome",
            "short",
            (Query(f"sum by (outcome) (increase(ellm_migrations_total{OF_MODEL}{RATE}))", "{{outcome}}"),),
            "Moved with their KV memory; failed, and went on where they were; computed again elsewhere.",
            Draw.STACKED,
        ),
        Panel(
            "Migrations by trigger",
            "short",
            (Query(f"sum by (trigger) (increase(ellm_migrations_total{OF_MODEL}{RATE}))", "{{trigger}}"),),
            "Asked for, a drain, or a replica that Ray Serve ends.",
            Draw.STACKED,
        ),
        Panel(
            "Downtime",
            "s",
            (
                Query(
                    f"{rate('ellm_migration_downtime_seconds_total', OF_MODEL, 'model_name')} / "
                    f"{rate('ellm_migration_downtimes_total', OF_MODEL, 'model_name')}",
                    "{{model_name}}",
                ),
            ),
            "From the last token at the source to the first one of the destination, mean: a step is a part of it.",
        ),
        Panel(
            "Replicas that drain",
            "short",
            (Query(f"max by (model_name) (ellm_replicas_draining{OF_MODEL})", "{{model_name}}"),),
            "They get no request while there are others, and are emptied.",
        ),
    ),
    (MODEL,),
)
