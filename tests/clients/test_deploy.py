"""The examples under server/deploy parse, agree with themselves, and name flags, paths and figures of this build.

Not for whether a cluster accepts them.
"""

import configparser
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request

import pytest
import yaml
from conftest import ROOT, foretoken

DEPLOY = ROOT / "server" / "deploy"


@pytest.fixture(scope="module")
def manifests():
    found = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in found}


@pytest.fixture(scope="module")
def unit():
    class Unit(configparser.RawConfigParser):
        optionxform = staticmethod(str)

    unit = Unit(strict=False, delimiters="=")
    # systemd joins lines that end in a backslash.
    unit.read_string((DEPLOY / "foretoken.service").read_text().replace("\\\n", ""))
    return unit


def assert_known(words):
    usage = foretoken("serve", "--help")
    assert words[0] == "serve" and not words[1].startswith("-")
    flags = [word.split("=")[0] for word in words if word.startswith("--")]
    assert len(flags) > 4
    for flag in flags:
        assert re.search(rf"{flag}\b", usage), flag


def seconds(words, flag):
    joined = " ".join(words).replace("=", " ").split()
    return int(joined[joined.index(flag) + 1])


def test_manifests_agree_with_each_other(manifests):
    assert set(manifests) == {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"}
    spec = manifests["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert labels == spec["selector"]["matchLabels"] == manifests["Service"]["spec"]["selector"]
    assert labels == manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (port,) = container["ports"]
    assert manifests["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    target = manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifests["Deployment"]["metadata"]["name"])
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause + seconds(container["args"], "--drain-seconds")


def test_manifests_name_what_this_build_has(manifests, server):
    pod = manifests["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert_known(container["args"])
    assert f"--port={container['ports'][0]['containerPort']}" in container["args"]
    probes = [container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe")]
    for path in [*probes, pod["metadata"]["annotations"]["prometheus.io/path"]]:
        assert urllib.request.urlopen(server.root + path).status == 200
    figures = urllib.request.urlopen(server.root + "/metrics").read().decode()
    (metric,) = manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]
    for name in [metric["pods"]["metric"]["name"], "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"]:
        assert re.search(rf"^{name}\b", figures, re.M), name


def test_the_unit_names_what_this_build_has(unit):
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[0] == "/usr/local/bin/foretoken"
    assert_known(words[1:])
    assert int(unit["Service"]["TimeoutStopSec"]) > seconds(words, "--drain-seconds")
    assert unit["Service"]["NoNewPrivileges"] == unit["Service"]["DynamicUser"] == "yes"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path):
    # Its words alone: the program need not be installed here.
    text = (DEPLOY / "foretoken.service").read_text().replace("=/usr/local/bin/foretoken ", f"={sys.executable} ")
    copy = tmp_path / "foretoken.service"
    copy.write_text(text)
    found = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")
