"""SECURITY.md, line by line: each test is named there."""

import ast
import concurrent.futures
import os
import re
import stat
from pathlib import Path

import grpc
import pytest
import yaml
from pydantic import ValidationError

import qlora_ray
from qlora_ray import environment, storage
from qlora_ray.cluster import authentication, connect
from qlora_ray.config import Config, load_config
from qlora_ray.errors import ConfigError, ProcessDied

PACKAGE, ROOT = Path(qlora_ray.__file__).parent, Path(__file__).parents[2]
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "_bundled" not in path.parts)


@pytest.fixture(autouse=True)
def own_token_file(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "ray" / "auth_token"))


@pytest.fixture
def fake_cluster():
    """Serves the question that `authentication.ask` asks, as Ray's head does, with or without a token."""
    servers = []

    def serve(wanted: str | None) -> str:
        def alive(request, context):
            given = dict(context.invocation_metadata()).get("authorization")
            if wanted is not None and given != f"Bearer {wanted}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        handler = grpc.method_handlers_generic_handler(
            "ray.rpc.NodeInfoGcsService", {"CheckAlive": grpc.unary_unary_rpc_method_handler(alive)}
        )
        server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield serve
    for server in servers:
        server.stop(0)


def test_cluster_of_other_machines_without_token_authentication_is_refused_unless_allowed(monkeypatch):
    monkeypatch.setattr(authentication, "ask", lambda *_: "open")
    with pytest.raises(ConfigError, match="without a token.*ray.allow_unauthenticated=true"):
        authentication.check_cluster("10.0.0.1:6379", allow_unauthenticated=False)
    with pytest.raises(ConfigError, match="without a token"):
        authentication.check_cluster("head.example:6379", allow_unauthenticated=False)
    authentication.check_cluster("10.0.0.1:6379", allow_unauthenticated=True)
    for loopback in ("127.0.0.1:6379", "localhost:6379", "[::1]:6379"):
        authentication.check_cluster(loopback, allow_unauthenticated=False)


def test_cluster_is_asked_whether_it_wants_a_token_not_believed(fake_cluster, monkeypatch):
    assert authentication.ask(fake_cluster(None), "ours") == "open"
    guarded = fake_cluster("ours")
    assert authentication.ask(guarded, "ours") == "asks for a token"  # RAY_AUTH_MODE is not set: Ray would send none
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert authentication.ask(guarded, "ours") == "takes ours"
    assert authentication.ask(guarded, "another") == "asks for a token"
    assert authentication.ask("127.0.0.1:1", "ours", seconds=0.5) == "no answer"
    assert authentication.ask(fake_cluster(None), "ours") == "open"  # our token does not make it safe
    with pytest.raises(ConfigError, match="was not taken.*auth_token, mode 0600"):
        authentication.check_cluster(guarded, allow_unauthenticated=True)


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265", "head", "10.0.0.1:"])
def test_address_that_is_no_ray_head_is_refused_before_anything_is_sent(address):
    with pytest.raises(ConfigError, match="must be host:port"):
        authentication.check_cluster(address, allow_unauthenticated=True)


def test_refusal_comes_before_ray_connects(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was about to connect"))
    monkeypatch.setattr(authentication, "ask", lambda *_: "open")
    with pytest.raises(ConfigError, match="without a token"):
        connect.start_ray(Config.model_validate({"ray": {"address": "10.0.0.1:6379"}}), debug=False)


def test_auto_where_no_ray_runs_is_refused_in_one_sentence(monkeypatch):
    from ray._private import services

    def none_found(*_):
        raise ConnectionError("none")

    monkeypatch.setattr(services, "canonicalize_bootstrap_address", none_found)
    with pytest.raises(ConfigError, match="no Ray runs on this machine"):
        connect.start_ray(Config.model_validate({"ray": {"address": "auto"}}), debug=False)


def test_token_file_is_made_for_its_owner_alone_and_an_open_one_is_closed():
    authentication.keep_token_private()
    path = authentication.token_path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and re.fullmatch("[0-9a-f]{64}", path.read_text())
    before = path.read_text()
    path.chmod(0o644)
    authentication.keep_token_private()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.read_text() == before == authentication.token()


def test_private_ray_runs_no_dashboard(monkeypatch):
    import ray

    given = {}
    monkeypatch.setattr(ray, "init", lambda **arguments: given.update(arguments) or (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):
        connect.start_ray(Config(), debug=False)
    assert given["include_dashboard"] is False and given["address"] == "local"


def test_private_ray_that_is_late_ends_the_command_with_a_sentence(monkeypatch):
    import ray

    def late(**_):
        raise Exception("The current node timed out during startup. This could happen because ...")  # Ray's words

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ProcessDied, match="Ray did not start on this machine in 30 s"):
        connect.start_ray(Config(), debug=False)


@pytest.mark.parametrize("path", sorted((ROOT / "clusters").glob("*")), ids=lambda path: path.name)
def test_no_cluster_file_opens_the_dashboard_or_leaves_out_the_token(path):
    text = path.read_text()
    assert "0.0.0.0" not in text
    if "ray start" in text:
        assert "RAY_AUTH_MODE=token" in text
    if "kind: Ray" in text:
        spec = next(iter(yaml.safe_load_all(text)))["spec"]
        assert spec.get("rayClusterSpec", spec)["authOptions"] == {"mode": "token"}


def test_run_names_cannot_leave_the_storage_path():
    for name in ("../x", "a/b", "/etc/x", ".", "..", ".hidden", "a" * 65, "", "a\n", "~root", "a b"):
        with pytest.raises(ValidationError):
            Config.model_validate({"ray": {"run_name": name}})
    assert Config.model_validate({"ray": {"run_name": "run-1.b_2"}}).ray.run_name == "run-1.b_2"


UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "jsonpickle"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_package_unpickles_and_evaluates_nothing_that_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]
            assert not UNPICKLING & {name.split(".")[0] for name in names}
        if not isinstance(node, ast.Call):
            continue
        called, given = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
        assert called not in ("eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "yaml.full_load"), called
        assert given.get("shell", "False") == "False" and called != "os.system"
        assert given.get("allow_pickle", "False") == "False"
        assert called != "torch.load" or given.get("weights_only") == "True"


def test_remote_code_needs_the_commit_that_was_read():
    for revision in (None, "main", "v1.0", "abc123", "g" * 40):
        with pytest.raises(ValidationError, match="40-digit"):
            Config.model_validate({"model": {"trust_remote_code": True, "revision": revision}})
    assert Config.model_validate({"model": {"trust_remote_code": True, "revision": "a" * 40}}).model.trust_remote_code
    assert Config().model.trust_remote_code is False


def test_every_place_that_loads_from_transformers_passes_on_what_the_user_said_of_remote_code():
    """A literal True would run code that nobody asked for."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not isinstance(node.value, ast.Constant) or node.value.value is False, path


SECRETS = {
    "HF_TOKEN": "hf_x", "HUGGING_FACE_HUB_TOKEN": "x", "WANDB_API_KEY": "x", "RAY_AUTH_TOKEN": "x",
    "AWS_SECRET_ACCESS_KEY": "x", "NCCL_SECRET": "x", "HF_API_KEY": "x", "TRANSFORMERS_AUTH": "x",
    "https_proxy": "http://user:password@proxy:3128", "HF_ENDPOINT": "https://user:password@hub",
    "HF_NOTE": "hf_abcdefghijklmnopqrstuvwxyz",
}  # fmt: skip


def test_workers_get_what_is_on_the_list_and_no_secret():
    plain = {
        "NCCL_DEBUG": "INFO", "NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0", "HF_HOME": "/models/hub",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "8", "FI_PROVIDER": "efa",
        "https_proxy": "http://proxy:3128", "no_proxy": "localhost",
    }  # fmt: skip
    others = {"PATH": "/bin", "HOME": "/root", "LD_PRELOAD": "x", "CUDA_VISIBLE_DEVICES": "0", "PYTHONPATH": "/x"}
    assert environment.carried({**plain, **others}) == plain
    assert environment.carried({**SECRETS, **others}) == {}
    assert environment.kept_back(SECRETS) == [
        "HF_API_KEY", "HF_ENDPOINT", "HF_NOTE", "HF_TOKEN", "NCCL_SECRET", "TRANSFORMERS_AUTH", "https_proxy",
    ]  # fmt: skip


def test_what_a_job_sets_itself_is_not_told_to_ray_twice():
    job = '{"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"NCCL_DEBUG": "WARN"}}, "metadata": {}}'
    environ = {"NCCL_DEBUG": "WARN", "HF_HOME": "/hub", "OMP_NUM_THREADS": "1", environment.JOB_CONFIG: job}
    assert environment.carried(environ) == {"HF_HOME": "/hub"}


@pytest.mark.parametrize("key", ["ray.storage_path", "ray.address"])
def test_key_or_password_in_a_uri_is_refused_and_not_repeated(tmp_path, key):
    (tmp_path / "a.yaml").write_text("{}")
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "a.yaml", [f"{key}=s3://AKIACANARY:canary-secret@bucket/runs"])
    assert "canary-secret" not in str(refused.value) and "AKIACANARY" not in str(refused.value)
    assert "must hold no key or password" in str(refused.value)


def test_run_of_a_job_does_not_lie_in_the_upload_that_ray_deletes(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.open_folder("runs").path == str(tmp_path / "runs")
    monkeypatch.setenv(environment.JOB_CONFIG, "{}")
    assert storage.open_folder("runs").path == storage.open_folder("~/runs").path == str(tmp_path / "home" / "runs")
    assert storage.open_folder("/shared/runs").path == "/shared/runs"


def pins(name: str) -> dict[str, str]:
    found = re.findall(r"(?m)^([\w.-]+)==([^\s;\\]+)", (ROOT / name).read_text())
    return {name.lower().replace("_", "-").replace(".", "-"): version for name, version in found}


@pytest.mark.parametrize("name", ["requirements-hashed.txt", "requirements-torch-hashed.txt"])
def test_every_locked_package_has_hashes_and_the_version_that_the_tests_run_with(name):
    blocks = re.findall(r"(?m)^[\w.-]+==[^\n]*(?:\n +--hash=sha256:[0-9a-f]{64}[^\n]*)*", (ROOT / name).read_text())
    assert len(blocks) == len(pins(name)) and all("--hash=sha256:" in block for block in blocks)
    tested = pins("constraints.txt")
    assert [one for one, version in pins(name).items() if tested.get(one, version) != version] == []


def test_locked_packages_hold_all_that_the_package_asks_for():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *project["optional-dependencies"]["cluster"]]
    names = {re.match(r"[\w.-]+", one)[0].lower().replace("_", "-") for one in asked}
    assert names <= pins("requirements-hashed.txt").keys() | pins("requirements-torch-hashed.txt").keys()


def test_every_line_of_the_threat_model_names_tests_that_exist():
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ") and "`" in line]
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    defined = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(rows) >= 10 and all(re.search(r"`test_\w+`", row) for row in rows)
    assert named - defined == set()
    assert os.path.exists(ROOT / "SECURITY.md")
