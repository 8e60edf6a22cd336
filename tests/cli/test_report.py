"""The page of a report: complete, safe, and right for screen readers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from moe_export.reports.page import STYLE, Change, Content, Picture, page

VOID = {"meta", "link", "img", "br", "rect", "path"}


class Outline(HTMLParser):
    """Which elements a page has, in order, and whether they are closed as they were opened."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name in names]


def follows_the_rules(text: str) -> Outline:
    """What a check of accessibility asks of a static page."""
    outline = Outline(text)
    assert outline.all("html")[0]["lang"] == "en"
    assert len(outline.all("main")) == len(outline.all("h1")) == 1
    levels = [int(name[1]) for name, _ in outline.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(image.get("alt") for image in outline.all("img"))
    idents = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(idents) == len(set(idents))
    for svg in outline.all("svg"):
        assert svg["role"] == "img"
        assert set(str(svg["aria-labelledby"]).split()) <= set(idents)
    assert all(head["scope"] == "col" for head in outline.all("th"))
    assert len(outline.all("caption")) == len(outline.all("table"))
    assert {str(link["href"]).removeprefix("#") for link in outline.all("a")} <= set(idents)
    assert not outline.all("script", "iframe", "object")
    assert not [name for _, attributes in outline.elements for name in attributes if name.startswith("on")]
    return outline


NASTY = '<script>alert("x")</script>&'


def content(verdict: str = "equal", name: str = "Net") -> Content:
    row = {"output": name, "dtype": "float32", "max_abs": 1e-7, "max_rel": float("nan"), "at": "example",
           "equal": verdict == "equal", "reason": name}  # fmt: skip
    verification = {"outputs": [row], "cases": [{"sizes": {"n": 1}}], "candidate": "onnxruntime-cpu",
                    "reference": "torch", "shortfall": None, "warnings": [name]}  # fmt: skip
    einsum = {"equation": name, "became": "matmul", "file": name, "line": 3, "flops": "2·n"}
    engine = {"file": name, "module": name, "version": "1", "size": 1, "seconds": 1.0, "status": name}
    graph = {"file": name, "kind": "model", "module": "model", "dtype": "float32", "inputs": {name: [name, 3]},
             "outputs": {name: []}, "nodes": 3, "einsums": [einsum], "notes": [name], "engines": [engine],
             "verification": verification}  # fmt: skip
    document = {
        "model": name,
        "verdict": verdict,
        "source": name,
        "found_by": name,
        "opset": 17,
        "graphs": [graph],
    }
    row = (name, "1", "2", "+1")
    drawn = '<svg role="img" aria-labelledby="of-the-change"><title id="of-the-change"></title></svg>'
    return Content(
        document,
        {name: [(name, 1, 2, 3, 4)], "other": name},
        {name: "n=1"},
        {},
        [Picture("<svg/>", name, name)],
        [name],
        {name: name},
        Change([row], [row], drawn, name),
        [(name, 3, 0.5)],
        name,
    )


def test_whatever_a_model_says_is_text():
    text = page(content(name=NASTY))
    outline = follows_the_rules(text)
    assert "<script>" not in text
    assert NASTY in "".join(outline.texts)


@pytest.mark.parametrize("verdict", ["equal", "not equal"])
def test_the_verdict_stands_first_and_in_words(verdict):
    outline = follows_the_rules(page(content(verdict)))
    assert next(text for text in outline.texts if text.strip()) == f"Net: {verdict} - moe-export"
    assert verdict in outline.texts


def test_what_is_not_known_is_told_with_its_reason():
    outline = follows_the_rules(page(replace(content(), change=NASTY, timings=NASTY)))
    assert f"There is no baseline export to compare with: {NASTY}" in "".join(outline.texts)
    assert "Time" in outline.texts
    nobody_asked = follows_the_rules(page(replace(content(), change=None, timings=())))
    assert not {"Before and after", "Time"} & set(nobody_asked.texts)


def test_who_has_no_pointer_scrolls_what_is_wide():
    wide = [
        attributes for _, attributes in Outline(page(content())).elements if attributes.get("class") == "wide"
    ]
    assert len(wide) > 3
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in wide)


def contrast(one: str, other: str) -> float:
    """By WCAG 2.2: 1 to 21."""

    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dim = sorted((light(one), light(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("scheme", [0, 1])
def test_words_stand_out(scheme):
    colours = dict(
        re.findall(r"--(\w+): (#\w{6})", STYLE.split("@media (prefers-color-scheme: dark)")[scheme])
    )
    for name in ("ink", "faint", "good", "bad", "link"):
        for ground in ("paper", "card"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)


@pytest.mark.slow
def test_a_model_becomes_a_page(command, write, texts, tmp_path):
    model = write(texts["gate"], "moe.py")
    done = command("report", model, "-o", tmp_path / "moe.html", "--graphs", tmp_path / "kept")
    assert done.code == 0, done.err
    assert done.out.splitlines() == ["Moe: equal", f"written: {tmp_path / 'moe.html'}"]
    outline = follows_the_rules((tmp_path / "moe.html").read_text(encoding="utf-8"))
    shown = " ".join("".join(outline.texts).split())
    for words in ("Moe as ONNX", "moe.onnx, the whole model", "moe.gate.onnx, the gate of gate",
                  "onnxruntime-cpu against torch", "One run of moe.onnx at",
                  f"moe-export {model} --opset 17 -o out", "SHA-256 of moe.onnx"):  # fmt: skip
        assert words in shown, words
    assert "before: moe.baseline.onnx" in outline.texts
    assert "after: moe.onnx" in outline.texts
    assert "PyTorch, eager" in outline.texts
    assert len(outline.all("svg")) == 3
    assert "Which of 6 tokens goes to which of 4 experts" in outline.all("img")[0]["alt"]
    document = json.loads((tmp_path / "kept" / "moe.report.json").read_text())
    assert document["verdict"] == "equal"


@pytest.mark.slow
def test_a_graph_that_is_not_equal_has_its_page_too(command, write, texts, tmp_path):
    model = write(texts["model"].replace("relu()", "softmax(-1).log().cumsum(1).exp()"), "block.py")
    done = command(
        "report", model, "-o", tmp_path / "block.html", "--rtol", "0", "--atol", "0", "--no-baseline"
    )
    assert done.code == 1
    assert "Block: not equal" in done.out
    outline = follows_the_rules((tmp_path / "block.html").read_text(encoding="utf-8"))
    assert "not equal" in outline.texts
    assert "block.rejected.onnx" in outline.texts


def test_another_ending_is_refused_before_any_work(command, write, texts, tmp_path):
    done = command("report", write(texts["model"]), "-o", tmp_path / "page.pdf")
    assert done.code == 2
    assert "is a .html file" in done.err


EINSUM = """
class Mix(nn.Module):
    def forward(self, x, w):
        return torch.einsum("bd,bd->b", x, w)

model = Mix()
example_inputs = {"x": torch.randn(2, 4), "w": torch.randn(2, 4)}
"""


def test_the_baseline_is_the_graph_without_any_rewriting(command, write, tmp_path):
    model = write(EINSUM, "mix.py")
    assert command("report", model, "-o", tmp_path / "mix.html").code == 0
    rows = re.findall(r"<td><code>Einsum</code></td>(.*?)</tr>", (tmp_path / "mix.html").read_text("utf-8"))
    assert [re.findall(r">([^<]+)</td>", row) for row in rows] == [["1", "0", "-1"]]


def test_a_report_takes_what_an_export_takes_and_tells_it(command, write, tmp_path):
    from moe_export.cli import cli

    own = {param.name for param in cli.commands["report"].params}
    assert {param.name for param in cli.commands["export"].params} - own == {
        "stop_after",
        "show",
        "list_calls",  # those write nothing
        "hf",
        "reports",
        "github",
        "verbose",  # those tell what a page tells anyway
    }
    model = write(EINSUM, "mix.py")
    options = (
        "--static",
        "--dynamic",
        "x:0=rows",
        "--dynamic",
        "w:0=rows",
        "--functions",
        "--no-baseline",
        "--atol",
        "1e-4",
    )
    assert command("report", model, "-o", tmp_path / "mix.html", *options).code == 0
    outline = follows_the_rules((tmp_path / "mix.html").read_text(encoding="utf-8"))
    shown = "".join(outline.texts)
    given = "--seed 0 --static --dynamic x:0=rows --dynamic w:0=rows --functions --atol 0.0001"
    assert f"moe-export {model} --opset 17 -o out {given}" in shown
    assert f"moe-export verify out/mix.onnx --against {model} --seed 0 --atol 0.0001" in shown
    assert "rows × 4" in shown
    assert "Before and after" not in shown


def test_a_graph_that_was_not_compared_has_its_page(command, write, tmp_path):
    done = command(
        "report", write(EINSUM, "mix.py"), "-o", tmp_path / "mix.html", "--no-verify", "--no-baseline"
    )
    assert done.code == 0, done.err
    assert "Mix: not verified" in done.out
    assert "Not compared with the model." in (tmp_path / "mix.html").read_text(encoding="utf-8")


AWAY = """
class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 512), nn.Linear(512, 64)

    def forward(self, x):
        return self.second(self.first(x).relu())

with torch.device("meta"):
    model = Wide()
weights = "wide.safetensors"
example_inputs = {"x": torch.randn(2, 64)}
"""


def test_weights_that_are_not_in_memory_stay_where_they_are(command, write, tmp_path):
    import torch
    from safetensors.torch import save_file

    shapes = {
        "first.weight": (512, 64),
        "first.bias": (512,),
        "second.weight": (64, 512),
        "second.bias": (64,),
    }
    save_file(
        {name: torch.randn(shape) / 16 for name, shape in shapes.items()}, tmp_path / "wide.safetensors"
    )
    done = command("report", write(AWAY, "wide.py"), "-o", tmp_path / "wide.html", "--memory", "1KiB")
    assert done.code == 0, done.err
    shown = "".join(follows_the_rules((tmp_path / "wide.html").read_text(encoding="utf-8")).texts)
    assert shown.count("the weights are read from files, and are not in memory") == 3
