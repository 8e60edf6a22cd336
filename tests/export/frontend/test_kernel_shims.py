"""What model files import of kernel packages is there, in plain PyTorch, where the package's own files are missing."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import PathFinder

import pytest
import torch

from moe_export.errors import NotExportableError, UsageError
from moe_export.export.frontend.kernels.table import MODULES
from moe_export.export.frontend.load import load_subject

ROOTS = {name.partition(".")[0] for name in MODULES}


@pytest.fixture(autouse=True)
def unloaded():
    """Each test imports these packages as a new process does."""
    kept = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in ROOTS}
    yield
    for name in [*sys.modules]:
        if name.partition(".")[0] in ROOTS:
            del sys.modules[name]
    sys.modules.update(kept)


@pytest.mark.parametrize(
    ("lines", "notes"),
    [
        ("from mamba_ssm import Mamba\nmodel = Mamba(8, d_state=4)", "mamba_ssm.Mamba"),
        ("from mamba_ssm import Mamba2\nmodel = Mamba2(8, d_state=4, headdim=4)", "mamba_ssm.Mamba2"),
        (
            "import mamba_ssm.modules.mamba2_simple as m\nmodel = m.Mamba2Simple(8, headdim=4, ngroups=2)",
            "mamba_ssm.modules.mamba2_simple.Mamba2Simple",
        ),
        (
            "from functools import partial\nfrom mamba_ssm import Mamba\n"
            "from mamba_ssm.modules.mamba_simple import Block\n"
            "from mamba_ssm.ops.triton.layernorm import RMSNorm\n"
            "model = Block(8, Mamba, norm_cls=RMSNorm, fused_add_norm=True)",
            "mamba_ssm.Mamba, mamba_ssm.modules.mamba_simple.Block, mamba_ssm.ops.triton.layernorm.RMSNorm",
        ),
        (
            "from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution\n"
            "from fla.ops.gla import chunk_gla, fused_recurrent_gla\n"
            "class Mixer(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.conv, self.norm, self.pre = ShortConvolution(8, 4), FusedRMSNormGated(4), RMSNorm(8)\n"
            "    def forward(self, x):\n"
            "        h = self.conv(self.pre(x))[0].unflatten(-1, (2, 4))\n"
            "        return self.norm(chunk_gla(h, h, h, -h.abs())[0], h)\n"
            "model = Mixer()",
            "fla.modules.FusedRMSNormGated, fla.modules.RMSNorm, fla.modules.ShortConvolution, fla.ops.gla.chunk_gla",
        ),
    ],
)
def test_what_a_file_imports_is_there_and_named_in_the_report(write, lines, notes):
    subject = load_subject(str(write(f"{lines}\nmodel(torch.randn(2, 5, 8))\n")))
    assert [tuple(value.shape) for value in subject.inputs.values()] == [(2, 5, 8)]
    assert subject.notes == (f"plain PyTorch stands in for {notes} (docs/recurrence.md)",)


def test_a_language_model_of_mamba_ssm_loads_its_checkpoint(write, tmp_path):
    text = f"""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    config = MambaConfig(d_model=8, n_layer=2, vocab_size=11, ssm_cfg=dict(layer="Mamba2", headdim=4, d_state=4))
    made = MambaLMHeadModel(config)
    import json
    (folder := __import__("pathlib").Path({str(tmp_path / "ckpt")!r})).mkdir()
    (folder / "config.json").write_text(json.dumps(vars(config)))
    torch.save(made.state_dict(), folder / "pytorch_model.bin")
    model = MambaLMHeadModel.from_pretrained(str(folder))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in made.state_dict().items())
    example_inputs = (torch.zeros(1, 3, dtype=torch.long),)
    """
    subject = load_subject(str(write(text)))
    assert subject.outputs == ("logits",)
    names = dict(subject.module.named_parameters())
    assert {
        "backbone.embedding.weight",
        "backbone.layers.1.mixer.A_log",
        "backbone.norm_f.weight",
    } <= names.keys()


def test_a_name_that_is_not_there_is_an_import_error(write):
    """A file that has a fallback uses it."""
    text = """
    try:
        from causal_conv1d import no_such_kernel
    except ImportError:
        no_such_kernel = None
    model, example_inputs = nn.ReLU(), (torch.ones(2),)
    assert no_such_kernel is None
    """
    assert load_subject(str(write(text))).notes == ()
    with pytest.raises(UsageError, match="cannot import name 'no_such_kernel'"):
        load_subject(str(write("from causal_conv1d import no_such_kernel\n")))


PACKAGE = {
    "__init__.py": "from mamba_ssm.modules.block import Mixer",
    "modules/__init__.py": "",
    "modules/block.py": """
        import torch
        from torch import nn
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.their_own import their_own_kernel
        from mamba_ssm.ops import triton

        class Mixer(nn.Module):
            def forward(self, x):
                x = x.transpose(1, 2)
                return selective_scan_fn(x, x, -torch.ones(8, 4), torch.ones(8, 4), torch.ones(8, 4))

        class Other(nn.Module):
            def forward(self, x):
                return their_own_kernel(x)
    """,
    "ops/__init__.py": "",
    "ops/selective_scan_interface.py": "import no_such_compiled_module",
    "ops/triton/__init__.py": "import no_such_triton",
    "ops/triton/their_own.py": "import no_such_triton",
}


@pytest.fixture
def package(write, tmp_path, monkeypatch):
    """A package whose kernels cannot be imported on this machine, and whose other files can."""
    for name, text in PACKAGE.items():
        write(text, f"mamba_ssm/{name}", header="")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "mamba_ssm"


def test_the_package_s_own_files_run_on_the_shims_of_its_kernels(package):
    path = package / "modules" / "block.py"
    subject = load_subject(f"{path}:Mixer", inputs=("x=2x5x8:float32",))
    assert type(subject.module).__name__ == "Mixer"
    assert subject.notes == (
        "plain PyTorch stands in for mamba_ssm.ops.selective_scan_interface.selective_scan_fn (docs/recurrence.md)",
    )
    with pytest.raises(
        UsageError, match=r"mamba_ssm\.ops\.triton\.their_own\.their_own_kernel is a GPU kernel"
    ):
        load_subject(f"{path}:Other", inputs=("x=2x5x8:float32",))


def test_every_name_of_the_table_is_written():
    for module, files in MODULES.items():
        for file, names in files.items():
            form = importlib.import_module(f"moe_export.export.frontend.kernels.{file}")
            for name in names:
                assert hasattr(form, name.partition("=")[2] or name), (module, name)


def test_what_no_form_has_is_refused():
    from moe_export.export.frontend.kernels import linear_attention, mamba_blocks

    x = torch.zeros(1, 2, 1, 3)
    with pytest.raises(NotExportableError, match=r"chunk_gla\(cu_seqlens=\.\.\.\)"):
        linear_attention.chunk_gla(x, x, x, x, cu_seqlens=torch.tensor([0, 2]))
    with pytest.raises(TypeError, match="no_such_option"):
        linear_attention.chunk_gla(x, x, x, x, no_such_option=1)
    with pytest.raises(NotExportableError, match="inference_params"):
        mamba_blocks.Mamba(4)(torch.zeros(1, 2, 4), inference_params={})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mamba_ssm", "fla"])
def test_the_real_package_computes_the_same(name):
    """Where it is installed and there is a GPU for it."""
    if not torch.cuda.is_available() or PathFinder.find_spec(name) is None:
        pytest.skip(f"no GPU, or {name} is not installed")
    draw = torch.Generator().manual_seed(0)
    finders = [finder for finder in sys.meta_path if type(finder).__name__ != "_KernelShims"]
    sys.meta_path, shims = finders, sys.meta_path
    try:
        if name == "mamba_ssm":
            from mamba_ssm import Mamba2  # type: ignore[import-not-found]

            from moe_export.export.frontend.kernels.mamba_blocks import Mamba2 as Ours

            real = Mamba2(32, d_state=16, headdim=16).cuda()
            ours, x = Ours(32, d_state=16, headdim=16), torch.randn(2, 70, 32, generator=draw)
            ours.load_state_dict({key: value.cpu() for key, value in real.state_dict().items()})
            found, wanted = ours(x), real(x.cuda()).cpu()
        else:
            from fla.ops.gla import chunk_gla  # type: ignore[import-not-found]

            from moe_export.export.frontend.kernels import linear_attention

            q, k, v = (torch.randn(2, 70, 2, 16, generator=draw) for _ in range(3))
            g = -torch.rand(2, 70, 2, 16, generator=draw)
            wanted = chunk_gla(*(x.cuda() for x in (q, k, v, g)))[0].cpu()
            found = linear_attention.chunk_gla(q, k, v, g)[0]
    finally:
        sys.meta_path = shims
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
