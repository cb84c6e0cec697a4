"""Reading compiled programs: loops and what they repeat."""

import jax
import jax.numpy as jnp
import pytest

from cli_jax.dryrun import hlo

WRITTEN = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %g = f32[8] get-tuple-element(%p), index=1
  %all-gather.1 = f32[64]{0} all-gather(%g), channel_id=7, dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%p)
}

%cond (p.1: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%p.1), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = (s32[], f32[8]) parameter(0)
  %start = (bf16[4,2], bf16[8,2]) all-reduce-start(%a), channel_id=8
  %again = f32[64]{0} all-gather(%a), channel_id=9, dimensions={0}
  ROOT %while.1 = (s32[], f32[8]) while(%a), condition=%cond, body=%body
}
"""


def test_what_a_loop_repeats_counts_as_often():
    found = hlo.collective_bytes(WRITTEN)
    assert found["all-gather"] == 5 * 64 * 4 + 64 * 4
    assert found["all-reduce"] == 8 * 2 * 2
    assert found["all-to-all"] == 0


def test_one_channel_counts_once():
    """The TPU compiler mentions a collective where it starts and in the loops it is spread over."""
    text = WRITTEN.replace("channel_id=9", "channel_id=7")
    assert hlo.collective_bytes(text)["all-gather"] == 64 * 4


def test_a_loop_without_a_readable_count_is_an_error():
    with pytest.raises(ValueError, match="count cannot be read"):
        list(hlo.instructions(WRITTEN.replace("direction=LT", "direction=NE")))


def test_scans_of_a_real_program_are_multiplied():
    def f(x):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, None, 3)[0], None

        return jax.lax.scan(outer, x, None, 4)[0]

    text = jax.jit(f).lower(jnp.ones((128, 128))).compile().as_text()
    dots = sum(line.times for line in hlo.instructions(text) if line.op == "dot")
    calls = sum(
        line.times for line in hlo.instructions(text) if "matmul" in line.rest and line.op != "dot"
    )
    assert dots or calls
    assert max(dots, calls) == 12


def test_sizes_of_types():
    assert hlo.size("(bf16[2,3]{1,0:T(8,128)}, f32[], pred[5])") == 12 + 4 + 5


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        list(hlo.instructions("nothing"))
