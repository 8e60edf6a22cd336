"""Models of transformers take the form that can be traced, and what is changed for it is put back."""

from __future__ import annotations

import pytest
from canaries import canary

FILE = "export/torch_compat/transformers.py"
pytest.importorskip("transformers", reason="transformers is not installed")


def test_canary_the_registry_of_experts_is_asked():
    with canary(
        FILE,
        "ExpertsInterface.get_interface(implementation, default) of transformers.integrations.moe gives the experts",
        todo="read https://huggingface.co/docs/transformers/experts_interface for what is asked now",
    ):
        from transformers.integrations import moe

        from moe_export.export.torch_compat.transformers import experts_taken

        before = moe.ExpertsInterface.get_interface
        with experts_taken("batched_mm"):
            found = moe.ALL_EXPERTS_FUNCTIONS.get_interface("eager", None)
        assert found is moe.batched_mm_experts_forward
        with experts_taken("eager"):  # what stands in a model's file is in no registry
            assert moe.ALL_EXPERTS_FUNCTIONS.get_interface("grouped_mm", "the file's") == "the file's"
        assert moe.ExpertsInterface.get_interface is before


def test_canary_gated_delta_rules_have_two_forms():
    with canary(
        FILE,
        "models with gated delta rules have torch_chunk_gated_delta_rule and torch_recurrent_gated_delta_rule",
        todo="find the names of the two forms in modeling_qwen3_next.py; export/recurrence/delta_rule.py has them",
    ):
        from transformers.models.qwen3_next import modeling_qwen3_next as file

        from moe_export.export.recurrence.delta_rule import delta_rules_step_by_step

        before = file.torch_chunk_gated_delta_rule
        with delta_rules_step_by_step():
            assert file.torch_chunk_gated_delta_rule is file.torch_recurrent_gated_delta_rule
        assert file.torch_chunk_gated_delta_rule is before
