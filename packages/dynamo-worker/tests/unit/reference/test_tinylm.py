"""The bundled model answers, with its own tokenizer, what it was trained on."""

import pytest
from parts import TINYLM, answer, build_core, generate_request
from tokenizers import Tokenizer

from dynamo_core.enums import FinishReason

QUESTIONS = {
    "What is the capital of Japan?": "Tokyo",
    "What is the capital of Norway?": "Oslo",
    "Count from 3 to 9.": "3, 4, 5, 6, 7, 8, 9",
    "Give me JSON for a red fox named Anna.": '{"name": "Anna", "animal": "fox", "color": "red"}',
    "Think step by step: what is 2 times 3?": "</think>",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_it_answers(question: str) -> None:
    tokenizer = Tokenizer.from_file(str(TINYLM / "tokenizer.json"))
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    found = answer(build_core(), generate_request(tokenizer.encode(prompt).ids, max_tokens=100, ignore_eos=False))
    assert QUESTIONS[question] in tokenizer.decode(found.tokens[0], skip_special_tokens=False)
    assert found.reasons[0] is FinishReason.EOS


def test_its_files_come_with_the_package() -> None:
    names = {path.name for path in TINYLM.iterdir()}
    assert {"README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"} <= names
