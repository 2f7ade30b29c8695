"""vLLM without its server, run by the Python of vLLM's own environment: a request a line in, an answer a line out.

``python vllm_worker.py MODEL DTYPE [ADAPTER ...]`` reads ``{"prompts": [[ids]], "adapters": [index or null], ...}``.
"""

from __future__ import annotations

import json
import sys


def main() -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    model, dtype, *folders = sys.argv[1:]
    lora = {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": 8} if folders else {}
    engine = LLM(
        model, dtype=dtype, max_model_len=512, max_num_seqs=512, max_num_batched_tokens=8192, enforce_eager=True, **lora
    )
    adapters = [LoRARequest(f"a{number}", number, folder) for number, folder in enumerate(folders, 1)]
    print("@@ ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        settings = SamplingParams(temperature=asked["temperature"], max_tokens=asked["max_tokens"])
        chosen = [None if index is None else adapters[index] for index in asked["adapters"]]
        given = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        got = engine.generate(given, settings, lora_request=chosen if adapters else None, use_tqdm=False)
        print("@@ " + json.dumps([list(one.outputs[0].token_ids) for one in got]), flush=True)


if __name__ == "__main__":
    main()
