"""The constants and rounding rules that every backend shares. Plain Python numbers: no torch, no numpy.

Rules, pinned (docs/method.md, section 1):

* Rounding is half to even, everywhere (``torch.round``, ``numpy.rint``).
* All quantizer arithmetic is in fp32, whatever the dtype of the input.
* ``weight_scale = max(mean|W|, EPSILON)``. The sum runs in fp64 and is rounded to fp32 once, so that order of summation,
  thread count and device do not move the scale, and no code flips at the 0.5 boundary between two runs.
* Scales of rows and of groups of columns: the same mean of each, rounded to bf16 (fp16 holds these numbers, too).
* ``weight_codes = clip(round(W / weight_scale), -1, 1)``: a true division, not a product with the reciprocal.
* ``act_codes = clip(round(x * (127 / m)), -128, 127)`` and ``act_scale = m / 127``, with ``m = max(max|x|, EPSILON)`` per
  token: both true divisions. (``127 / m`` written with a Python scalar is ``reciprocal(m) * 127`` in torch and differs
  in a quarter of the values: divide tensor by tensor.)
* With activations in blocks the same rule holds for each ACT_BLOCK columns of a token, instead of for the token.
* Products are summed in int32 (exact in fp32 too while ``127 * in_features < 2**24``), then scaled once:
  ``y = acc * (act_scale * weight_scale) + bias``.
"""

ACT_MAX = 127  # the largest int8 activation code in magnitude; -128 is allowed by the paper's clip but never produced
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # of an MLP's gate: the ones that have kernels
TOKENS_OF_A_SUM = 2**17  # over so many tokens int32 holds every sum of int8 times int8
IGNORED = -100  # the label of a position that is not to be learned, as torch's cross-entropy has it
EPSILON = 1e-5  # lower clamp of both scales before use, as in the authors' code; the paper names no value

ACT_BLOCK = 32  # columns of a token that share a scale where activations are rounded in blocks; other runtimes' number

MAX_SCALE = 65280.0  # the largest number that fp16 and bf16 both hold: of a row's or a group's scale

# Largest in_features for which an fp32 sum of act_code * weight_code is still an exact integer.
MAX_EXACT_IN_FEATURES = (2**24 - 1) // 128
