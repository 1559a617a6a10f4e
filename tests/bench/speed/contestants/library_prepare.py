"""The obvious library call for preparation: `datasets.map` with the tokenizer's chat template and a mask, then saved.

    python library_prepare.py SPEC.json

The prompt is tokenised with the generation prompt and the conversation as a whole, and what follows the prompt is
learned, as TRL does it for prompts and completions. ``batched`` of the spec: the tokenizer is given many conversations
at once; else one row after the other, as TRL maps. What a template writes behind the answer's end token is not learned.
"""

from __future__ import annotations

from typing import Any

import common
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer


def main() -> None:
    """Reads, tokenises and saves; the time is taken outside."""
    given = common.spec()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(given["model"])
    loaded = load_dataset("json", data_files=given["rows"], split="train", cache_dir=given["cache"])
    made = loaded.map(
        tokenised if given["batched"] else tokenised_row,
        batched=given["batched"],
        num_proc=given["processes"],
        remove_columns=loaded.column_names,
        fn_kwargs={"tokenizer": tokenizer, "max_length": given["max_length"]},
    )
    made.save_to_disk(given["out"])
    common.answer(rows=len(made))


def tokenised(rows: dict[str, list[str]], tokenizer: Any, max_length: int) -> dict[str, list[list[int]]]:
    """Columns of a batch -> its ids, and labels that are -100 where nothing is learned."""
    questions = [
        "\n".join(filter(None, texts)) for texts in zip(rows["instruction"], rows.get("input", []), strict=True)
    ]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    whole = [
        [*prompt, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, rows["output"], strict=True)
    ]
    prompt_ids = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole_ids = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"]
    end = tokenizer.eos_token_id
    found = [masked(*both, end) for both in zip(prompt_ids, whole_ids, strict=True)]
    return {
        "input_ids": [ids[:max_length] for ids in whole_ids],
        "labels": [labels[:max_length] for labels in found],
    }


def tokenised_row(row: dict[str, str], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """The same for one row."""
    columns = tokenised({name: [text] for name, text in row.items()}, tokenizer, max_length)
    return {name: values[0] for name, values in columns.items()}


def masked(prompt: list[int], whole: list[int], end: int) -> list[int]:
    """Labels of the answer and its end token."""
    if whole[: len(prompt)] != prompt:
        raise ValueError("the prompt is no prefix of the conversation")
    stop = len(whole) - whole[::-1].index(end)
    return [-100] * len(prompt) + whole[len(prompt) : stop] + [-100] * (len(whole) - stop)


if __name__ == "__main__":
    main()
