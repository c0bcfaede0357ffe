"""Imported once by the fork server, so that ranks start with the heavy modules already in memory."""

import transformers.models.deepseek_v2.modeling_deepseek_v2
import transformers.models.deepseek_v3.modeling_deepseek_v3
import transformers.models.deepseek_v4.modeling_deepseek_v4
import transformers.models.deepseek_v32.modeling_deepseek_v32  # noqa: F401

import moe_runtime.launch.jobs  # noqa: F401
