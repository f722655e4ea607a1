"""Puts folder, datasource, dashboards and alert rules into a Grafana, by its HTTP API. What is there as it should be is
left alone, so a second push changes nothing.

    GrafanaPushError
    +-- GrafanaUnreachable    nobody answers at the address: try again, or correct it
    +-- GrafanaRefusal        the token is not good for that, or Grafana does not take what was sent
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from grafana_client.api import GrafanaApi
from grafana_client.client import GrafanaClientError, GrafanaException, GrafanaTimeoutError
from niquests.exceptions import RequestException

from dashboards.alerts import grafana_rules
from dashboards.board import Board
from dashboards.files import DATASOURCE_UID, FOLDER_TITLE, FOLDER_UID, datasource

_TIMEOUT_S = 10.0
_OF_GRAFANA = frozenset({"id", "version"})
"""Keys of a dashboard that Grafana sets itself."""


class GrafanaPushError(Exception):
    """Something was not put into Grafana; the message says what, and what would help."""


class GrafanaUnreachable(GrafanaPushError):
    """Nobody answers there."""


class GrafanaRefusal(GrafanaPushError):
    """Grafana answers with an error."""


class Change(StrEnum):
    """What became of one thing that was pushed."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


class Grafana:
    """One Grafana.

    Args:
        url: with scheme; a path is what Grafana is served below.
        token: of a service account that may edit folders, dashboards, datasources and alert rules.
    """

    def __init__(self, url: str, token: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GrafanaPushError(f"{url!r} is no address of a Grafana; give one such as http://localhost:3000")
        path = parts.path.strip("/")
        self._url = url
        self._api: Any = GrafanaApi(
            token,
            host=parts.hostname,
            port=parts.port,
            protocol=parts.scheme,
            url_path_prefix=f"{path}/" if path else "",
            timeout=_TIMEOUT_S,
        )

    def push_folder(self) -> Change:
        """The folder of all that follows."""
        with self._errors(f"folder {FOLDER_TITLE}"):
            if _known(lambda: self._api.folder.get_folder(FOLDER_UID)) is not None:
                return Change.UNCHANGED
            self._api.folder.create_folder(FOLDER_TITLE, FOLDER_UID)
            return Change.CREATED

    def push_datasource(self, prometheus_url: str) -> Change:
        """Prometheus, where Grafana's server reaches it."""
        wanted = datasource(prometheus_url)
        with self._errors(f"datasource {wanted['name']}"):
            known = _known(lambda: self._api.datasource.get_datasource_by_uid(DATASOURCE_UID))
            if known is None:
                self._api.datasource.create_datasource(wanted)
                return Change.CREATED
            if _has(known, wanted):
                return Change.UNCHANGED
            self._api.datasource.update_datasource_by_uid(DATASOURCE_UID, wanted)
            return Change.UPDATED

    def push_board(self, board: Board) -> Change:
        """One dashboard, into the folder."""
        wanted = board.to_json()
        with self._errors(f"dashboard {board.title}"):
            known = _known(lambda: self._api.dashboard.get_dashboard(board.uid))
            if known is not None and known.get("meta", {}).get("folderUid") == FOLDER_UID:
                theirs = {key: value for key, value in known["dashboard"].items() if key not in _OF_GRAFANA}
                if theirs == wanted:
                    return Change.UNCHANGED
            self._api.dashboard.update_dashboard({"dashboard": wanted, "folderUid": FOLDER_UID, "overwrite": True})
            return Change.CREATED if known is None else Change.UPDATED

    def push_rules(self, objective: float, runbooks: str) -> Iterator[tuple[str, Change]]:
        """The alert rules, each by its name."""
        for rule in grafana_rules(objective, runbooks, FOLDER_UID, DATASOURCE_UID):
            uid = rule["uid"]
            with self._errors(f"alert rule {rule['title']}"):
                known = _known(lambda uid=uid: self._api.alertingprovisioning.get_alertrule(uid))  # type: ignore[misc]
                if known is None:
                    self._api.alertingprovisioning.create_alertrule(rule)
                elif not _has(known, rule):
                    self._api.alertingprovisioning.update_alertrule(uid, rule)
            change = Change.CREATED if known is None else Change.UNCHANGED if _has(known, rule) else Change.UPDATED
            yield rule["title"], change

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except GrafanaTimeoutError as error:
            raise GrafanaUnreachable(f"{what}: {self._url} did not answer within {_TIMEOUT_S:g} s") from error
        except RequestException as error:
            raise GrafanaUnreachable(f"{what}: nobody answers at {self._url} ({type(error).__name__})") from error
        except GrafanaException as error:
            help = {
                401: "the token is not valid there",
                403: "the token may not do that: give its service account the role Editor, for datasources Admin",
                404: "there is no such route; is the address that of a Grafana, with the path that it is served below?",
            }.get(error.status_code, _message(error))
            raise GrafanaRefusal(f"{what}: {self._url} answers {error.status_code}: {help}") from error


def _message(error: GrafanaException) -> str:
    if isinstance(error.response, dict) and "message" in error.response:
        return str(error.response["message"])
    return str(error.response)[:200]


def _known(ask: Callable[[], Any]) -> dict[str, Any] | None:
    """What is there; None where it is not."""
    try:
        found = ask()
    except GrafanaClientError as error:
        # Not found is told in JSON; a 404 of something else is not.
        if error.status_code == 404 and isinstance(error.response, dict):
            return None
        raise
    return dict(found)


def _has(known: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether everything wanted is there. Grafana adds keys of its own, at any depth."""
    return all(key in known and _same(known[key], value) for key, value in wanted.items())


def _same(known: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping) and isinstance(known, Mapping):
        return _has(known, wanted)
    if isinstance(wanted, list) and isinstance(known, list):
        return len(known) == len(wanted) and all(_same(*pair) for pair in zip(known, wanted, strict=True))
    return bool(known == wanted)
