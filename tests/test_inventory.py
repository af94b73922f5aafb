"""What nodes have, and which server could ever run where."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sweep.errors import ResourceError
from sweep.planning.config import Device, Model
from sweep.planning.plan import ServerPlan
from sweep.running.inventory import Need, Node, Places, require, shortages


def node(name: str, gpus: float, **more: object) -> Node:
    return replace(Node(name=name, gpus=gpus, cpu_servers=1, evaluators=1), **more)  # type: ignore[arg-type]


def plans(*needs: tuple[str, Device, float]) -> dict[str, ServerPlan]:
    return {
        name: ServerPlan(
            name=name,
            model=Model(path="org/m", device=device),
            revision=None,
            adapters={name: None},
            gpus=gpus,
            replicas=1,
        )
        for name, device, gpus in needs
    }


def test_a_server_that_someone_else_runs_needs_no_gpu() -> None:
    model = Model(url="http://gpu-box:8000", tokenizer="org/m")
    theirs = ServerPlan(name="m", model=model, revision=None, adapters={"m": None}, gpus=0, replicas=1)
    require({"m": theirs}, [node("a", 0)])
    require({"m": replace(theirs, gpus=4)}, [node("a", 0)])


@pytest.mark.parametrize(
    ("servers", "there"),
    [
        (plans(("a", Device.GPU, 1), ("b", Device.GPU, 2)), [node("a", 2)]),
        (plans(("a", Device.CPU, 1)), [node("a", 0)]),
        (plans(("a", Device.AUTO, 4)), [node("a", 0)]),
        (plans(("a", Device.GPU, 0.5)), [node("a", 1)]),
        (plans(("a", Device.GPU, 4)), [node("a", 1), node("b", 4)]),
    ],
)
def test_what_fits_on_one_node_passes(servers: dict[str, ServerPlan], there: list[Node]) -> None:
    require(servers, there)


def test_a_server_of_several_nodes_needs_them_all_and_their_gpus() -> None:
    (plain,) = plans(("a", Device.AUTO, 8)).values()
    servers = {"a": replace(plain, model=replace(plain.model, nodes=2))}
    require(servers, [node("x", 8), node("y", 8)])
    with pytest.raises(ResourceError, match="a needs 8 GPUs on each of 2 nodes; 1 node has so many"):
        require(servers, [node("x", 8), node("y", 2)])
    with pytest.raises(ResourceError, match="a needs 8 GPUs on each of 2 nodes; there is none here"):
        require(servers, [node("x", 0), node("y", 0)])


def test_everything_that_can_never_fit_is_named_at_once() -> None:
    servers = plans(("a", Device.GPU, 1), ("b", Device.GPU, 4), ("c", Device.AUTO, 8), ("d", Device.CPU, 1))
    with pytest.raises(ResourceError) as caught:
        require(servers, [node("x", 2), node("y", 2)])
    assert "b needs 4 GPUs on one node; c needs 8 GPUs on one node; the largest node has 2. Run" in str(caught.value)
    with pytest.raises(ResourceError, match="a needs 1 GPU on one node; b needs 4 GPUs on one node; there is none"):
        require(servers, [node("x", 0)])


HOLDS = {"weights": frozenset({"w"})}
H100, A100 = {"gpu_type": "H100", "gpu_memory_gb": 80.0}, {"gpu_type": "A100-40G", "gpu_memory_gb": 40.0}


@pytest.mark.parametrize(
    ("model", "there", "reason"),
    [
        ({"gpu_type": "h100"}, [node("a", 8, **H100)], None),
        ({"gpu_type": "H200"}, [node("a", 8, **H100), node("b", 8, **H100), node("c", 2)],
         "m needs 4 GPUs of type H200 on one node; the cluster has 2 nodes of 8 H100 (80 GB), 1 node of 2 GPUs"),
        ({"gpu_type": "H200"}, [node("a", 8)], None),
        ({"gpu_memory_gb": 60.0}, [node("a", 8, **A100)],
         "m needs 4 GPUs with 60 GB on one node; the cluster has 1 node of 8 A100-40G (40 GB)"),
        ({"gpu_memory_gb": 60.0}, [node("a", 8)], None),
        ({"nodes": 2}, [node("a", 8), node("b", 8)], None),
        ({"nodes": 2}, [node("a", 8), node("b", 2)], "m needs 4 GPUs on each of 2 nodes; 1 node has so many"),
        ({"nodes": 3}, [node("a", 8), node("b", 4)], "m needs 4 GPUs on each of 3 nodes; 2 nodes have so many"),
        ({"device": Device.CPU, "gpu_type": "H100"}, [node("a", 0)], None),
        ({"device": Device.CPU}, [node("a", 8, cpu_servers=0)],
         "m needs a place for a CPU server; no node has one"),
    ],
)  # fmt: skip
def test_what_a_model_asks_of_its_gpus_is_held_against_each_node(
    model: dict[str, object], there: list[Node], reason: str | None
) -> None:
    (plan,) = plans(("m", Device.GPU, 4)).values()
    settings = replace(plan.model, **model)  # type: ignore[arg-type]
    assert shortages({"m": replace(plan, model=settings)}, there) == ([] if reason is None else [reason])


# Placement


@pytest.mark.parametrize(
    ("nodes", "taken", "need", "found"),
    [
        ([node("a", 8), node("b", 4)], [], Need(gpus=2), ("b",)),
        ([node("a", 8), node("b", 8)], [("b", Need(gpus=1))], Need(gpus=1), ("b",)),
        ([node("a", 8), node("b", 8)], [("b", Need(gpus=1))], Need(gpus=8), ("a",)),
        ([node("a", 8), node("b", 8, **HOLDS)], [("a", Need(gpus=1))], Need(gpus=1, weights="w"), ("b",)),
        ([node("a", 2), node("b", 2)], [("b", Need(gpus=0.5))], Need(gpus=0.5), ("b",)),
        ([node("a", 2)], [("a", Need(gpus=0.5)), ("a", Need(gpus=0.7))], Need(gpus=0.4), ("a",)),
        ([node("a", 2)], [("a", Need(gpus=0.5)), ("a", Need(gpus=0.7))], Need(gpus=0.6), ()),
        ([node("a", 2)], [("a", Need(gpus=0.5))], Need(gpus=2), ()),
        ([node("a", 8, **A100), node("b", 8, **H100)], [], Need(gpus=1, gpu_type="H100"), ("b",)),
        ([node("a", 8), node("b", 8), node("c", 8)], [("a", Need(gpus=4))], Need(gpus=8, nodes=2), ("b", "c")),
        ([node("a", 8), node("b", 8)], [("a", Need(gpus=4))], Need(gpus=8, nodes=2), ()),
        ([node("a", 0), node("b", 0)], [("a", Need())], Need(), ("b",)),
        ([node("a", 0)], [("a", Need())], Need(), ()),
    ],
    ids=[
        "the smallest that holds it",
        "the fullest",
        "which leaves others whole",
        "the weights are there",
        "a fraction beside another",
        "in the GPU with room for it",
        "not in what two GPUs have left",
        "a shared GPU is not whole",
        "the type asked for",
        "several nodes",
        "not enough of them",
        "a CPU slot",
        "no slot left",
    ],
)  # fmt: skip
def test_a_server_goes_where_it_leaves_the_least_unused(
    nodes: list[Node], taken: list[tuple[str, Need]], need: Need, found: tuple[str, ...]
) -> None:
    places = Places(nodes)
    for number, (name, need_there) in enumerate(taken):
        places.take(f"{number}", need_there, [name])
    assert places.find(need) == found


NEEDS = st.builds(Need, gpus=st.sampled_from([0, 0.1, 0.3, 0.5, 1, 2, 4]), nodes=st.integers(1, 2))


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=4),
    st.lists(st.tuples(NEEDS, st.booleans()), max_size=30),
)
def test_no_node_ever_holds_more_than_it_has_and_all_that_is_given_back_is_free_again(
    sizes: list[tuple[int, int]], asked: list[tuple[Need, bool]]
) -> None:
    places = Places(node(f"n{n}", gpus, cpu_servers=slots) for n, (gpus, slots) in enumerate(sizes))
    empty = places.copy()
    holding: dict[str, tuple[Need, tuple[str, ...]]] = {}
    for number, (need, leaves) in enumerate(asked):
        if nodes := places.find(need):
            places.take(f"{number}", need, nodes)
            holding[f"{number}"] = (need, nodes)
        if leaves and holding:
            places.give_back(next(iter(holding)))
            del holding[next(iter(holding))]
        used: dict[tuple[str, int], float] = {}
        slots = dict.fromkeys((f"n{n}" for n in range(len(sizes))), 0)
        for holder, (each, there) in holding.items():
            held = places.held(holder)
            assert [name for name, _ in held] == list(there)
            assert len(set(there)) == each.nodes
            for name, gpus in held:
                slots[name] += not gpus
                assert len(gpus) == (each.gpus if each.gpus >= 1 else each.gpus > 0)
                for gpu in gpus:
                    used[name, gpu] = used.get((name, gpu), 0) + min(1, each.gpus)
        assert all(share <= 1 + 1e-4 for share in used.values())
        assert all(slots[f"n{n}"] <= most for n, (_, most) in enumerate(sizes))
    for holder in holding:
        places.give_back(holder)
    assert abs(places.free_gpus - empty.free_gpus) < 1e-6
    assert places.free_slots == empty.free_slots
    for size in (1, 2, 4):
        assert places.find(Need(gpus=size)) == empty.find(Need(gpus=size))
