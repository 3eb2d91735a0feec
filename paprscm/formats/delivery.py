# SPDX-License-Identifier: GPL-2.0-or-later
"""Delivery of results to KCIDB and SQUAD."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit, urlunsplit

from paprscm.errors import ConfigError, Error, HostError
from paprscm.formats import kcidb, squad
from paprscm.formats.context import Context
from paprscm.formats.server import Answer, Patience, Server
from paprscm.formats.spool import Report, Spool
from paprscm.results.record import Record

RECEIVERS: Final = ("kcidb", "squad")
_BOUNDARY: Final = "paprscm-results"
"""Fixed, so that equal results are equal reports; JSON has no line that begins with "--"."""
_POLL_S: Final = 2.0
_SETTLED: Final = ("processed", "failed")


class RefusedError(HostError):
    """The receiver will never accept this report."""


def server_of(
    receiver: str, environ: Mapping[str, str], patience: Patience | None = None
) -> Server:
    """The receiver's address and token, from the environment.

    Args:
        receiver: one of RECEIVERS.
        environ: KCIDB_REST=https://TOKEN@host/, or SQUAD_URL and SQUAD_TOKEN.
        patience: limits of its requests.

    Raises:
        ConfigError: a variable is missing or cannot be used; without its value.
    """
    patience = patience or Patience()
    if receiver == "kcidb":
        parts = urlsplit(_variable(environ, "KCIDB_REST", "https://TOKEN@db.kernelci.org/"))
        userinfo, _, host = parts.netloc.rpartition("@")
        token = userinfo.rpartition(":")[2]
        if not token:
            raise ConfigError("KCIDB_REST has no token", hint="KCIDB_REST=https://TOKEN@host/")
        url = urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/", "", ""))
        return Server(url=url, token=f"Bearer {token}", patience=patience)
    url = _variable(environ, "SQUAD_URL", "https://squad.example.org/").rstrip("/") + "/"
    token = _variable(environ, "SQUAD_TOKEN", "the token of a user who may submit")
    if "@" in urlsplit(url).netloc:
        raise ConfigError("SQUAD_URL has a user name", hint="the token belongs into SQUAD_TOKEN")
    return Server(url=url, token=f"Token {token}", patience=patience)


def _variable(environ: Mapping[str, str], name: str, example: str) -> str:
    value = environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"{name} is not set", hint=f"{name}: {example}")
    return value


def reports(
    receiver: str, url: str, record: Record, context: Context, project: str
) -> Iterator[Report]:
    """The requests that deliver a job's results.

    Args:
        receiver: one of RECEIVERS.
        url: its address.
        record, context: of the job.
        project: "GROUP/PROJECT" of SQUAD.

    Raises:
        ConfigError: there is nothing to deliver, or no project.
    """
    if receiver == "kcidb":
        data = kcidb.report(record, context)
        if "tests" not in data:
            raise ConfigError("no test of the job ran on a kernel, so KCIDB has no use for it")
        yield Report(
            receiver=receiver,
            url=url,
            path="submit",
            content_type="application/json",
            body=kcidb.dump(data),
        )
        return
    words = project.split("/")
    if len(words) != 2 or not all(words):
        raise ConfigError("SQUAD needs a group and a project", hint="--project GROUP/PROJECT")
    # Takes a tenth of a second, and few commands need it.
    from urllib3.filepost import encode_multipart_formdata

    for form in squad.submissions(record):
        place = "/".join(quote(word, safe="") for word in (*words, form.build, form.environment))
        body, content_type = encode_multipart_formdata(squad.form(form), _BOUNDARY)
        yield Report(
            receiver=receiver,
            url=url,
            path=f"api/submit/{place}",
            content_type=content_type,
            body=body.decode(),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The fate of one report: its name in the spool, the receiver's id, and a sentence."""

    name: str
    id: str
    text: str


def deliver(spool: Spool, receiver: str, server: Server) -> list[Outcome]:
    """Send the reports of the spool that wait for a receiver.

    Raises:
        HostError: one was not accepted; it and later ones stay in the spool, unless the receiver
            will never accept it.
        ConfigError: the token was refused.
    """
    accept = {"kcidb": _accepted_by_kcidb, "squad": _accepted_by_squad}[receiver]
    outcomes = []
    refused: Error | None = None
    with spool.sending(receiver, server.url) as waiting:
        for report in waiting:
            answer = server.request(
                "POST",
                report.path,
                body=report.body.encode(),
                headers={"Content-Type": report.content_type},
            )
            try:
                accepted = _judge(server, answer, accept)
            except RefusedError as error:
                spool.mark(report, "refused", answer.text)
                refused = error
                continue
            spool.mark(report, "sent", accepted)
            outcomes.append(Outcome(name=report.name, id=accepted, text=f"accepted as {accepted}"))
    if refused is not None:
        raise refused
    return outcomes


def _judge(server: Server, answer: Answer, accept: Callable[[Answer], str | None]) -> str:
    """The receiver's id of an accepted report.

    Raises:
        Error: it was not accepted.
    """
    if answer.status in (401, 403):
        raise ConfigError(
            f"{server.url} refuses the token (status {answer.status})",
            hint="the report stays in the spool; submit again with another token",
        )
    if (accepted := accept(answer)) is not None:
        return accepted
    if 400 <= answer.status < 500 and answer.status not in (404, 408, 429):
        reason = f"refuses the report (status {answer.status}): {answer.text}"
        raise RefusedError(f"{server.url} {reason}")
    raise HostError(
        f"{server.url} has not accepted the report (status {answer.status}): {answer.text}",
        hint="it stays in the spool; submit again later",
    )


def _accepted_by_kcidb(answer: Answer) -> str | None:
    """The id in {"id": …, "status": "ok"}; a page of a proxy with status 200 is not one."""
    match answer.json:
        case {"id": str(text), "status": "ok"} if answer.status == 200 and text not in ("", "0"):
            return str(text)
    return None


def _accepted_by_squad(answer: Answer) -> str | None:
    """The id of the test run: SQUAD answers with 201 and a number."""
    text = answer.body.strip()
    if answer.status == 201 and text.isdigit():
        return text.decode()
    if answer.status == 400 and b"already" in answer.body:
        # By an earlier attempt, of which the answer was lost: job_id is unique in a build.
        return "an earlier submission"
    return None


def follow(server: Server, report_id: str, limit_s: float) -> str:
    """The state of a report at KCIDB, whose 200 means "spooled" only.

    Args:
        server: KCIDB.
        report_id: from its answer.
        limit_s: time to wait for "processed" or "failed".

    Returns:
        The last state: "inprogress", "ready", "processed", "failed", "notfound", or "unknown".
    """
    deadline = time.monotonic() + limit_s
    while True:
        answer = server.request("GET", f"status?id={quote(report_id, safe='')}")
        match answer.json:
            case {"status": str(state)} if state.isalpha():
                pass
            case _:
                state = "notfound" if answer.status == 404 else "unknown"
        if state in _SETTLED or time.monotonic() + _POLL_S > deadline:
            return state
        # The server offers no other way to learn that it has processed a report.
        time.sleep(_POLL_S)
