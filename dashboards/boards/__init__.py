"""The dashboards, a module each."""

from dashboards.boards.cluster import CLUSTER
from dashboards.boards.controller import CONTROLLER
from dashboards.boards.device_memory import DEVICE_MEMORY
from dashboards.boards.host_buffer import HOST_BUFFER
from dashboards.boards.migration import MIGRATION
from dashboards.boards.replica import REPLICA_BOARD
from dashboards.boards.slo import SLO

BOARDS = (CLUSTER, DEVICE_MEMORY, SLO, REPLICA_BOARD, HOST_BUFFER, MIGRATION, CONTROLLER)
