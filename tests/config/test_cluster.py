"""The `[cluster]` table: RLinf's placement, and what of it a machine has."""

import pytest
from pydantic import ValidationError

from rlinf_core.contract.tables.cluster import ClusterConfig, check_world_size
from rlinf_core.errors import UserError
from rlinf_core.torchrun import Share, share_of_machine, visible_devices


def cluster(actor="all", **fields):
    return ClusterConfig(component_placement={"actor": actor}, **fields)


def two_nodes(actor="all"):
    return cluster(actor, num_nodes=2, rdzv_endpoint="node0:29500")


@pytest.mark.parametrize(
    ("placement", "ranks"),
    [
        ("all", None),
        ("0-3", (0, 1, 2, 3)),
        ("0,2,5-7", (0, 2, 5, 6, 7)),
        (" 4 - 5 , 1", (1, 4, 5)),
        ("3", (3,)),
        (3, (3,)),
        ("0-3:0-3", (0, 1, 2, 3)),
        ("0-1:0-1,3-5", (0, 1, 3, 4, 5)),
        ({"placement": "2"}, (2,)),
        ({"node_group": "cluster", "placement": "all"}, None),
    ],
)
def test_placements_are_read_as_rlinf_does(placement, ranks):
    assert cluster(placement).ranks == ranks


def test_everything_is_placed_by_default_and_keys_may_be_joined():
    assert ClusterConfig().ranks is None
    assert ClusterConfig(component_placement={" actor ": "0-1"}).ranks == (0, 1)
    assert ClusterConfig(component_placement={"actor,env,rollout": "0-1"}).ranks == (0, 1)
    with pytest.raises(ValidationError, match="'actor' is placed twice"):
        ClusterConfig(component_placement={"actor,actor": "0-1"})


@pytest.mark.parametrize(
    ("placement", "complaint"),
    [
        ("3-0", "invalid placement '3-0': write \"all\", a range"),
        ("some", "invalid placement 'some'"),
        ("0-1,all", "invalid placement '0-1,all'"),
        ("", "invalid placement ''"),
        ("-1", "invalid placement '-1'"),
        (True, "invalid placement True"),
        ([0, 1], r"invalid placement \[0, 1\]"),
        ("0-2,1", "names 1 twice"),
        ("0-3:0-7", "assigns process ranks .* Write '0-3'"),
        ("0-3:0-3,5:0", "assigns process ranks .* Write '0-3,5'"),
        ("0-99999999", "invalid placement"),
        ({"node_group": "a100", "placement": "0-3"}, r"there is no node group 'a100': describe it in \[\[cluster.node"),
        ({"node_group": "node", "placement": "0-3"}, "machines without regard to their accelerators"),
        ({"node_group": 3}, "3 names no node group"),
        ({"node_gruop": "a100"}, "node_gruop"),
        ({"node_group": "cluster", "placement": "3-0"}, "invalid placement '3-0'"),
    ],
)
def test_what_is_no_placement_is_told_what_is(placement, complaint):
    with pytest.raises(ValidationError, match=complaint):
        cluster(placement)


GROUPS = [
    {"label": "a100", "node_ranks": "0-1"},
    {"label": "h100", "node_ranks": 2},
    {"label": "old", "node_ranks": "all"},
]


def grouped(placed, **fields):
    """A cluster of three machines in groups."""
    fields = {"num_nodes": 3, "rdzv_endpoint": "node0:29500", "node_groups": GROUPS} | fields
    return cluster(placed, **fields)


@pytest.mark.parametrize(
    ("placed", "machines", "share"),
    [
        ({"node_group": "a100", "placement": "0-15"}, 2, Share(8)),
        ({"node_group": "a100"}, 2, Share(8)),
        ({"node_group": "a100", "placement": "0-3,8-11"}, 2, Share(4, (0, 1, 2, 3))),
        ({"node_group": "h100", "placement": "4-7"}, 1, Share(4, (4, 5, 6, 7))),
        ({"node_group": "a100, h100", "placement": "all"}, 3, Share(8)),
        ({"node_group": ["a100", "h100"], "placement": "all"}, 3, Share(8)),
        ({"node_group": "cluster", "placement": "0-23"}, 3, Share(8)),
    ],
)
def test_a_node_group_has_its_own_ranks_and_only_its_machines_train(placed, machines, share):
    config = grouped(placed)
    assert config.machines == machines
    assert share_of_machine(config, 8) == share
    assert ClusterConfig(**config.model_dump(round_trip=True)) == config


def test_a_group_of_one_machine_needs_no_rendezvous():
    assert grouped({"node_group": "h100"}, rdzv_endpoint="").machines == 1


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"node_groups": [{"label": "a", "node_ranks": "0-3"}]}, "'a' has machine 3, but num_nodes = 3"),
        ({"node_groups": [*GROUPS, GROUPS[0]]}, "the label 'a100' is there twice"),
        ({"node_groups": [{"label": "cluster", "node_ranks": 0}]}, "the label 'cluster' is RLinf's own"),
        ({"node_groups": {"a100": "0-1"}}, "must be a list of tables"),
        ({"node_groups": [{"label": "a", "node_ranks": 0, "ranks": 1}]}, "ranks"),
        (
            {"node_groups": [GROUPS[0] | {"env_configs": [], "hardware": {}}, GROUPS[1] | {"env_configs": []}]},
            "no use for env_configs of 'a100', hardware of 'a100', env_configs of 'h100': leave them out",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused(fields, complaint):
    with pytest.raises(ValidationError, match=complaint):
        grouped("all", **fields)


def test_groups_of_a_placement_are_there_and_apart():
    with pytest.raises(ValidationError, match="there is no node group 'a10'; did you mean 'a100'"):
        grouped({"node_group": "a10"})
    with pytest.raises(ValidationError, match="its node groups share machine 2"):
        grouped({"node_group": "h100,old"})
    with pytest.raises(
        ValidationError, match="component_placement has 1 processes: give every machine of the node group"
    ):
        grouped({"node_group": "a100", "placement": "0"})


def test_components_that_do_not_train_are_named_in_one_sentence():
    placed = {"actor,rollout": "0-3", "env": {"node_group": "cluster", "placement": "4-7"}}
    assert ClusterConfig(component_placement=placed).unused == (
        "cluster.component_placement: only 'actor' trains; nothing is started for 'rollout', 'env', which supervised "
        "fine-tuning does not have"
    )
    assert not ClusterConfig().unused
    with pytest.raises(ValidationError, match="places no 'actor' besides rollout, env"):
        ClusterConfig(component_placement={"rollout,env": "0-3"})


@pytest.mark.parametrize("table", [{}, "0-3"])
def test_a_placement_is_a_table_with_an_actor(table):
    with pytest.raises(ValidationError, match='actor = "all"'):
        ClusterConfig(component_placement=table)


def test_several_machines_need_a_place_to_meet_and_processes_for_each():
    with pytest.raises(ValidationError, match="num_nodes = 2 needs rdzv_endpoint: host:port"):
        ClusterConfig(num_nodes=2)
    assert ClusterConfig(num_nodes=2, launcher="ray").rdzv_endpoint == ""
    with pytest.raises(ValidationError, match="num_nodes = 2, but component_placement has 1 processes"):
        two_nodes("0")
    for endpoint in ("node0", "node0:", ":29500", "node0:0", "node0:port"):
        with pytest.raises(ValidationError, match="must be host:port"):
            ClusterConfig(rdzv_endpoint=endpoint)


@pytest.mark.parametrize(
    ("config", "devices", "share"),
    [
        (cluster(), 8, Share(8)),
        (cluster(), 0, Share(1)),
        (cluster("0-7"), 8, Share(8)),
        (cluster("2,5"), 8, Share(2, (2, 5))),
        (cluster("0-1"), 0, Share(2)),
        (two_nodes(), 8, Share(8)),
        (two_nodes("0-15"), 8, Share(8)),
        (two_nodes("0-3,8-11"), 8, Share(4, (0, 1, 2, 3))),
        (two_nodes("0-3"), 0, Share(2)),
    ],
)
def test_a_machine_has_its_share_of_the_placement(config, devices, share):
    assert share_of_machine(config, devices) == share


@pytest.mark.parametrize(
    ("config", "devices", "complaint"),
    [
        (cluster("6-8"), 8, r"names accelerator 8, but 1 x 8 are there \(0-7\)"),
        (cluster("1"), 1, r"names accelerator 1, but 1 x 1 are there \(0\)"),
        (cluster("2-3"), 0, r'no accelerators to choose from.*from 0: "0-1"'),
        (two_nodes("0-2"), 0, r'a multiple of the 2 machines, from 0: "0-1"'),
        (two_nodes("0-7"), 8, r"machine 0: \[0, 1, 2, 3, 4, 5, 6, 7\]; machine 1: none"),
        (two_nodes("0-3,8-9"), 8, r"machine 0: \[0, 1, 2, 3\]; machine 1: \[0, 1\]"),
    ],
)
def test_a_placement_that_does_not_fit_the_machines_is_refused(config, devices, complaint):
    with pytest.raises(UserError, match=complaint):
        share_of_machine(config, devices)


def test_some_of_the_visible_accelerators_stay_visible():
    assert visible_devices((1, 2), {}) == "1,2"
    assert visible_devices((1, 2), {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}) == "5,6"


def test_a_run_that_others_started_is_held_to_its_placement():
    check_world_size(cluster(), 5)
    check_world_size(cluster("0-3"), 4)
    check_world_size(two_nodes(), 16)
    with pytest.raises(UserError, match='actor = "0-3" } asks for 4 processes, but 2 were started'):
        check_world_size(cluster("0-3"), 2)
    with pytest.raises(UserError, match=r"cluster\.num_nodes = 2, but 3 processes were started"):
        check_world_size(two_nodes(), 3)
