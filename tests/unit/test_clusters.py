"""Each file in clusters/ against the schema or parser of the tool that reads it."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml

from qlora_ray.config import Config

ROOT = Path(__file__).parents[2]
CLUSTERS, BIN = ROOT / "clusters", Path(sys.executable).parent
RAY_UP, KUBERAY = ("aws", "gcp", "ssh"), ("kuberay-job", "kuberay-cluster")
# Fields of KubeRay 1.7's ray.io/v1. Its own schema (1 MB) is checked where KUBERAY_CRDS names the folder that holds it:
# ray-operator/config/crd/bases in github.com/ray-project/kuberay.
FIELDS = {
    "RayCluster": {"rayVersion", "authOptions", "gcsFaultToleranceOptions", "headGroupSpec", "workerGroupSpecs"},
    "RayJob": {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"},
}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def load(name: str) -> dict:
    return yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text())


def cluster_spec(document: dict) -> dict:
    return document["spec"].get("rayClusterSpec", document["spec"])


def groups(document: dict) -> list[dict]:
    spec = cluster_spec(document)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_takes_the_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    document = load(name)
    jsonschema.validate(document, schema)
    validate_config(prepare_config(copy.deepcopy(document)))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "setup_comands": []}, schema)


@pytest.mark.parametrize(("name", "spot"), [
    ("aws", lambda node: node.get("InstanceMarketOptions") == {"MarketType": "spot"}),
    ("gcp", lambda node: any(one.get("provisioningModel") == "SPOT" for one in node.get("scheduling", []))),
])  # fmt: skip
def test_workers_are_spot_and_the_head_is_not(name, spot):
    types = load(name)["available_node_types"]
    assert not spot(types["head"]["node_config"]) and spot(types["worker"]["node_config"])
    assert load(name)["head_node_type"] == "head" and "GPU" not in types["head"]["resources"]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_file_has_the_fields_of_its_kind_and_rays_own_reader_takes_it(name):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    document = load(name)
    assert document["apiVersion"] == "ray.io/v1" and document["spec"].keys() <= FIELDS[document["kind"]]
    assert cluster_spec(document).keys() <= FIELDS["RayCluster"]
    assert all(group.keys() <= GROUP_FIELDS for group in groups(document))
    read = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "x", "namespace": "x"}, "spec": cluster_spec(document)}
    )
    worker = read["available_node_types"]["gpu"]
    assert worker["resources"]["GPU"] == 1 and worker["min_workers"] == worker["max_workers"] == 2
    assert read["available_node_types"]["headgroup"]["resources"]["GPU"] == 0


@pytest.mark.parametrize("name", KUBERAY)
def test_pod_templates_are_pods_to_kubernetes(name):
    for group in groups(load(name)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.33", strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate({**pod, "spec": {**pod["spec"], "volums": []}}, "1.33", strict=True)


def test_shared_volume_is_a_claim_that_pods_mount_as_shared():
    claim = load("kuberay-storage")
    kubernetes_validate.validate(claim, "1.33", strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (group for name in KUBERAY for group in groups(load(name))):
        pod = group["template"]["spec"]
        volumes = {one["name"]: one for one in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        mounts = {one["name"]: one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"}


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's CRDs")
@pytest.mark.parametrize(
    ("name", "crd"), [("kuberay-job", "ray.io_rayjobs"), ("kuberay-cluster", "ray.io_rayclusters")]
)
def test_kuberay_file_fits_kuberays_own_schema(name, crd):
    definition = yaml.safe_load((Path(os.environ["KUBERAY_CRDS"]) / f"{crd}.yaml").read_text())
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # ObjectMeta, which CRDs leave open
    document = load(name)
    jsonschema.Draft7Validator(schema).validate(document)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate({**document, "spec": {**document["spec"], "entypoint": "x"}})


def strict(schema):
    """The schema as the API server applies it with strict field validation: what it does not name is refused."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if made.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if made.get("type") == "object" and "properties" in made and "x-kubernetes-preserve-unknown-fields" not in made:
        made.setdefault("additionalProperties", False)
    return made


def test_kueue_queues_both_kinds_and_the_head_of_the_lasting_one_keeps_its_state():
    for name in KUBERAY:
        assert load(name)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert load("kuberay-job")["spec"]["shutdownAfterJobFinishes"] is True  # Kueue refuses it otherwise
    assert load("kuberay-cluster")["spec"]["gcsFaultToleranceOptions"]["backend"] == "rocksdb"


def test_slurm_script_is_sound_shell_and_asks_slurm_in_its_own_words():
    script = CLUSTERS / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    checked = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    asked = re.findall(r"(?m)^#SBATCH --([a-z-]+)(?:=(\S+))?", script.read_text())
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "exclusive", "time", "signal",
             "requeue", "open-mode"}  # fmt: skip
    assert {name for name, _ in asked} <= known and dict(asked)["signal"].startswith("B:TERM@")


def test_dockerfile_passes_its_linter_and_every_file_it_copies_is_there():
    file = CLUSTERS / "Dockerfile"
    # Debian's point releases drop old versions, so apt packages are not pinned.
    checked = subprocess.run(
        [BIN / "hadolint", "--ignore", "DL3008", "--failure-threshold", "warning", file], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout
    for sources in re.findall(r"(?m)^COPY (.+) \S+$", file.read_text()):
        assert all((ROOT / source).exists() for source in sources.split())
    assert re.search(r"(?m)^USER (?!root)", file.read_text())


def test_every_file_pins_the_versions_of_this_package():
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for name in KUBERAY:
        assert cluster_spec(load(name))["rayVersion"] == ray.__version__
        images = {group["template"]["spec"]["containers"][0]["image"] for group in groups(load(name))}
        assert images == {f"REGISTRY/qlora-ray:{version}"}
    assert f"qlora-ray:{version}" in (CLUSTERS / "Dockerfile").read_text()


def test_every_setting_that_the_files_give_to_train_exists():
    texts = [path.read_text() for path in CLUSTERS.iterdir()]
    given = {key for text in texts for key in re.findall(r"\b((?:ray|training|data|model)\.[a-z_]+)=", text)}
    settings = Config().model_dump()
    assert given and all(key.split(".")[1] in settings[key.split(".")[0]] for key in given)


def test_readme_has_one_table_that_names_every_file():
    rows = [line for line in (CLUSTERS / "README.md").read_text().splitlines() if line.startswith("| ")]
    for path in CLUSTERS.iterdir():
        assert path.name == "README.md" or any(path.name in row for row in rows), path.name
