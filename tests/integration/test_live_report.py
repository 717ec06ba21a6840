"""python -m qlora_ray.report --serve: every run and sweep with its state, current, and nothing for anybody else."""

import json
import re
import socket
import urllib.error
import urllib.parse
import urllib.request

import pytest

from qlora_ray import report
from tests.integration import live_runs


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    live_runs.write_all(root)
    return root


@pytest.fixture(scope="module")
def address(storage):
    with live_runs.served(storage) as address:
        yield address


def get(url: str, **headers: str) -> tuple[int, dict, str]:
    """Status, headers and text, whatever the status."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, dict(answer.headers), answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read().decode()


def states(address: str) -> dict[str, dict]:
    known = json.loads(get(f"{address}/runs.json")[2])
    trials = [trial for sweep in known["sweeps"] for trial in sweep["trials"]]
    return {run["name"]: run for run in [*known["runs"], *known["sweeps"], *trials]}


def test_every_run_has_its_state_step_loss_and_time_left(address):
    found = states(address)
    assert {name: run["state"] for name, run in found.items()} == {
        "going": "running", "whole": "done", "left": "interrupted", "silent": "silent", "damaged": "damaged",
        "begun": "starting", "sweep": "running", "sweep/trials/t0000": "done", "sweep/trials/t0001": "running",
        "sweep/trials/t0002": "waiting",
    }  # fmt: skip
    going = found["going"]
    assert (going["step"], going["num_steps"], going["loss"], going["eval_loss"]) == (50, 100, 2.5, 2.0)
    assert 0 < going["seconds_left"] <= 100  # two seconds a step
    assert all(run.get("seconds_left") is None for run in found.values() if run["state"] != "running")
    assert "line 2" in found["damaged"]["problem"]
    assert found["sweep/trials/t0001"]["parameters"] == {"training.learning_rate": 1e-4}
    page = get(address)[2]
    assert all(f'value="{name}"' in page for name, run in found.items() if name != "sweep")


def test_page_of_a_run_is_its_report_and_shows_new_lines_as_they_arrive(address, storage):
    url = f"{address}/run?name=going"
    page = get(url)[2]
    assert "step 50 of 100" in page and '<span class="badge running">' in page
    stamp = re.search(r'let since = "(\w+)"', page)[1]
    assert get(f"{url}&since={stamp}")[0] == 204
    live_runs.append(storage / "going", 60, grad_norm=1.0)
    status, _, text = get(f"{url}&since={stamp}")
    part = json.loads(text)
    assert status == 200 and "step 60 of 100" in part["html"] and part["html"].lstrip().startswith("<header>")
    assert part["charts"]["loss"]["data"][0]["x"][-1] == 60 and "grad_norm" in part["charts"]
    assert get(f"{url}&since={part['stamp']}")[0] == 204
    assert states(address)["going"]["step"] == 60


def test_overview_says_what_is_new_in_it(address, storage):
    stamp = re.search(r'let since = "(\w+)"', get(address)[2])[1]
    live_runs.append(storage / "sweep" / "trials" / "t0001", 70)
    part = json.loads(get(f"{address}/?since={stamp}")[2])
    assert "70 / 100" in part["html"] and part["charts"] == {}


def test_sweep_shows_its_trials_with_their_parameters_and_its_own_report(address):
    page = get(f"{address}/sweep?name=sweep")[2]
    assert all(f"t000{number}" in page for number in range(3)) and "learning_rate" in page and "1e-05" in page
    assert 'href="/sweep.html?name=sweep"' in page
    assert "all trials" in get(f"{address}/sweep.html?name=sweep")[2]


def test_ticked_runs_are_compared(address):
    names = ["whole", "left", "sweep/trials/t0000"]
    page = get(f"{address}/compare?" + urllib.parse.urlencode({"run": names}, doseq=True))[2]
    assert "3 runs compared" in page and "whole: done" in page and "training.learning_rate" in page


def test_one_ticked_run_is_shown_and_none_leads_back(address):
    assert '<span class="badge done">' in get(f"{address}/compare?run=whole")[2]
    assert 'value="whole"' in get(f"{address}/compare")[2]


def test_damaged_file_is_told_on_its_page_and_hides_no_other_run(address):
    status, _, text = get(f"{address}/run?name=damaged")
    assert status == 422 and "line 2" in text
    assert get(address)[0] == 200


@pytest.mark.parametrize("name", ["", "..", "../whole", "whole/../left", "cache", ".", "sweep/trials/../../whole",
                                  "/etc", "whole/metrics.jsonl", "sweep/other/t0000", "no", "a\0b"])  # fmt: skip
@pytest.mark.parametrize("page", ["run?name=", "sweep.html?name=", "compare?run=whole&run="])
def test_name_that_is_no_run_here_is_not_found(address, page, name):
    status, headers, _ = get(f"{address}/{page}{urllib.parse.quote(name)}")
    assert status == 404 and "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_pages_ask_their_own_server_alone(address):
    for path in ("/", "/run?name=whole", "/sweep?name=sweep", "/compare?run=whole&run=left"):
        _, headers, page = get(address + path)
        policies = [headers["Content-Security-Policy"], re.search(r'Policy" content="([^"]+)"', page)[1]]
        assert all(policy.startswith("default-src 'none';") and "http" not in policy for policy in policies)
        loaded = re.findall(r'(?:src|href|action)="([^"]+)"', page)
        assert loaded and all(one.startswith("/") and not one.startswith("//") for one in loaded)


def test_page_of_elsewhere_that_leads_here_by_its_own_name_is_refused(address):
    assert get(address, Host="example.org")[0] == 403
    assert get(address, Host=f"localhost:{address.rsplit(':', 1)[1]}")[0] == 200


def test_only_this_machine_reaches_it(address):
    port = int(address.rsplit(":", 1)[1])
    others = {one[4][0] for one in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)} - {"127.0.0.1"}
    for other in (*others, "127.0.0.2"):
        with pytest.raises(OSError):
            socket.create_connection((other, port), timeout=5)


def test_nothing_is_written_and_only_get_is_answered(address, storage):
    before = sorted((path, path.stat().st_mtime_ns) for path in storage.rglob("*"))
    get(f"{address}/run?name=whole")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"{address}/run?name=whole", data=b"x")
    assert sorted((path, path.stat().st_mtime_ns) for path in storage.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--serve", "no"], "--serve no: is not a folder"),
        (["--serve", "RUN"], "is a run. Give the folder that it lies in"),
        (["--serve", "STORAGE", "--port", "BUSY"], "Choose another; 0 takes any that is free"),
        (["--serve", "STORAGE", "--port", "99999"], "Choose another; 0 takes any that is free"),
        (["--serve", "STORAGE", "RUN"], "takes one ray.storage_path"),
        ([], "name a run directory, or several; or --serve"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(storage, capsys, arguments, why):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        places = {"RUN": str(storage / "whole"), "STORAGE": str(storage), "BUSY": str(busy.getsockname()[1])}
        assert report.main([places.get(word, word) for word in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and len(err.splitlines()) == 1 and why in err
