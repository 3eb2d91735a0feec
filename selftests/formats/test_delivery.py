# SPDX-License-Identifier: GPL-2.0-or-later
"""Delivery to a real HTTP server that refuses, stalls, breaks off and lies."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from records import BARE, example, make_record, make_test

from paprscm.commands import cli
from paprscm.errors import ConfigError, HostError
from paprscm.formats import delivery, squad
from paprscm.formats.context import Context
from paprscm.formats.delivery import RefusedError, deliver, follow, server_of
from paprscm.formats.server import Patience, Server
from paprscm.formats.spool import Report, Spool
from paprscm.results.record import FILE, encode

TOKEN = "s3cret.token"  # noqa: S105
PATIENCE = Patience(timeout_s=0.3, repetitions=2, backoff_s=0.01)
OK = (200, b'{"id": "r1", "status": "ok"}')
Reply = tuple[int, bytes] | Callable[[BaseHTTPRequestHandler], None]


class Dashboard(ThreadingHTTPServer):
    """A dashboard whose answers are given in advance; the last one is repeated."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.replies: list[Reply] = [OK]
        self.seen: list[tuple[str, str, bytes, dict[str, str]]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.command, self.path, body, dict(self.headers)))
        reply = self.server.replies[0]
        if len(self.server.replies) > 1:
            self.server.replies.pop(0)
        if callable(reply):
            reply(self)
            return
        self.send_response(reply[0])
        self.send_header("Content-Length", str(len(reply[1])))
        self.end_headers()
        self.wfile.write(reply[1])

    def log_message(self, *_words: Any) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with Dashboard() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def stalls(handler: BaseHTTPRequestHandler) -> None:
    """Answer nothing."""
    handler.server.released.wait(60)  # type: ignore[attr-defined]


def stalls_in_the_body(handler: BaseHTTPRequestHandler) -> None:
    """Answer the head only."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    stalls(handler)


def breaks_off(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection in the middle of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"id": "r1"')


def hangs_up(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


def server(dashboard: Dashboard) -> Server:
    return Server(url=dashboard.url, token=f"Bearer {TOKEN}", patience=PATIENCE)


def waiting(spool: Spool, dashboard: Dashboard, body: str = "{}") -> Report:
    """A report in the spool."""
    report = Report(
        receiver="kcidb",
        url=dashboard.url,
        path="submit",
        content_type="application/json",
        body=body,
    )
    spool.add(report)
    return report


def states(folder: Path) -> list[str]:
    """The states of the spool's reports."""
    return sorted(file.suffix for file in folder.iterdir() if file.name != "lock")


def test_a_report_is_sent_once(dashboard: Dashboard, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    report = waiting(spool, dashboard)
    (outcome,) = deliver(spool, "kcidb", server(dashboard))
    assert outcome.id == "r1"
    assert spool.add(report) == "r1"
    assert deliver(spool, "kcidb", server(dashboard)) == []
    ((method, path, body, headers),) = dashboard.seen
    assert (method, path, body) == ("POST", "/submit", b"{}")
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert states(tmp_path) == [".sent"]


@pytest.mark.parametrize(
    "trouble", [(500, b'{"id": "0"}'), (503, b""), hangs_up, breaks_off, stalls]
)
def test_a_passing_failure_is_overcome(
    dashboard: Dashboard, tmp_path: Path, trouble: Reply
) -> None:
    spool = Spool(tmp_path)
    waiting(spool, dashboard)
    dashboard.replies = [trouble, trouble, OK]
    (outcome,) = deliver(spool, "kcidb", server(dashboard))
    assert outcome.id == "r1"
    assert len(dashboard.seen) == 3


@pytest.mark.parametrize(
    "trouble",
    [
        *((500, b'{"id": "0"}'), (502, b"<html>"), (404, b"nginx"), (302, b"")),
        # Lies: a 200 that is not KCIDB's.
        *((200, b"<html>\x1b[31mwelcome"), (200, b'{"id": "0"}'), (200, b""), (200, b"[" * 10**5)),
        *((200, b'{"id": 5, "status": "ok"}'), (201, b'{"id": "r1", "status": "ok"}')),
        *(stalls, stalls_in_the_body, breaks_off, hangs_up),
    ],
)
def test_a_report_that_was_not_accepted_stays(
    dashboard: Dashboard, tmp_path: Path, trouble: Reply
) -> None:
    spool = Spool(tmp_path)
    waiting(spool, dashboard)
    dashboard.replies = [trouble]
    with pytest.raises(HostError) as caught:
        deliver(spool, "kcidb", server(dashboard))
    assert states(tmp_path) == [".pending"]
    assert TOKEN not in repr(caught.value) + repr(caught.value.__cause__)
    assert "\x1b" not in str(caught.value)
    dashboard.replies = [OK]
    assert [one.id for one in deliver(spool, "kcidb", server(dashboard))] == ["r1"]


def test_no_server(tmp_path: Path) -> None:
    with Dashboard() as gone:
        pass
    spool = Spool(tmp_path)
    waiting(spool, gone)
    with pytest.raises(HostError, match="does not answer 3 requests: NewConnectionError"):
        deliver(spool, "kcidb", server(gone))


def test_a_refused_report_does_not_block_the_next(dashboard: Dashboard, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    refused = waiting(spool, dashboard, "1")
    waiting(spool, dashboard, "2")
    dashboard.replies = [(400, b"no such field"), OK]
    with pytest.raises(RefusedError, match=r"refuses the report \(status 400\): no such field"):
        deliver(spool, "kcidb", server(dashboard))
    assert [body for _, _, body, _ in dashboard.seen] == [b"1", b"2"]
    assert states(tmp_path) == [".refused", ".sent"]
    assert deliver(spool, "kcidb", server(dashboard)) == []
    # A person may submit it again.
    assert spool.add(refused) is None
    assert len(deliver(spool, "kcidb", server(dashboard))) == 1


def test_a_refused_token_keeps_the_report(dashboard: Dashboard, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    waiting(spool, dashboard)
    dashboard.replies = [(401, b"")]
    with pytest.raises(ConfigError, match=r"refuses the token \(status 401\)") as caught:
        deliver(spool, "kcidb", server(dashboard))
    assert TOKEN not in repr(caught.value)
    assert len(dashboard.seen) == 1
    assert states(tmp_path) == [".pending"]


def test_a_token_does_not_follow_a_redirection(dashboard: Dashboard, tmp_path: Path) -> None:
    def moves(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("Location", f"{dashboard.url}elsewhere")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    spool = Spool(tmp_path)
    waiting(spool, dashboard)
    dashboard.replies = [moves]
    with pytest.raises(HostError, match="status 307"):
        deliver(spool, "kcidb", server(dashboard))
    assert [path for _, path, _, _ in dashboard.seen] == ["/submit"]


SENDER = """
import sys
from pathlib import Path
from paprscm.formats.delivery import deliver
from paprscm.formats.server import Patience, Server
from paprscm.formats.spool import Spool

server = Server(url=sys.argv[2], token="Bearer x", patience=Patience(timeout_s=30))
print(len(deliver(Spool(Path(sys.argv[1])), "kcidb", server)))
"""


def test_the_spool_survives_a_killed_sender(dashboard: Dashboard, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    waiting(spool, dashboard)
    dashboard.replies = [stalls, OK]
    with subprocess.Popen([sys.executable, "-c", SENDER, tmp_path, dashboard.url]) as sender:
        while not dashboard.seen:
            assert sender.poll() is None
        sender.kill()
    assert states(tmp_path) == [".pending"]
    assert len(deliver(spool, "kcidb", server(dashboard))) == 1
    assert dashboard.seen[0][2] == dashboard.seen[1][2]


def test_two_senders_send_a_report_once(dashboard: Dashboard, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for number in range(5):
        waiting(spool, dashboard, str(number))
    command = [sys.executable, "-c", SENDER, str(tmp_path), dashboard.url]
    senders = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [int(sender.communicate()[0]) for sender in senders]
    assert sum(counts) == 5
    assert sorted(body for _, _, body, _ in dashboard.seen) == [b"%d" % n for n in range(5)]


def test_a_report_for_another_server_is_not_sent(dashboard: Dashboard, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    report = waiting(spool, dashboard)
    spool.add(replace(report, url="https://staging/"))
    assert len(deliver(spool, "kcidb", server(dashboard))) == 1
    assert states(tmp_path) == [".pending", ".sent"]


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ([(200, b'{"status": "inprogress"}'), (200, b'{"status": "processed"}')], "processed"),
        ([(200, b'{"status": "failed"}')], "failed"),
        ([(404, b'{"status": "notfound"}')], "notfound"),
        ([(404, b"nginx")], "notfound"),
        ([(200, b"<html>")], "unknown"),
        ([(200, b'{"status": "\\u001b[31m"}')], "unknown"),
    ],
)
def test_kcidb_s_state_is_followed(
    dashboard: Dashboard, replies: list[Reply], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_POLL_S", 0.01)
    dashboard.replies = replies
    assert follow(server(dashboard), "r/1", 0.1) == expected
    assert dashboard.seen[0][1] == "/status?id=r%2F1"


# --- SQUAD


def test_squad_gets_a_form_for_each_environment(dashboard: Dashboard, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for report in delivery.reports("squad", dashboard.url, example(), Context(), "kernel/papr"):
        spool.add(report)
    dashboard.replies = [(201, b"17"), (201, b"18")]
    outcomes = deliver(spool, "squad", server(dashboard))
    assert [outcome.id for outcome in outcomes] == ["17", "18"]
    paths = [path for _, path, _, _ in dashboard.seen]
    build = "/api/submit/kernel/papr/6.12.117-paprscm/qemu-10.0.13"
    assert paths == [f"{build}-tcg-power9-radix-64k", f"{build}-without-kernel"]
    for (_, _, body, headers), form in zip(
        dashboard.seen, squad.submissions(example()), strict=True
    ):
        boundary = headers["Content-Type"].partition("boundary=")[2]
        parts = body.decode().split(f"--{boundary}")[1:-1]
        contents = {
            part.partition('name="')[2].partition('"')[0]: json.loads(part.partition("\r\n\r\n")[2])
            for part in parts
        }
        assert contents == {
            "tests": form.tests,
            "metrics": form.metrics,
            "metadata": form.metadata,
        }


def test_squad_knows_a_report_whose_answer_was_lost(dashboard: Dashboard, tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    record = make_record(make_test("a"))
    for report in delivery.reports("squad", dashboard.url, record, Context(), "g/p"):
        spool.add(report)
    dashboard.replies = [hangs_up, (400, b"There is already a test run with job_id 1d2803ed")]
    (outcome,) = deliver(spool, "squad", server(dashboard))
    assert outcome.id == "an earlier submission"


# --- the command, and addresses


def write_job(folder: Path) -> Path:
    (folder / "job").mkdir()
    (folder / "job" / FILE).write_bytes(encode(example()))
    return folder / "job"


def test_submit(
    dashboard: Dashboard,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = write_job(tmp_path)
    monkeypatch.setenv("KCIDB_REST", dashboard.url.replace("//", f"//{TOKEN}@"))
    words = ["submit", "--to", "kcidb", "--wait", "0", "--cache-dir", str(tmp_path), str(job)]
    dashboard.replies = [OK, (200, b'{"status": "processed"}')]
    assert cli.main(words) == 0
    assert cli.main(words) == 0
    printed = capsys.readouterr()
    accepted, state, before = printed.out.splitlines()
    assert accepted.endswith(f"accepted by {dashboard.url} as r1")
    assert state.endswith(": processed")
    assert before.endswith("sent before, accepted as r1")
    assert TOKEN not in printed.out + printed.err
    assert json.loads(dashboard.seen[0][2])["tests"]
    files = (tmp_path / "spool").iterdir()
    assert not any(TOKEN.encode() in file.read_bytes() for file in files)
    assert (tmp_path / "spool").stat().st_mode & 0o77 == 0
    monkeypatch.delenv("KCIDB_REST")
    assert cli.main(words) == 2
    assert "KCIDB_REST is not set" in capsys.readouterr().err


def test_a_report_that_kcidb_cannot_process_is_status_1(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KCIDB_REST", dashboard.url.replace("//", f"//{TOKEN}@"))
    dashboard.replies = [OK, (200, b'{"status": "failed"}')]
    words = ["submit", "--to", "kcidb", "--wait", "0", "--cache-dir", str(tmp_path)]
    assert cli.main([*words, str(write_job(tmp_path))]) == 1


@pytest.mark.parametrize(
    ("receiver", "environ"),
    [
        ("kcidb", {"KCIDB_REST": "https://db.kernelci.org/"}),
        ("kcidb", {"KCIDB_REST": f"http://{TOKEN}@db.kernelci.org/"}),
        ("kcidb", {"KCIDB_REST": f"ftp://{TOKEN}@db.kernelci.org/"}),
        ("kcidb", {"KCIDB_REST": f"https://{TOKEN}\u00e9@host/"}),
        ("squad", {"SQUAD_URL": "https://squad/"}),
        ("squad", {"SQUAD_TOKEN": TOKEN}),
        ("squad", {"SQUAD_URL": f"https://{TOKEN}@squad/", "SQUAD_TOKEN": TOKEN}),
        ("squad", {"SQUAD_URL": "http://squad/", "SQUAD_TOKEN": TOKEN}),
    ],
)
def test_unusable_addresses_are_refused_without_the_token(
    receiver: str, environ: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        server_of(receiver, environ)
    assert TOKEN not in repr(caught.value)


def test_addresses() -> None:
    kci = server_of("kcidb", {"KCIDB_REST": f"https://{TOKEN}@staging.db.kernelci.org"})
    assert (kci.url, kci.token) == ("https://staging.db.kernelci.org/", f"Bearer {TOKEN}")
    assert TOKEN not in repr(kci)
    other = server_of("squad", {"SQUAD_URL": "https://squad/x", "SQUAD_TOKEN": TOKEN})
    assert (other.url, other.token) == ("https://squad/x/", f"Token {TOKEN}")


def test_nothing_to_deliver() -> None:
    bare = replace(make_record(make_test("a", environment="guest")), environments={"guest": BARE})
    with pytest.raises(ConfigError, match="no test of the job ran on a kernel"):
        list(delivery.reports("kcidb", "u", bare, Context(), ""))
    for project in ("", "group", "a/b/c", "a/"):
        with pytest.raises(ConfigError, match="needs a group and a project"):
            list(delivery.reports("squad", "u", bare, Context(), project))
