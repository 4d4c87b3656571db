# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from qcompiler import report, report_charts, report_html, svg
from qcompiler.plan import FLOAT_THERE, NO_WEIGHTS


@pytest.fixture
def figures() -> dict[str, Any]:
    nodes = [
        {
            "name": f"block{i}.conv",
            "ops": ["qconv", "relu"],
            "nodes": [f"n{i}"],
            "precision": "fp32" if i == 2 else "w8a8",
            "latency_ms": 0.1 * (i + 1),
        }
        for i in range(4)
    ]
    return {
        "model": "models/net.onnx",
        "artifact": "out/net.qcm",
        "target": "x86-avx2",
        "precision": {
            "n0": {"precision": "w8a8", "reason": "asked for"},
            "n1": {"precision": "w8a8", "reason": "asked for"},
            "n2": {"precision": "fp32", "reason": "no integer form of <Erf>"},
            "n3": {"precision": "w8a8", "reason": "asked for"},
        },
        "metric": {"name": "top1", "float": 0.9, "compiled": 0.896, "drop": 0.4},
        "latency_ms": {"compiled": 1.0, "float": 2.5},
        "size_bytes": {"artifact": 250_000, "parameters": 200_000, "model": 1_000_000},
        "nodes": nodes,
        "budget": {"max_drop": 1.0, "kept": True, "problems": []},
        "versions": {"qcompiler": "0.1.0"},
        "digests": {"model": "ab" * 32},
        "seconds": {"total": 3.5, "passes": {"calibrate": 1.25}},
    }


class Collector(HTMLParser):
    """Collects tags, attributes and text, and checks that tags nest."""

    VOID = ("meta", "br", "hr", "img", "input", "link", "path", "use", "rect", "circle", "stop")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(page: str) -> Collector:
    collector = Collector()
    collector.feed(page)
    collector.close()
    return collector


def test_comparison_says_what_changed_and_whether_it_is_good(figures: dict[str, Any]) -> None:
    accuracy, size, latency = report.comparison(figures)
    assert (accuracy.label, accuracy.before_text, accuracy.after_text) == (
        "top1",
        "90.00 %",
        "89.60 %",
    )
    assert accuracy.change_text == "-0.40 points"
    assert accuracy.good is True  # within the budget of one point
    assert (size.before_text, size.after_text) == ("1 MB", "250 kB")
    assert size.change_text == "4.00x smaller"
    assert (latency.change_text, latency.good) == ("2.50x faster", True)


def test_comparison_names_a_slower_and_larger_result(figures: dict[str, Any]) -> None:
    figures["latency_ms"] = {"compiled": 3.0, "float": 1.5}
    figures["size_bytes"] = {"artifact": 2000, "model": 1000}
    _, size, latency = report.comparison(figures)
    assert (size.change_text, size.good) == ("2.00x larger", False)
    assert (latency.change_text, latency.good) == ("2.00x slower", False)


def test_a_drop_over_the_budget_is_bad(figures: dict[str, Any]) -> None:
    figures["budget"] = {"max_drop": 0.1}
    assert report.comparison(figures)[0].good is False


def test_for_an_error_metric_more_is_worse(figures: dict[str, Any]) -> None:
    figures["metric"] = {"name": "mse", "float": 0.0, "compiled": 0.25, "drop": 0.25}
    row = report.comparison(figures)[0]
    assert row.change_text == "+0.25"
    assert (row.before_text, row.after_text) == ("0", "0.25")


@pytest.mark.parametrize("absent", [None, {}, {"float": None, "compiled": None}])
def test_what_was_not_measured_is_not_shown_as_zero(figures: dict[str, Any], absent: Any) -> None:
    figures["metric"] = absent
    figures["latency_ms"] = absent
    assert [row.label for row in report.comparison(figures)] == ["size"]
    page = report.to_html(figures)
    assert "Accuracy was not measured; Latency was not measured." in page


def test_half_measured_latency_has_no_factor(figures: dict[str, Any]) -> None:
    figures["latency_ms"] = {"compiled": 1.0, "float": None}
    row = report.comparison(figures)[2]
    assert (row.before_text, row.change_text, row.good) == ("–", "–", None)
    assert "1 ms" in report.to_html(figures)


def test_parts_of_the_size_and_the_way_of_measuring(figures: dict[str, Any]) -> None:
    assert report.size_parts(figures) == [("parameters", "200 kB")]
    assert report.latency_caption(figures) is None
    figures["latency_ms"].update(threads=2, float_runner="onnxruntime")
    caption = "latency: float in ONNX Runtime, 2 threads, medians of interleaved runs"
    assert report.latency_caption(figures) == caption
    page = report.to_html(figures)
    assert caption in page
    assert "parameters" in page
    assert "200 kB" in page
    figures["latency_ms"] = {"compiled": None, "float": None, "threads": 1}
    assert report.latency_caption(figures) is None


def test_precision_counts_and_fallbacks(figures: dict[str, Any]) -> None:
    assert report.precision_counts(figures) == {"w8a8": 3, "fp32": 1}
    assert report.fallbacks(figures) == [("n2", "fp32: no integer form of <Erf>")]


def test_fallbacks_are_grouped_by_their_reason(figures: dict[str, Any]) -> None:
    figures["precision"] |= {
        f"e{i}": {"precision": "fp32", "reason": "operator has no integer form: einsum"}
        for i in range(5)
    }
    assert report.fallback_lines(figures) == [
        "fp32: operator has no integer form: einsum (e0, e1, e2 and 2 more)",
        "fp32: no integer form of <Erf> (n2)",
    ]


def test_what_is_float_by_what_was_asked_for_is_no_fallback(figures: dict[str, Any]) -> None:
    figures["precision"] = {
        "product": {"precision": "w4", "reason": "weights held in int4 by groups"},
        "half": {"precision": "fp16", "reason": "weights held in float16"},
        "first": {"precision": "fp32", "reason": "convolutions of several groups keep float"},
        "relu": {"precision": "fp32", "reason": f"{NO_WEIGHTS}: relu"},
        "add": {"precision": "fp32", "reason": FLOAT_THERE},
    }
    assert report.fallback_lines(figures) == [
        "fp32: convolutions of several groups keep float (first)"
    ]


def test_an_all_float_plan_has_no_fallbacks(figures: dict[str, Any]) -> None:
    figures["precision"] = {"n0": {"precision": "fp32", "reason": "asked for"}}
    assert report.fallbacks(figures) == []


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"precision": "w8a8", "reason": "r"}, ("w8a8", "r")),
        ({"precision": "w8a8"}, ("w8a8", "")),
        (("w8a8", "r"), ("w8a8", "r")),
        ("w8a8", ("w8a8", "")),
    ],
)
def test_precision_of_every_form(entry: object, expected: tuple[str, str]) -> None:
    assert report.precision_of(entry) == expected


def test_json_round_trips_and_has_no_nan(figures: dict[str, Any]) -> None:
    figures["latency_ms"] = {"compiled": np.float32(1.5), "float": math.nan}
    figures["nodes"] = ({"name": "a", "latency_ms": math.inf, "macs": np.int64(7)},)
    text = report.to_json(figures)
    read = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert read["latency_ms"] == {"compiled": 1.5, "float": None}
    assert read["nodes"] == [{"name": "a", "latency_ms": None, "macs": 7}]
    assert text.endswith(b"\n")


def test_page_is_one_file_that_loads_nothing(figures: dict[str, Any]) -> None:
    page = report.to_html(figures)
    found = parse(page)
    assert not {"link", "img", "iframe", "object", "audio", "video"} & set(found.tags)
    assert "default-src 'none'" in html.unescape(page)
    loads = [v for name, v in found.attributes if name in ("src", "href", "xlink:href")]
    assert all(value.startswith("#") for value in loads)
    assert "@import" not in page
    assert "url(http" not in page


def test_page_shows_every_node_with_its_reason(figures: dict[str, Any]) -> None:
    text = " ".join(parse(report.to_html(figures)).text)
    for node, entry in figures["precision"].items():
        assert node in text
        assert entry["reason"] in text
    for region in figures["nodes"]:
        assert region["name"] in text
    assert "Budget kept" in text
    assert "drop at most 1" in text
    assert "passes: calibrate" in text


def test_page_shows_the_speed_of_each_region(figures: dict[str, Any]) -> None:
    figures["nodes"][0].update(macs=5_000_000, latency_ms=0.1)
    assert "50.0" in parse(report.to_html(figures)).text


def test_page_says_that_a_budget_is_not_kept(figures: dict[str, Any]) -> None:
    figures["budget"] = {"max_drop": 0.1, "kept": False, "problems": ["drops by 0.4 & more"]}
    page = report.to_html(figures)
    assert "Budget not kept" in page
    assert "drops by 0.4 &amp; more" in page


def test_names_from_the_model_are_escaped_everywhere(figures: dict[str, Any]) -> None:
    evil = "<script>alert('x')</script>$\\frac{1}$&\"'"
    figures["model"] = evil
    figures["target"] = evil
    figures["precision"][evil] = {"precision": evil, "reason": evil}
    figures["nodes"][0].update(name=evil, ops=[evil], precision=evil)
    figures["versions"] = {evil: evil}
    figures["notes"] = [evil]
    page = report.to_html(figures)
    # The figures and our own script, which the policy of the page allows by its digest.
    assert parse(page).tags.count("script") == page.count("<script") == 2
    assert page.count("alert") == page.count("\\u003cscript>alert") + page.count(
        "&lt;script&gt;alert"
    )


def test_the_policy_allows_the_one_script_and_nothing_else(figures: dict[str, Any]) -> None:
    page = report.to_html(figures)
    policy = dict(p.split(" ", 1) for p in report_html.POLICY.split("; "))
    script = page[page.rindex("<script>") + 8 : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy["script-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert html.escape(report_html.POLICY, quote=True) in page


def test_the_page_holds_its_figures(figures: dict[str, Any]) -> None:
    figures["notes"] = ["</script><script>alert(1)</script>"]
    page = report.to_html(figures)
    start = page.index('id="figures">') + len('id="figures">')
    held = json.loads(page[start : page.index("</script>", start)])
    assert held == json.loads(report.to_json(figures))


def test_page_with_nothing_but_a_target() -> None:
    page = report.to_html({"target": "reference"})
    assert "reference" in page
    assert "No budget was given" in page


def test_page_is_the_same_for_the_same_figures(figures: dict[str, Any]) -> None:
    assert report.to_html(figures) == report.to_html(figures)


def test_ids_in_the_page_are_unique(figures: dict[str, Any]) -> None:
    ids = [v for name, v in parse(report.to_html(figures)).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_the_chart_leaves_out_the_long_tail_and_says_so(figures: dict[str, Any]) -> None:
    figures["nodes"] = [
        {"name": f"r{i}", "ops": ["qconv"], "precision": "w8a8", "latency_ms": 1.0}
        for i in range(60)
    ]
    page = report.to_html(figures)
    assert "35 more regions take 58 % of the time" in page
    assert "All 60 regions" in page


# ------------------------------------------------------------------------------- the assignment


def option(latency: float, drop: float | None) -> dict[str, Any]:
    return {"latency_us": latency, "loss": (drop or 0) / 50, "drop": drop, "size_bytes": 10}


@pytest.fixture
def assigned(figures: dict[str, Any]) -> dict[str, Any]:
    front = [
        {"drop": d, "loss": d / 50, "latency_ms": ms, "size_bytes": 1e6, "counts": {"w8a8": 3},
         "chosen": ms == 1.2, "measured_drop": 0.8 if ms == 1.2 else None,
         "measured_latency_ms": 1.25 if ms == 1.2 else None}
        for ms, d in ((1.0, 3.0), (1.1, 1.5), (1.2, 0.7), (1.5, 0.1))
    ]  # fmt: skip
    product = {
        "precision": "w8a8", "reason": "w4a8 would save 3.1 us", "op": "conv", "region": "n0",
        "options": {"fp32": option(80.0, 0.0), "w8a8": option(20.0, 0.04),
                    "w4a8": option(16.0, 0.5)},
        "latency_us": 20.0, "measured_us": 21.0, "gained_us": 60.0, "loss": 0.0008, "cost": 0.04,
        "blocked_by": "max_drop",
        "next_step": {"precision": "w4a8", "saves_us": 4.0, "loss": 0.01, "cost": 0.5,
                      "over": {"max_drop": {"by": 0.3, "unit": "points"}}, "tied": []},
    }  # fmt: skip
    follower = {"precision": "w8a8", "reason": "joins the kernel before it", "op": "relu",
                "region": "n0", "options": {}, "next_step": None}  # fmt: skip
    figures["assignment"] = {
        "format": 1,
        "statement": "the least latency with top1 at most 1 point below float",
        "budget": {"max_drop": 1.0, "max_latency_ms": None, "max_size_mb": None},
        "metric": "top1",
        "loss_unit": "nat",
        "infeasible": None,
        "predicted": {"latency_ms": 1.2, "drop": 0.7, "loss": 0.014},
        "measured": {"latency_ms": 1.25, "drop": 0.8, "loss": 0.016},
        "front": front,
        "uniform": {"fp32": {"latency_ms": 4.0, "loss": 0.0, "drop": 0.0},
                    "w8a8": {"latency_ms": 1.6, "loss": 0.004, "drop": 0.2}},
        "nodes": {"n0": product, "relu": follower},
        "binding": {"any_of": [["max_drop"]], "step": None, "sentence": "max_drop binds"},
        "limits": {
            "max_drop": {"binds": True, "step": {"saves_us": 6.2},
                         "sentence": "0.12 points more of max_drop would save 6.2 us"},
            "max_size_mb": {"binds": False, "step": None, "sentence": "it would buy nothing"},
        },
        "rounds": [{"round": 1, "predicted": {"latency_ms": 1.1}, "measured": {"latency_ms": 1.2},
                    "kept": False, "counts": {"w8a8": 3}, "learned": "losses add up to 1.45"}],
    }  # fmt: skip
    return figures


def test_the_assignment_is_shown_with_its_sentences(assigned: dict[str, Any]) -> None:
    page = report.to_html(assigned)
    text = " ".join(parse(page).text)
    for sentence in (
        "Asked for: the least latency with top1 at most 1 point below float.",
        "latency 1.2 predicted, 1.25 ms measured; drop 0.7 predicted, 0.8 points measured",
        "max_drop binds.",
        "0.12 points more of max_drop would save 6.2 us.",
        "max_drop +0.3 points",
        "1 joint models that were built and evaluated",
        "losses add up to 1.45",
        "saves 4 µs, costs 0.5",
    ):
        assert sentence in text
    for chart in ("pareto", "network", "cost", "latency"):
        assert f'id="chart-{chart}"' in page


def test_the_plan_in_a_line_each(assigned: dict[str, Any]) -> None:
    assert report.plan_lines(assigned) == [
        "Plan: the least latency with top1 at most 1 point below float",
        "max_drop binds",
        "0.12 points more of max_drop would save 6.2 us",
    ]
    assert report.plan_lines({"assignment": None}) == []


def test_an_infeasible_budget_is_said(assigned: dict[str, Any]) -> None:
    assigned["assignment"].update(
        infeasible={"message": "at least 2 points"},
        binding={"any_of": [], "step": None, "sentence": "no limit binds: nothing is faster"},
    )
    page = report.to_html(assigned)
    assert "Infeasible: at least 2 points" in page
    assert "No limit binds: nothing is faster." in page


def test_without_a_metric_the_front_shows_the_loss(assigned: dict[str, Any]) -> None:
    for point in assigned["assignment"]["front"]:
        point["drop"] = None
    for n in assigned["assignment"]["nodes"].values():
        for o in n["options"].values():
            o["drop"] = None
    page = report.to_html(assigned)
    assert "divergence from float, nat" in page
    assert "(logarithmic)" in page
    assert "cost, nat" in page


def test_equal_drops_leave_the_loss_to_tell_plans_apart(assigned: dict[str, Any]) -> None:
    for point in assigned["assignment"]["front"]:
        point["drop"] = 0.0
    assigned["assignment"]["uniform"]["fp32"]["loss"] = 0.0  # has no logarithm
    page = report.to_html(assigned)
    assert "divergence from float, nat (logarithmic)" in page
    assert 'id="chart-pareto"' in page


def test_a_half_filled_assignment_is_no_defect(figures: dict[str, Any]) -> None:
    figures["assignment"] = {"nodes": {"n0": {"precision": "fp32", "reason": "slower"}}}
    page = report.to_html(figures)
    assert 'id="pareto"' not in page
    assert "Decision log" in page


def test_slices_error_ranges_and_energy_are_shown(figures: dict[str, Any]) -> None:
    slices = [
        {"kind": "slice", "name": "night", "samples": 20, "float": 0.9, "compiled": 0.8,
         "drop": 10.0, "binds": True},
        {"kind": "class", "name": "3", "samples": 4, "float": 1.0, "compiled": 0.5, "drop": 50.0,
         "binds": False},
    ]  # fmt: skip
    figures["metric"].update(slices=slices, worst_slice=slices[0], slice_minimum=10)
    figures["budget"]["max_slice_drop"] = 5.0
    values = [{"value": f"v{i}", "node": f"n{i}", "sqnr": 40.0 - i} for i in range(3)]
    figures["error_along"] = {"samples": 2, "values": values}
    figures["ranges"] = {
        "v0": {"bounds": [-1.0, 2.0], "range": [-1.0, 1.5], "histogram": [1, 5, 2]},
        "constant": {"bounds": [0.0, 0.0], "range": [0.0, 0.0], "histogram": []},
        "moved": {"bounds": [-1.0, 2.0], "range": [-1.0, 1.5], "histogram": [1, 5, 2]},
    }
    figures["energy"] = {"compiled": 1.5, "float": 3.0, "note": "one package (RAPL)"}
    page = report.to_html(figures)
    text = " ".join(parse(page).text)
    assert "slice night, 90.00 % to 80.00 %, drop 10 points (20 samples; worst of 1)" in text
    assert "drop of each slice at most 5" in text
    assert "1.5 mJ, float 3 mJ (one package (RAPL))" in text
    assert "lowest: n2, 38.0 dB" in text
    assert 'id="chart-slices"' in page
    assert page.count('id="chart-range-') == 1
    assert "only moved or reshaped are left out (1)" in text
    assert 'id="chart-range-0"' in page
    assert 'id="chart-range-1"' not in page
    assert svg.BAD in report_charts.slices([("slice night", 20, 10.0, True)], 5.0, "points")
    assert svg.BAD not in report_charts.slices([("class 3", 4, 50.0, False)], None, "points")


def test_energy_that_was_not_measured_is_said(figures: dict[str, Any]) -> None:
    assert report.energy_text(figures) == "not measured"
    figures["energy"] = {"compiled": None, "float": None, "note": "not measured: no counters"}
    assert "not measured: no counters" in report.to_html(figures)


def test_worst_slice_in_words(figures: dict[str, Any]) -> None:
    assert report.worst_slice(figures) is None
    one = {"kind": "class", "name": "0", "samples": 12, "float": 1.0, "compiled": 1.0,
           "drop": 0.0, "binds": True}  # fmt: skip
    figures["metric"].update(slices=[one], worst_slice=one, slice_minimum=10)
    assert report.worst_slice(figures) == "none of 1 lost anything"
    figures["metric"]["worst_slice"] = None
    assert report.worst_slice(figures) == "none of the 1 groups has 10 samples and a drop"
