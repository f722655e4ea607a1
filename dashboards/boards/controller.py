"""Whether controller and agents do their work, and what they decide."""

from dashboards.board import Board
from dashboards.panel import Panel, Query

CONTROLLER = Board(
    "ellm-controller",
    "ellm: controller",
    "Whether the controller and the memory agents do their work, and what they decide.",
    (
        Panel(
            "Reports",
            "ops",
            (Query("sum by (outcome) (rate(ellm_controller_reports_total[$__rate_interval]))", "{{outcome}}"),),
            "Of the agents, a second; stale and invalid ones are not used.",
        ),
        Panel(
            "Age of reports",
            "s",
            (Query("max by (node, device) (ellm_device_report_age_seconds)", "{{device}}"),),
            "Above 3 s a device counts as absent.",
        ),
        Panel(
            "Decisions",
            "ops",
            (Query("sum by (kind) (rate(ellm_controller_decisions_total[$__rate_interval]))", "{{kind}}"),),
            "A second; `ellm explain` tells each with its reason.",
        ),
        Panel(
            "Tokens of a step, at most",
            "short",
            (Query("max by (replica) (ellm_target_step_tokens)", "{{replica}}"),),
            "Targets of the replicas; 0 for no bound.",
        ),
        Panel(
            "Requests at once, at most",
            "short",
            (Query("max by (replica) (ellm_target_requests)", "{{replica}}"),),
            "Likewise.",
        ),
        Panel(
            "Changes of targets and leases",
            "short",
            (
                Query("sum(changes(ellm_target_revision[$__rate_interval]))", "targets"),
                Query("sum(changes(ellm_lease_revision[$__rate_interval]))", "leases"),
            ),
            "Revisions that replicas have seen.",
        ),
        Panel(
            "Lives",
            "s",
            (
                Query("time() - max(ellm_controller_start_timestamp_seconds)", "controller"),
                Query("time() - max by (device) (ellm_agent_start_timestamp_seconds)", "agent of {{device}}"),
            ),
            "Since the last start.",
        ),
        Panel(
            "Scrape of /metrics",
            "s",
            (Query('max(scrape_duration_seconds{job="ellm"})', "duration"),),
            "As Prometheus sees it.",
        ),
    ),
)
