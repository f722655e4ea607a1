"""The processes of a cluster's Serve replicas, which tests stop and kill."""

import psutil


def replica_processes(name: str = "ellm-model:") -> list[psutil.Process]:
    """Those below this process whose deployment's name begins so; by default the engines'."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if f"ServeReplica:{name}" in " ".join(process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
