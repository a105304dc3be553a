"""A policy is read at once: a first view of few methods, and optional ones that are defined one by one."""

import inspect
import re
from collections import Counter
from typing import Literal

import pytest
from arm_policy import Arm, ArmPolicy, findings
from distributions import ROOT
from pydantic import BaseModel

from rlinf_core import PolicyConfig, UserError
from rlinf_core.contract.policy_options import OPTIONS
from rlinf_core.testing import check_policy

PAGE = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")


def public(part):
    return [name for name in vars(part) if not name.startswith(("_", "model_"))]


def test_the_first_view_has_eight_methods():
    methods = [name for name in public(PolicyConfig) if inspect.isfunction(vars(PolicyConfig)[name])]
    assert len(methods) <= 8
    assert PolicyConfig.__bases__ == (*OPTIONS, BaseModel)
    every = Counter(name for part in (PolicyConfig, *OPTIONS) for name in public(part))
    assert [name for name, count in every.items() if count > 1] == []


def test_the_page_lists_every_optional_method():
    rows = {row[1]: row[2] for row in re.finditer(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE)}
    for part in OPTIONS:
        assert sorted(re.findall(r"`(\w+)`", rows[part.__name__])) == sorted(public(part))


class Some(ArmPolicy):
    """Optional methods, one of an idea, and a class variable without a type."""

    validation_metrics = {"half": lambda means: means["loss"] / 2}
    export_formats = ()

    def useful_flops(self, batch):
        return super().useful_flops(batch) or 7.0

    def published_name(self, name):
        return f"net.{name}"

    def check_files(self):
        super().check_files()


def test_optional_methods_are_defined_one_by_one(tmp_path):
    some = Some(weights=str(tmp_path))
    assert (some.useful_flops({}), some.largest_sample(()), some.published_parts("a")) == (7.0, None, {})
    assert some.validation_metrics["half"]({"loss": 2.0}) == 1.0
    some.check_files()
    with pytest.raises(UserError, match=r"policy\.weights: there is no file or folder nowhere"):
        Some(weights="nowhere").check_files()
    assert [*Some.model_fields] == ["type", "weights", "lora", "horizon"]
    assert isinstance(some.build_to_count(), Arm)


def test_what_a_policy_lacks_is_one_message():
    class Bare(PolicyConfig):
        type: Literal["bare"] = "bare"

    with pytest.raises(UserError) as caught:
        Bare().build()
    where = f"{__name__}.{Bare.__qualname__}"
    assert str(caught.value) == f"the policy 'bare' has no build(), so it cannot be trained: define it in {where}"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("describes", "describe"), ("useful_flop", "useful_flops"), ("larger_is_beter", "larger_is_better")],
)
def test_a_name_that_is_never_called_is_a_warning(monkeypatch, name, meant):
    monkeypatch.setattr(ArmPolicy, name, lambda self, samples: {}, raising=False)
    with pytest.warns(UserWarning, match=f"ArmPolicy: core does not use {name}; is it meant to be {meant}?"):
        report = check_policy(ArmPolicy())
    assert f"  warning: core does not use {name}; is it meant to be {meant}?" in str(report)


def test_a_helper_beside_the_method_is_no_mistake(monkeypatch, recwarn):
    monkeypatch.setattr(ArmPolicy, "published_names", lambda self: {}, raising=False)
    monkeypatch.setattr(ArmPolicy, "published_name", lambda self, name: name, raising=False)
    assert check_policy(ArmPolicy()).warnings == ()


@pytest.mark.parametrize(
    ("name", "wrong", "finding"),
    [
        (
            "illustrate",
            lambda self, sample: None,
            "illustrate(sample, draws) is what core uses; found (sample)",
        ),
        (
            "validation_metrics",
            lambda self: {},
            "validation_metrics, a value, is what core uses; found a method",
        ),
        (
            "export_formats",
            ("other",),
            "export_formats and export are both defined, or neither; found only export_formats",
        ),
    ],
)
def test_a_form_that_core_cannot_use_is_found(monkeypatch, name, wrong, finding):
    monkeypatch.setattr(ArmPolicy, name, wrong, raising=False)
    assert finding in findings(check_policy, ArmPolicy())
