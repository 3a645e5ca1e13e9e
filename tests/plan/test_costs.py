"""Costs: against measured figures, monotone in every size, and sound at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoshard.plan.cluster import Cluster
from autoshard.plan.costs.collective import KINDS, contention, lines, seconds, spans
from autoshard.plan.costs.compute import matmul_seconds, memory_seconds, op_seconds
from autoshard.plan.costs.memory import StageMemory, activation_bytes, gradient_bytes, in_flight, optimizer_bytes
from autoshard.plan.schedules import build, parse

MIB = 2**20


def bus(cluster: Cluster, size: float, ranks: int) -> float:
    """GB/s as nccl-tests reports an all-reduce."""
    return 2 * (ranks - 1) / ranks * size / seconds(cluster, "all_reduce", size, ranks) / 1e9


# ---- collectives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mib", "measured"), [(16, 217), (256, 301), (1024, 331)])
def test_two_h200(mib: int, measured: float) -> None:
    assert bus(Cluster.load("h200x2"), mib * MIB, 2) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("size", [1024, 64 * 1024, MIB, 4 * MIB])
def test_two_h200_floor(size: int) -> None:
    assert 38e-6 * 0.85 <= seconds(Cluster.load("h200x2"), "all_reduce", size, 2) <= 47e-6 * 1.15


MEASURED = {  # all-reduce, MiB → µs (nccl-tests; dgxc-benchmarking, awsome-distributed-training and ml-engineering on GitHub)
    ("h100", 8): {1: 27.4, 4: 54.2, 16: 123.8, 64: 324.7, 256: 1112.5, 1024: 4029.4, 8192: 31307},
    ("h200", 8): {64: 339, 256: 1077, 1024: 4053, 4096: 15887},
    ("a100", 8): {64: 684.6, 256: 2420.6, 1024: 8203.9, 4096: 32136},
    ("h100", 16): {256: 1468, 1024: 4607, 8192: 33605},
    ("h200", 32): {4096: 22821},
}


@pytest.mark.parametrize(("name", "ranks"), MEASURED)
def test_published_curves(name: str, ranks: int) -> None:
    cluster = Cluster.load(f"{name}x{ranks}")
    for mib, micro in MEASURED[name, ranks].items():
        assert seconds(cluster, "all_reduce", mib * MIB, ranks) == pytest.approx(micro * 1e-6, rel=0.15), mib


def test_one_way_collectives_on_eight() -> None:
    cluster = Cluster.load("h200x8")
    for kind, measured in (("all_gather", 361.4), ("reduce_scatter", 362.9)):
        assert 7 / 8 * 2**34 / seconds(cluster, kind, 2**34, 8) / 1e9 == pytest.approx(measured, rel=0.05)


GROUPS = [(name, size, stride) for name in ("h100x64", "gb200x144", "cpux8", "h100x24") for size in (2, 3, 4, 8) for stride in (1, 2, 3, 8)]


@pytest.mark.parametrize("kind", KINDS)
def test_monotone_and_vectorised(kind: str) -> None:
    sizes = np.unique(np.concatenate([[0, 1, 100], np.logspace(1, 11, 300)]))
    for name, size, stride in GROUPS:
        cluster = Cluster.load(name)
        if size * stride > cluster.ranks:
            continue
        times = seconds(cluster, kind, sizes, size, stride)
        assert (np.diff(times) >= 0).all() and times[0] == 0 and times[1] > 0
        assert times[100] == pytest.approx(seconds(cluster, kind, float(sizes[100]), size, stride))


@pytest.mark.parametrize("name", ["h100x64", "h200x512", "gb200x144", "a100x64", "l40sx32", "cpux8"])
def test_physics_of_large_messages(name: str) -> None:
    """An all-reduce costs no less than either half of it, and groups that cross more of the network cost more."""
    cluster, size = Cluster.load(name), 1e9
    for ranks in (2, 4, 8):
        halves = {kind: seconds(cluster, kind, size, ranks) for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")}
        assert halves["all_gather"] == halves["reduce_scatter"] <= halves["all_reduce"] <= 2.01 * halves["all_gather"]
        assert halves["all_to_all"] <= halves["all_gather"] * 1.01
        if cluster.ranks >= 8 * ranks and len(cluster.levels) > 1 and cluster.levels[0].ranks == 8:
            assert seconds(cluster, "all_reduce", size, ranks, 8) > 1.5 * halves["all_reduce"]
    assert seconds(cluster, "all_reduce", size, cluster.ranks) >= 0.99 * seconds(cluster, "all_reduce", size, 2)


def test_one_rank_talks_to_nobody() -> None:
    cluster = Cluster.load("h100x8")
    assert seconds(cluster, "all_reduce", 1e9, 1) == 0 and not seconds(cluster, "all_gather", np.ones(3), 1).any()
    assert contention(cluster, 1) == 0 and contention(cluster, 8) > 0


def shape(name: str, size: int, stride: int) -> list[tuple[str, int, float]]:
    return [(level.name, inner, groups) for level, inner, groups in spans(Cluster.load(name), size, stride)]


def test_levels_of_a_group() -> None:
    assert shape("h100x64", 8, 1) == [("nvlink", 1, 8)]
    assert shape("h100x64", 64, 1) == [("nvlink", 1, 8), ("network", 8, 8)]
    assert shape("h100x64", 8, 8) == [("network", 1, 8)]
    assert shape("h100x64", 16, 4) == [("nvlink", 1, 2), ("network", 2, 8)]
    assert shape("h100x64", 4, 2) == [("nvlink", 1, 4)]
    # 6 doesn't divide 8: some groups straddle two nodes, with 2 members in one of them
    assert shape("h100x24", 6, 1) == [("nvlink", 1, 2), ("network", 2, 3)]
    assert shape("gb200x64", 64, 1) == [("nvlink", 1, 64)]


def test_more_ports_carry_more() -> None:
    cluster = Cluster.load("h100x64")
    assert (
        seconds(cluster, "all_gather", 1e9, 16, 1) < seconds(cluster, "all_gather", 1e9, 16, 4) < seconds(cluster, "all_gather", 1e9, 8, 8)
    )


def test_lines_are_the_lower_envelope() -> None:
    floor, found = lines(Cluster.load("h100x16"), "all_reduce", 16)
    assert floor > 0 and len(found) >= 2
    assert list(found) == sorted(found) and [each for _, each in found] == sorted((each for _, each in found), reverse=True)


# ---- computation ---------------------------------------------------------------------------------------------------

H100_BF16 = [  # measured TF/s with 8192 tokens: forward, dgrad, wgrad
    ((8192, 6144, 4096), 761), ((8192, 4096, 6144), 775), ((4096, 6144, 8192), 748),
    ((8192, 28672, 4096), 700), ((8192, 4096, 28672), 731), ((4096, 28672, 8192), 719), ((8192, 4096, 14336), 714),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "measured"), H100_BF16, ids=str)
def test_h100_matmuls(shape: tuple[int, int, int], measured: float) -> None:
    m, n, k = shape
    assert 2 * m * n * k / matmul_seconds(Cluster.load("h100x1").device, m, n, k) / 1e12 == pytest.approx(measured, rel=0.1)


def test_h200_matmul() -> None:
    assert matmul_seconds(Cluster.load("h200x1").device, 8192, 4096, 7168) == pytest.approx(0.595e-3, rel=0.1)


def test_six_layers_of_8b() -> None:
    """Forward and backward of six 8B layers at 8192 tokens: 92 ms of matmul, measured."""
    device = Cluster.load("h100x1").device
    total = 0.0
    for m, n, k in ((8192, 6144, 4096), (8192, 4096, 4096), (8192, 28672, 4096), (8192, 4096, 14336)):
        total += sum(matmul_seconds(device, *dims) for dims in ((m, n, k), (m, k, n), (k, n, m)))
    assert 6 * total == pytest.approx(92e-3, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "measured"),
    [((64, 24576, 1536), 289), ((64, 7168, 16384), 336), ((128, 4096, 7168), 533), ((4096, 4096, 7168), 1304), ((4096, 7168, 2048), 1025)],
)
def test_fp8_matmuls(shape: tuple[int, int, int], measured: float) -> None:
    """DeepGEMM's table on an H800, whose tensor cores are an H100's."""
    m, n, k = shape
    assert 2 * m * n * k / matmul_seconds(Cluster.load("h100x1").device, m, n, k, 1, "float8_e4m3fn") / 1e12 == pytest.approx(
        measured, rel=0.15
    )


@given(
    st.sampled_from(["h100", "a100", "l40s", "b200", "cpu"]), st.tuples(*[st.integers(1, 20000)] * 3), st.integers(1, 64), st.integers(0, 3)
)
@settings(max_examples=300, deadline=None)
def test_matmuls_are_monotone(name: str, shape: tuple[int, int, int], batch: int, which: int) -> None:
    device = Cluster.load(f"{name}x1").device
    sizes = [*shape, batch]
    grown = list(sizes)
    grown[which] += 1
    less, more = matmul_seconds(device, *sizes), matmul_seconds(device, *grown)
    assert less <= more * (1 + 1e-12)
    # never faster than the paper says
    assert less >= 2 * np.prod([float(s) for s in sizes]) / device.peak_flops("bfloat16")


def test_matmul_is_vectorised() -> None:
    device = Cluster.load("h100x1").device
    sizes = np.array([1, 100, 4096, 5000])
    many = matmul_seconds(device, sizes[:, None], sizes, 512)
    assert many.shape == (4, 4) and isinstance(matmul_seconds(device, 4, 4, 4), float)
    assert many[2, 3] == pytest.approx(matmul_seconds(device, 4096, 5000, 512))
    assert matmul_seconds(device, 0, 4, 4) == pytest.approx(device.launch, rel=1e-4)


def test_waves_are_quantised() -> None:
    device = Cluster.load("h100x1").device
    full, over = (matmul_seconds(device, 128 * rows, 256 * 12, 65536) for rows in (11, 12))  # 132 and 144 tiles on 132 units
    assert over > 1.15 * full


def test_ops() -> None:
    device = Cluster.load("h100x1").device
    assert memory_seconds(device, 3e9) == pytest.approx(1e-3, rel=0.01)
    assert memory_seconds(device, 0) == device.launch
    attention = op_seconds(device, 1e12, 1e6, "bfloat16", "attention_cudnn_forward")
    assert 1e12 / attention == pytest.approx(581e12, rel=0.02)
    assert op_seconds(device, 1e12, 1e6, "bfloat16", "attention_flash_forward") > 1.9 * attention
    assert op_seconds(device, 0, 3e9) == pytest.approx(1e-3, rel=0.01)
    assert op_seconds(device, np.array([0, 1e12]), np.array([0, 0])).shape == (2,)
    assert op_seconds(device, 1e12, 0, "int8") > op_seconds(device, 1e12, 0, "bfloat16")


# ---- memory --------------------------------------------------------------------------------------------------------


def test_optimizer_state() -> None:
    assert optimizer_bytes({"bfloat16": 2.0}) == 12 and optimizer_bytes({"float32": 4.0}) == 8 and optimizer_bytes({"float64": 8.0}) == 16
    assert optimizer_bytes({"bfloat16": 2.0, "float32": 4.0}) == 20
    assert optimizer_bytes({"float16": 2.0}, master=False) == 8 and optimizer_bytes({"float16": 2.0}, moments=0) == 4
    assert gradient_bytes({"bfloat16": 2.0}) == 2 and gradient_bytes({"bfloat16": 2.0}, "float32") == 4


def test_stage_memory_adds_up() -> None:
    stage = StageMemory(1, 2, 3, 4, 5)
    assert stage.total == pytest.approx(sum(stage.breakdown().values()))
    assert (stage + stage).total == pytest.approx(2 * stage.total)


def test_activations_follow_the_schedule() -> None:
    edges = [(0, 1), (1, 2), (2, 3)]
    for kind, expected in (("1f1b", [4, 3, 2, 1]), ("gpipe", [8, 8, 8, 8])):
        lists = build(kind, 4, 8, edges)
        assert [max(activation_bytes(actions, dict.fromkeys(range(4), 10.0))) for actions in lists] == [10 * n for n in expected]
        assert [in_flight(actions)[stage] for stage, actions in enumerate(lists)] == expected
    lists = build("1f1b", 2, 3, [(0, 1)])
    assert max(activation_bytes(lists[1], {1: 10.0}, received={1: 3.0}, working=5.0)) == 18
    assert activation_bytes(lists[1], {1: 10.0}, received={1: 3.0})[-1] == 0


def test_weight_halves_hold_less() -> None:
    actions = parse("0: P D F0.0 F0.1 I0.0 I0.1 W0.0 W0.1 G L U")[0]
    assert activation_bytes(actions, {0: 10.0}, kept={0: 4.0}) == [0, 0, 10, 20, 20, 14, 8, 4, 0, 0, 0]
    assert in_flight(actions) == {0: 2}
