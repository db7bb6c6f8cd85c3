"""Generate: a checkpoint answers in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..runtime.phase import PHASES, set_phase
from .errors import Refused
from .load import load, load_tokenizer


def generate(
    path: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool | None = None,
    dtype: torch.dtype | None = None,
    phase: str = "served",
) -> str:
    """The greedy continuation of a prompt, without the prompt.

    Args:
        path: A directory that ``load`` takes.
        prompt: What the user says, or the beginning of a text.
        max_new_tokens: Longest answer, in tokens.
        chat: Whether the prompt is wrapped in the tokenizer's chat template; default, when it has one.
        dtype: As for ``load``.
        phase: For linears with two arithmetics (W8A8_MIX): ``served`` runs the prompt as prefill and each token behind
            it as decode; ``prefill`` and ``decode`` run all in one.

    Raises:
        Refused: What ``load`` refuses; no readable tokenizer; ``chat`` without a template; an empty prompt.
    """
    if max_new_tokens < 1:
        raise Refused(f"max_new_tokens={max_new_tokens}: at least one token is generated")
    if any(0xD800 <= ord(character) < 0xE000 for character in prompt):
        raise Refused("the prompt is not UTF-8 text")
    tokenizer = load_tokenizer(path)
    if chat and not tokenizer.chat_template:
        raise Refused(f"{path}: the tokenizer has no chat template; leave chat out")
    if tokenizer.chat_template and chat is not False:
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        given = tokenizer(prompt, return_tensors="pt")
    tokens = given["input_ids"]
    if tokens.shape[-1] == 0:
        raise Refused("the prompt is empty: say something")
    if phase not in PHASES:
        raise Refused(f"phase {phase!r}: it is {', '.join(PHASES)}")
    model: Any = load(path, dtype=dtype)
    set_phase(model, phase)
    rows, highest = model.get_input_embeddings().get_parameter("weight").shape[0], int(tokens.max())
    if highest >= rows:
        raise Refused(
            f"{path}: the tokenizer gives token {highest}, and the model's vocabulary has {rows}: the tokenizer"
            " belongs to another model"
        )
    with torch.no_grad():
        answer = model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
    return tokenizer.decode(answer[0, tokens.shape[-1] :], skip_special_tokens=True).strip()
