"""The pages of all runs under a storage path, current while one looks at them; for this machine alone."""

import asyncio
import hashlib
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

from aiohttp import web

from qlora_ray.errors import ConfigError
from qlora_ray.report.charts import show_duration
from qlora_ray.report.compare import comparison_page
from qlora_ray.report.page import Page, render_live, render_part, report_page
from qlora_ray.rundir import names, overview
from qlora_ray.rundir.record import read_run

HOST = "127.0.0.1"  # nobody else's machine reaches it; from elsewhere: ssh -L 8321:127.0.0.1:8321
OUR_NAMES = {"127.0.0.1", "localhost"}  # a page of elsewhere that had its name lead here would ask under its own
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def serve(root: Path, port: int, tell: Callable[[str], None]) -> None:
    """Serve the runs below `root` until Ctrl-C. Raises ConfigError for what is no storage path, and a port in use."""
    check_root(root)
    try:
        listening = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port}: {error}. Choose another; 0 takes any that is free.") from None
    tell(f"{root}: http://{HOST}:{listening.getsockname()[1]} (Ctrl-C ends it)")
    web.run_app(make_app(root), sock=listening, print=None, access_log=None)


def check_root(root: Path) -> None:
    """Raise ConfigError for what is no folder, or is a run itself."""
    if not root.is_dir():
        raise ConfigError(f"--serve {root}: is not a folder. Give a ray.storage_path, e.g. runs.")
    if any((root / name).is_file() for name in (names.METRICS, names.TRIAL_EVENTS)):
        raise ConfigError(f"--serve {root}: is a run. Give the folder that it lies in: {root.resolve().parent}.")


def make_app(root: Path) -> web.Application:
    """The application: it answers GET alone, and reads."""
    site = Site(root)
    app = web.Application(middlewares=[_guard])
    app.on_response_prepare.append(_add_headers)
    app.router.add_get("/", site.overview)
    app.router.add_get("/runs.json", site.as_json)
    app.router.add_get("/run", site.run)
    app.router.add_get("/sweep", site.sweep)
    app.router.add_get("/sweep.html", site.sweep_report)
    app.router.add_get("/compare", site.compare)
    app.router.add_get("/plotly.js", plotly_js)
    return app


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.host.rsplit(":", 1)[0] not in OUR_NAMES:
        raise web.HTTPForbidden(text="Only as 127.0.0.1 or localhost.\n")
    try:
        return await handler(request)
    except ConfigError as error:  # a file that is damaged; the overview says of which run
        return web.Response(status=422, text=f"{error}\n")


async def _add_headers(request: web.Request, answer: web.StreamResponse) -> None:
    answer.headers.update(HEADERS)


class Site:
    """What is shown of one storage path."""

    def __init__(self, root: Path):
        self._root = root

    async def overview(self, request: web.Request) -> web.Response:
        """All runs and sweeps."""
        return await self._answer(request, self._overview)

    async def as_json(self, request: web.Request) -> web.Response:
        """The same for scripts."""
        runs, sweeps = await asyncio.to_thread(overview.look, self._root)
        return web.json_response({"runs": list(map(asdict, runs)), "sweeps": list(map(asdict, sweeps))})

    async def run(self, request: web.Request) -> web.Response:
        """One run's report."""
        name = self._name(request)
        return await self._answer(request, lambda: self._run(name), self._stamp([name]))

    async def sweep(self, request: web.Request) -> web.Response:
        """One sweep with its trials."""
        name = self._name(request)
        return await self._answer(request, lambda: self._sweep(name))

    async def sweep_report(self, request: web.Request) -> web.StreamResponse:
        """The page that a sweep has left."""
        path = self._root / self._name(request) / names.SWEEP_REPORT
        if not path.is_file():
            raise web.HTTPNotFound(text="This sweep has no report yet.\n")
        return web.FileResponse(path)

    async def compare(self, request: web.Request) -> web.Response:
        """Several runs beside each other."""
        chosen = [self._known(name) for name in dict.fromkeys(request.query.getall("run", []))]
        if len(chosen) < 2:
            raise web.HTTPSeeOther(f"/run?name={chosen[0]}" if chosen else "/")
        return await self._answer(request, lambda: self._compare(chosen), self._stamp(chosen))

    async def _answer(self, request: web.Request, make: Callable[[], Page], stamp: str | None = None) -> web.Response:
        """The page; of one that is shown already what is new, or 204 where nothing is."""
        since = request.query.get("since")
        if stamp is not None and stamp == since:
            return web.Response(status=204)
        text, stamp = await asyncio.to_thread(_text, make, stamp, is_part=since is not None)
        if stamp == since:
            return web.Response(status=204)
        return web.Response(text=text, content_type="text/html" if since is None else "application/json")

    def _overview(self) -> Page:
        runs, sweeps = overview.look(self._root)
        return _runs_page("Runs", str(self._root), runs, sweeps)

    def _sweep(self, name: str) -> Page:
        page = _runs_page("Sweep", "", [], [overview.sweep_at(self._root, name)])
        if (self._root / name / names.SWEEP_REPORT).is_file():
            page.values["sweep_report"] = name
        return page

    def _run(self, name: str) -> Page:
        page, now = report_page(read_run(self._root / name)), overview.run_at(self._root, name)
        page.values["status"] = now.state
        if now.seconds_left is not None:
            page.values["progress"] = f"step {now.step:,} of {now.num_steps:,}, {show_duration(now.seconds_left)} left"
        return page

    def _compare(self, chosen: list[str]) -> Page:
        page = comparison_page([read_run(self._root / name) for name in chosen])
        page.values["runs"] = [(name, overview.run_at(self._root, name).state) for name in chosen]
        return page

    def _stamp(self, chosen: list[str]) -> str:
        states = [(overview.stamp(self._root / name), overview.run_at(self._root, name).state) for name in chosen]
        return hashlib.sha256(repr(states).encode()).hexdigest()[:16]

    def _name(self, request: web.Request) -> str:
        return self._known(request.query.get("name", ""))

    def _known(self, name: str) -> str:
        if not overview.is_known(self._root, name):
            raise web.HTTPNotFound(text="No such run.\n")
        return name


async def plotly_js(request: web.Request) -> web.Response:
    """The library that draws, out of the Python package."""
    from plotly.offline import get_plotlyjs

    answer = web.Response(text=get_plotlyjs(), content_type="text/javascript")
    answer.enable_compression()
    return answer


def _runs_page(title: str, where: str, runs: list[overview.RunState], sweeps: list[overview.SweepState]) -> Page:
    values = {"title": title, "where": where, "runs": runs, "sweeps": sweeps, "counts": _counts}
    return Page("runs.html.j2", {}, values)


def _counts(sweep: overview.SweepState) -> list[tuple[str, int]]:
    return Counter(trial.state for trial in sweep.trials).most_common()


def _text(make: Callable[[], Page], stamp: str | None, is_part: bool) -> tuple[str, str]:
    """A page, or what is new of it, and its stamp: without one its content is."""
    page = make()
    if stamp is None:
        stamp = hashlib.sha256(render_part(page, "").encode()).hexdigest()[:16]
    return (render_part if is_part else render_live)(page, stamp), stamp
