"""What is needed beside a cluster, as files: dashboards, rules, and how Grafana and Prometheus find them.

dashboards/*.json                       a dashboard each
rules/ellm.yaml                         recording and alerting rules of Prometheus
provisioning/dashboards/ellm.yaml       of Grafana: where the dashboards are
provisioning/datasources/ellm.yaml      of Grafana: where Prometheus is
prometheus.yaml                         of Prometheus: what to scrape, which rules to load
"""

import json
from pathlib import Path
from typing import Any

import yaml

from dashboards.alerts import rule_file
from dashboards.boards import BOARDS

FOLDER_UID, FOLDER_TITLE = "ellm", "ellm"
DATASOURCE_UID = "ellm-prometheus"
GRAFANA_DASHBOARDS = "/var/lib/grafana/dashboards/ellm"


def datasource(prometheus_url: str) -> dict[str, Any]:
    """As Grafana's API and its provisioning files have it in common."""
    return {
        "uid": DATASOURCE_UID,
        "name": "ellm Prometheus",
        "type": "prometheus",
        "access": "proxy",
        "url": prometheus_url,
        "jsonData": {"httpMethod": "POST", "timeInterval": "15s"},
    }


def export_files(cluster_url: str, prometheus_url: str, objective: float, runbooks: str) -> dict[str, str]:
    """Content by path, relative to the folder that they belong into. The same arguments give the same text."""
    provider = {
        "name": "ellm",
        "folder": FOLDER_TITLE,
        "folderUid": FOLDER_UID,
        "type": "file",
        "allowUiUpdates": False,
        "options": {"path": GRAFANA_DASHBOARDS},
    }
    prometheus = {
        "global": {"scrape_interval": "15s", "evaluation_interval": "15s"},
        "rule_files": ["rules/*.yaml"],
        "scrape_configs": [
            {"job_name": "ellm", "http_sd_configs": [{"url": f"{cluster_url.rstrip('/')}/metrics/targets"}]}
        ],
    }
    return {
        **{f"dashboards/{board.uid}.json": json.dumps(board.to_json(), indent=2) + "\n" for board in BOARDS},
        "rules/ellm.yaml": _yaml(rule_file(objective, runbooks)),
        "provisioning/dashboards/ellm.yaml": _yaml({"apiVersion": 1, "providers": [provider]}),
        "provisioning/datasources/ellm.yaml": _yaml({"apiVersion": 1, "datasources": [datasource(prometheus_url)]}),
        "prometheus.yaml": _yaml(prometheus),
    }


def write_files(folder: Path, files: dict[str, str]) -> list[Path]:
    """Writes them below ``folder``, which is made where it is not there. Raises OSError."""
    written = []
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.safe_dump(tree, sort_keys=False, width=1000)
