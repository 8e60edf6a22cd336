"""A part that fills a token up to a chunk is called for one token apart, and what it gives is what the model gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import hybrid_families
import pytest
import torch
from torch import nn

from moe_export.errors import NotExportableError
from moe_export.export.decoder.cached import CachedDecoder
from moe_export.export.decoder.decoder import _made, _one_token_apart
from moe_export.export.decoder.in_parts import Made, prove_in_parts
from moe_export.export.frontend.subject import Subject, make_subject
from moe_export.export.recurrence.transformers_cache import find_cached_model
from moe_export.export.torch_compat.modules import calls_of_modules
from moe_export.export.tracing.trace import quiet


def apart_of(model: nn.Module) -> tuple[Made, Subject | None]:
    ids = {"input_ids": torch.randint(3, 32, (2, 7))}
    subject = make_subject(model, (), ids, source=Path(__file__), how="a test")
    cached = find_cached_model(model, attends=False)
    assert cached is not None
    with quiet(), torch.no_grad():
        made = _made(subject, cached)
        return made, _one_token_apart(made, cached)


def calls_in(subject: Subject, count: int) -> list[int]:
    """How many tokens each call of the mixer gets, in a call of the decoder on so many."""
    seen: list[int] = []

    def called(original, module, *args, **kwargs):
        if "Mamba" in type(module).__name__ and hasattr(module, "conv1d"):
            given = [*args, *kwargs.values()]
            seen.append(next(each for each in given if isinstance(each, torch.Tensor)).shape[1])
        return original(module, *args, **kwargs)

    (tokens, *rest) = subject.inputs.values()
    mask = torch.ones(2, 2 + count, dtype=torch.int64)
    rest = [mask if each.dtype == torch.int64 and each.dim() == 2 else each for each in rest]
    with torch.no_grad(), calls_of_modules(called):
        subject.module(tokens[:, :1].repeat(1, count), *rest)
    return seen


@pytest.mark.parametrize("name", ["Mamba2", "GraniteMoeHybrid", "NemotronH", "Zamba2", "FalconH1"])
def test_mixers_of_chunks_are_called_for_one_token_apart(name):
    _, both = apart_of(hybrid_families.by_chunks(name))
    assert both is not None
    assert isinstance(both.module, CachedDecoder)
    assert {call.path.rpartition(".")[2] for call in both.module._apart} <= {
        "mamba",
        "mixer",
        "mamba_decoder",
    }
    kinds = {kept.name.rpartition(".")[2] for call in both.module._apart for kept in call.writes}
    assert kinds == {"conv_state", "recurrent_state"}


@pytest.mark.parametrize(("name", "chunk"), [("GraniteMoeHybrid", 2), ("Lfm2", 8)])
def test_others_have_one_way(name, chunk):
    """Chunks of two cost no more than two tokens; a window has no chunks."""
    _, both = apart_of(hybrid_families.by_chunks(name, chunk))
    assert both is None


def test_a_delta_rule_has_one_way():
    """It is folded to steps."""
    _, both = apart_of(hybrid_families.delta_and_attention())
    assert both is None


def test_each_way_gets_its_tokens():
    made, both = apart_of(hybrid_families.by_chunks("GraniteMoeHybrid"))
    assert both is not None
    assert calls_in(both, 5) == [1, 5]
    assert calls_in(made.subject, 5) == [5]


def test_a_wrong_way_is_refused(monkeypatch):
    made, both = apart_of(hybrid_families.by_chunks("GraniteMoeHybrid"))
    assert both is not None
    with quiet(), torch.no_grad():
        monkeypatch.setattr(torch, "where", lambda condition, one, other: other + 0.1)
        with pytest.raises(NotExportableError):
            prove_in_parts(replace(made, subject=both))
