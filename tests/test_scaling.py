"""The model of what is sent between devices: its numbers, its page, and programs for TPU slices."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import scaling

from normax import parts

ROOT = pathlib.Path(__file__).parents[1]
TWO = """\
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%again (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %third = f32[8]{0} all-reduce(%p), channel_id=3, to_apply=%add
}

%enough (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}

ENTRY %main (x: f32[8], y: bf16[4,2], lost: pred[]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %y = bf16[4,2]{1,0} parameter(1)
  %lost = pred[] parameter(2)
  %first = (f32[8]{0}, bf16[4,2]{1,0}) all-reduce(%x, %y), channel_id=1, to_apply=%add
  %one = f32[8]{0} get-tuple-element(%first), index=0
  ROOT %end = f32[8]{0} conditional(%lost, %one, %one), branch_computations={%again, %enough}
}
"""


def test_what_a_program_sends_is_read_from_its_text():
    assert scaling.reduced(TWO) == scaling.Step((8 * 4 + 8 * 2,), (8 * 4,))


def test_the_page_has_the_numbers_of_the_model():
    assert scaling.table() in (ROOT / "docs" / "scaling.md").read_text()


def test_one_device_sends_nothing_and_many_send_no_more_by_plain_jit():
    for route in scaling.ROUTES:
        assert scaling.step(route, 1, 64) == scaling.Step(())
    few, many = (scaling.step(scaling.JIT, devices, 64) for devices in (4, 256))
    assert few.always == many.always
    few, many = (scaling.step(scaling.SHARD_MAP, devices, 64).always[0] for devices in (4, 256))
    assert many == 64 * few
    assert parts.MOST == scaling.MOST
    assert len(scaling.step(scaling.JIT, 2 * scaling.MOST, 64).again) == 4


def test_an_all_reduce_takes_its_hops_and_its_bytes():
    assert scaling.hops(4) == 4  # there and back, along two axes
    assert scaling.hops(256) == 32  # half way around, there and back, along two axes
    large = 10**9
    moved = scaling.seconds((large,), 256) - scaling.seconds((0,), 256)
    assert moved == pytest.approx(2 * large * 255 / 256 / (4 * scaling.LINK))
    # Two slices send, of what each has reduced, a half to each other, twice, all chips at once.
    between = scaling.seconds((large,), 512) - scaling.seconds((large,), 256)
    assert between == pytest.approx(large / 256 / scaling.NETWORK)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu to compile")
def test_programs_for_tpu_slices_send_what_the_model_says():
    command = [sys.executable, "benchmarks/scaling.py", "--check", "--devices", "4", "256"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as the model says") == 8


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs jax-cuda12-pjrt"
)
def test_programs_for_gpus_send_what_the_model_says():
    command = [sys.executable, "benchmarks/scaling.py", "--check", "--target", "h200"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as the model says") == 8
    assert "at once" in done.stdout
