"""`moe-export axes`: each line of a model with what its axes mean, as text and as a document."""

from __future__ import annotations

import json


def test_each_line_with_what_its_axes_mean(command, write, texts):
    model = write(texts["gate"], "moe.py")
    done = command("axes", model)
    assert done.code == 0, done.err
    assert "(token, slot): numbers of experts, each expert once a token" in done.out
    document = json.loads(command("axes", model, "--json").out)
    assert {key for line in document["lines"] for key in line} == {"place", "text", "values", "lost"}
    assert all(line["place"].rpartition(":")[0].endswith("moe.py") for line in document["lines"])
    (experts,) = document["experts"]
    assert experts.startswith(f"4 experts at {model}:")
