"""The kernels for a GPU: the same numbers in Triton's interpreter, and what happens where they cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lightning_methods.learned_optimizer import Architecture, fused

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
GPU = torch.device("cuda")


@needs_triton
@pytest.mark.slow
def test_the_kernels_give_the_numbers_of_torch():
    script = Path(__file__).with_name("interpreted.py")
    root = str(script.parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("bf16") < 0.04
    assert set(found) == {"paper", "normalised", "adam", "late", "wide"}
    assert max(found.values()) < 1e-6, found


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_without_a_gpu(monkeypatch, tmp_path, capability):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_methods.learned_optimizer import kernels

    def size_of(function, floats: tuple[str, ...], **form) -> int:
        types = {"table": "*i64", "blocks": "*i64", "sums": "*fp64", "totals": "*fp64"} | dict.fromkeys(floats, "fp32")
        signature = {name: types.get(name, "*fp32") for name in function.arg_names} | dict.fromkeys(form, "constexpr")
        constants = {(function.arg_names.index(name),): value for name, value in form.items()}
        source = ASTSource(fn=function, signature=signature, constexprs=constants)
        return len(triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"])

    types = {"P": kernels.TYPES[torch.bfloat16], "G": kernels.TYPES[torch.float32], "BLOCK": kernels.BLOCK}
    assert size_of(kernels.advance, ("factor",), **types) > 0
    floats = ("factor", "size", "limit", "eps", "adam_lr", "correction")
    for normalize, add, adam in ((False, False, True), (True, True, False), (True, False, True), (True, False, False)):
        form = types | {"H": 32, "SIGNAL": normalize, "NORMALIZE": normalize, "ADD": add, "ADAM": adam}
        assert size_of(kernels.move, floats, **form) > 0


def test_what_there_are_kernels_for(monkeypatch):
    monkeypatch.setattr(fused, "kernels", lambda: "there")
    assert fused.is_usable(Architecture("signal", normalize_step=True), torch.float32, GPU)
    assert not fused.is_usable(Architecture(), torch.float32, torch.device("cpu"))
    assert not fused.is_usable(Architecture(), torch.float64, GPU)
    assert not fused.is_usable(Architecture(hidden_layers=2), torch.float32, GPU)
    assert not fused.is_usable(Architecture("small_fc"), torch.float32, GPU)


def test_without_triton_torch_takes_the_step(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "lightning_methods.learned_optimizer.kernels", raising=False)
    fused.kernels.cache_clear()
    try:
        assert fused.kernels() is None
        assert not fused.is_usable(Architecture(), torch.float32, GPU)
    finally:
        fused.kernels.cache_clear()
