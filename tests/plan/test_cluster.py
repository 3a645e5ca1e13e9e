"""Clusters: the catalogue, files, and every fault with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoshard.errors import ClusterFileError
from autoshard.plan.cluster import CATALOGUE, Cluster, catalogue

GOOD = """\
name: mixed
devices:
  fast: {kind: gpu, memory: 80e9, memory_bandwidth: 3e12, peak: {bfloat16: 1e15, float32: 6e13}, efficiency: {bfloat16: 0.7}, launch: 2e-6}
  slow: {kind: gpu, memory: 40e9, memory_bandwidth: 1e12, peak: {bfloat16: 3e14}, efficiency: {bfloat16: 0.8}, launch: 3e-6, reserved: 1e9}
ranks: [{device: fast, count: 4}, {device: slow, count: 8}]
levels:
  - {name: link, ranks: 4, bandwidth: 2e11, latency: 1e-5, contention: 0.1}
  - {name: net, bandwidth: 1e10, latency: 2e-5}
"""


@pytest.mark.parametrize("name", catalogue())
@pytest.mark.parametrize("count", [1, 3, 8, 72, 512])
def test_catalogue(name: str, count: int) -> None:
    cluster = Cluster.load(f"{name}x{count}")
    assert cluster.ranks == count and cluster.name == f"{name}x{count}"
    assert cluster.levels[-1].ranks >= count and all(level.ranks < count for level in cluster.levels[:-1])
    device = cluster.device
    assert 0 < device.usable <= device.memory and device is cluster.device_of(count - 1)
    assert all(0.3 < part <= 1 for _, part in device.efficiency)
    assert cluster == Cluster.load(f"{name} x{count}") and hash(cluster) == hash(Cluster.load(f"{name}x{count}"))


def test_catalogue_names_and_comments() -> None:
    assert catalogue() == ["a100", "b200", "cpu", "gb200", "h100", "h200", "l40s"]
    for name in catalogue():
        for line in (CATALOGUE / f"{name}.yaml").read_text().splitlines():
            constant = line.strip().startswith(
                ("memory", "bandwidth", "latency", "hop", "reduction", "floor", "contention", "launch", "units")
            )
            assert not constant or "#" in line, f"{name}: no source beside {line}"


@pytest.mark.parametrize(
    ("written", "meant"), [("cpu4", "cpux4"), ("h100-8", "h100x8"), ("8xH100", "h100x8"), ("h1008", "h100x8"), ("h10x8", "h100x8")]
)
def test_a_name_that_is_nearly_one(written: str, meant: str) -> None:
    with pytest.raises(ClusterFileError, match=f"did you mean {meant}\\?"):
        Cluster.load(written)


def test_local() -> None:
    two, one = Cluster.local(2), Cluster.local(1)
    assert two.ranks == 2 and two.device.kind == "cpu"
    assert two.device.memory == pytest.approx(one.device.memory / 2)
    assert two.device.peak_flops("float32") == pytest.approx(one.device.peak_flops("float32") / 2)


def test_mixed_devices(tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text(GOOD)
    cluster = Cluster.load(path)
    assert cluster == Cluster.load(str(path)) and cluster.ranks == 12
    assert [cluster.device_of(r).name for r in (0, 3, 4, 11)] == ["fast", "fast", "slow", "slow"]
    weakest = cluster.device
    assert weakest.name == "fast+slow" and weakest.usable == 39e9 and weakest.memory_bandwidth == 1e12 and weakest.launch == 3e-6
    assert weakest.peak == (("bfloat16", 3e14),) and weakest.matmul_part("bfloat16") == 0.7
    assert [level.ranks for level in cluster.levels] == [4, 12]
    assert cluster.subset(4).device.name == "fast" and [level.name for level in cluster.subset(4).levels] == ["link"]
    assert cluster.subset(5).ranks == 5


FAULTS = {
    "name: mixed": ("name: [1]", "1:7: expected text, found a list"),
    "memory: 80e9": ("memory: -1", "3:29: expected more than 0, found -1"),
    "kind: gpu, memory: 40e9": ("kind: tpu, memory: 40e9", "4:16: expected gpu or cpu, found 'tpu'"),
    "memory_bandwidth: 3e12, ": ("", "3:9: 'memory_bandwidth' is missing"),
    "memory_bandwidth: 3e12": ("memory_bandwidth: 3 TB/s", "expected a number, found text '3 TB/s'"),
    "launch: 2e-6": ("launch: 2e-6, lanch: 1", "unknown key 'lanch'"),
    "bfloat16: 0.7": ("bfloat16: 1.7", "expected more than 0 and at most 1, found 1.7"),
    "float32: 6e13": ("float32: true", "expected a number, found a truth value True"),
    "count: 4": ("count: 4.0", "5:31: expected a whole number, found 4.0"),
    "device: slow": ("device: slwo", "no device 'slwo'; expected one of fast, slow"),
    "ranks: 4,": ("", "7:5: 'ranks' is missing"),
    "name: net": ("name: net, ranks: 8", "8:24: the last level holds 8 ranks of 12"),
    "name: net,": ("name: net, ranks: 14,", "14 ranks aren't whole groups of 4"),
    "contention: 0.1": ("contention: 2", "at least 0 and at most 1, found 2"),
    ", count: 4": ("", "'count' is missing"),
    "latency: 2e-5": ("latency: .nan", "expected a number, found text '.nan'"),
    "levels:": ("levels: []\nlevels:", "key 'levels' a second time"),
}


@pytest.mark.parametrize("old", FAULTS)
def test_faults(old: str) -> None:
    new, message = FAULTS[old]
    assert old in GOOD
    with pytest.raises(ClusterFileError) as caught:
        Cluster.parse(GOOD.replace(old, new, 1), "c.yaml")
    assert message in str(caught.value) and "c.yaml:" in str(caught.value)


def test_every_fault_at_once() -> None:
    text = GOOD
    for old in ("name: mixed", "kind: gpu, memory: 40e9", "contention: 0.1", "count: 4"):
        text = text.replace(old, FAULTS[old][0], 1)
    with pytest.raises(ClusterFileError) as caught:
        Cluster.parse(text, "c.yaml")
    assert str(caught.value).startswith("4 faults in c.yaml")


@pytest.mark.parametrize(
    "text", ["", "3", "[]", "name: x", "devices: 1\nranks: 2\nlevels: 3\nname: {}", "ranks: [1]\nlevels: [1]\ndevices: {a: 1}"]
)
def test_other_shapes(text: str) -> None:
    with pytest.raises(ClusterFileError):
        Cluster.parse(text)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("h900x8", "no cluster 'h900'"),
        ("h100x0", "1 to"),
        ("h100x9999999", "1 to"),
        ("nowhere.yaml", "can't read"),
        ("", "can't read"),
        ("/", "can't read"),
    ],
)
def test_unreadable(source: str, message: str) -> None:
    with pytest.raises(ClusterFileError, match=message):
        Cluster.load(source)


def test_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterFileError, match="can't read"):
        Cluster.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b" " * (1 << 21))
    with pytest.raises(ClusterFileError, match="at most"):
        Cluster.load(tmp_path / "b.yaml")
