"""Full TensorRT, which needs a GPU to build: what is asked of it, and what it may refuse, on doubles of its classes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tensorrt_names import used

from moe_export.errors import MissingBackendError, UsageError
from moe_export.export.engines import module as modules
from moe_export.export.engines.build import build_engines
from moe_export.export.engines.module import Module, check_capabilities, load_module
from moe_export.export.engines.settings import Settings, check_settings, configure
from moe_export.export.engines.timing_cache import keep_timings, use_timings


class TimingCache:
    """Timings, as bytes."""

    def __init__(self, held):
        self.held = held

    def serialize(self):
        return self.held


class Config:
    """A builder's configuration; timings of another GPU are not taken, and what is no cache is None."""

    def __init__(self):
        self.flags, self.cache = {"TF32"}, None
        self.hardware_compatibility_level = self.runtime_platform = "as built"

    def set_flag(self, flag):
        self.flags.add(flag)

    def clear_flag(self, flag):
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool, pool_size):
        self.limit = (pool, pool_size)

    def create_timing_cache(self, serialized_timing_cache):
        return None if serialized_timing_cache == b"text" else TimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.held == b"another GPU":
            return False
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class Words:
    """An enumeration whose members are their names."""

    def __getattr__(self, name):
        return name


class NoDriver:
    """A constructor that raises where TensorRT returns nothing."""

    def __init__(self, logger):
        logger.messages.append((1, "CUDA initialization failure with error: 35"))
        raise TypeError("pybind11::init(): factory function returned nullptr")


class Logger:
    """What TensorRT's loggers inherit from."""


@pytest.fixture
def full():
    """Full TensorRT where no driver is."""
    enumerations = ("BuilderFlag", "HardwareCompatibilityLevel", "MemoryPoolType", "ProfilingVerbosity")
    return Module(
        "tensorrt",
        SimpleNamespace(
            __version__="11.4.0.106",
            ILogger=Logger,
            Builder=NoDriver,
            init_libnvinfer_plugins=lambda logger, namespace: True,
            RuntimePlatform=Words(),
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=0),
            **{name: Words() for name in enumerations},
        ),
    )


@pytest.fixture
def configured(full):
    """A configuration with these settings."""

    def configured(**settings):
        config = Config()
        configure(config, Settings(**settings), full)
        return config

    return configured


def test_the_double_has_no_function_that_tensorrt_has_not():
    known = used()
    for kind, name in ((Config, "IBuilderConfig"), (TimingCache, "ITimingCache")):
        assert {member for member in vars(kind) if not member.startswith("_")} <= set(known[name])


def test_without_a_driver_the_builder_raises_and_that_is_a_missing_backend(full, linear, monkeypatch):
    monkeypatch.setattr("moe_export.export.engines.build.load_module", lambda name, wanted: full)
    monkeypatch.setattr(modules, "_LOGS", {})
    with pytest.raises(
        MissingBackendError, match="cannot build for the GPU of this machine: CUDA init"
    ) as error:
        build_engines(linear, ["current"], module="tensorrt")
    assert error.value.hint == "full TensorRT builds only where a GPU is"


def test_plugins_that_cannot_be_loaded_are_a_missing_backend(full, linear, monkeypatch):
    monkeypatch.setattr(full.trt, "init_libnvinfer_plugins", lambda logger, namespace: False)
    monkeypatch.setattr("moe_export.export.engines.build.load_module", lambda name, wanted: full)
    monkeypatch.setattr(modules, "_LOGS", {})
    with pytest.raises(MissingBackendError, match=r"cannot build .*: its plugins cannot be loaded"):
        build_engines(linear, ["current"], module="tensorrt")


@pytest.mark.parametrize(("name", "version"), [("tensorrt", "10.13.3.9"), ("tensorrt-rtx", "1.2.0.36")])
def test_a_tensorrt_that_is_too_old_is_a_missing_backend(monkeypatch, name, version):
    monkeypatch.setattr(modules, "import_module", lambda imported: SimpleNamespace(__version__=version))
    with pytest.raises(MissingBackendError, match=f"{name} {version} is too old: 1") as error:
        load_module(name)
    assert "pip install" in error.value.hint


def test_it_builds_for_this_gpu_for_all_like_it_and_for_all_from_ampere_on(full, monkeypatch):
    monkeypatch.setattr(modules, "present_gpu", lambda: "sm90")
    assert check_capabilities(["current", "sm90", "portable"], full) == ("current", "sm90", "portable")
    with pytest.raises(UsageError, match="no engine can be built for 'sm89'"):
        check_capabilities(["sm89"], full)
    found = {}
    for capability in ("current", "sm90", "portable"):
        config = Config()
        full.aim(config, capability)
        found[capability] = config.hardware_compatibility_level
    assert found == {"current": "as built", "sm90": "SAME_COMPUTE_CAPABILITY", "portable": "AMPERE_PLUS"}


def test_a_capability_that_tensorrt_rtx_does_not_take_is_refused():
    class Refusing:
        def set_compute_capability(self, compute_capability, index):
            return False

    with pytest.raises(UsageError, match="does not build for sm89"):
        load_module().aim(Refusing(), "sm89")


def test_settings_become_flags(configured):
    assert configured().flags == set()
    assert configured(tf32=True).flags == {"TF32"}
    assert configured(refit=True).flags == {"REFIT"}
    assert configured(strip_weights=True).flags == {"STRIP_PLAN", "REFIT_IDENTICAL"}
    assert configured(strip_weights=True, refit=True).flags == {"STRIP_PLAN", "REFIT"}
    assert configured(workspace=1024).limit == ("WORKSPACE", 1024)
    assert configured(version_compatible=True).flags == {"VERSION_COMPATIBLE"}
    other = configured(version_compatible=True, platform="windows")
    assert other.runtime_platform == "WINDOWS_AMD64"
    assert other.flags == {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Settings(version_compatible=True), "runs with the version that built it only"),
        (Settings(platform="windows"), "runs on Linux and Windows as it is"),
    ],
)
def test_what_tensorrt_rtx_has_not_is_refused(settings, said, full):
    with pytest.raises(UsageError, match=said):
        check_settings(settings, load_module())
    check_settings(settings, full)


def test_timings_are_read_and_written(tmp_path):
    file, config = tmp_path / "timings.bin", Config()
    use_timings(config, file)
    config.cache.held = b"timed"
    assert keep_timings(config, file) == ""
    assert file.read_bytes() == b"timed"
    assert use_timings(Config(), file).held == b"timed"


@pytest.mark.parametrize(
    ("held", "said"), [(b"another GPU", "they are of another GPU or TensorRT"), (b"text", "it is no cache")]
)
def test_timings_that_cannot_be_used_are_refused_before_the_build_and_kept(tmp_path, held, said):
    file = tmp_path / "timings.bin"
    file.write_bytes(held)
    with pytest.raises(UsageError, match=f"has no timings that can be used here: {said}") as error:
        use_timings(Config(), file)
    assert "--timing-cache new.bin" in error.value.hint
    assert file.read_bytes() == held


def test_a_build_that_gives_no_timings_is_a_note(tmp_path):
    config = Config()
    assert "no timings were kept" in keep_timings(config, tmp_path / "t")
    config.cache = TimingCache(None)
    assert "no timings were kept" in keep_timings(config, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_an_engine_for_windows_is_not_run_here(tmp_path):
    from moe_export.commands.build import _write
    from moe_export.export.engines.build import Engine

    engine = Engine("current", "tensorrt", "11.4", b"plan", 0.1, ({},), Settings(platform="windows").facts())
    found = _write(engine, tmp_path / "m.onnx", tmp_path, layers=False)
    assert found["status"] == "built, not run: it is for windows"
    assert (tmp_path / found["file"]).read_bytes() == b"plan"
