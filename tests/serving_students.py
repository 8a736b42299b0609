"""A small student for the tests of predict, chat and serve: random weights, letters as tokens, a chat template, a task."""

from test_predict import CHAT, PAIRS, REVIEWS, letters_tokenizer

import bitdistill
from bitdistill.student.loading import tokenizer_settings
from tiny_students import student

__all__ = ["PAIRS", "talking_student"]


def talking_student(path, task=REVIEWS, chat_template=CHAT, context=512):
    """Writes a student that never ends a text by itself."""
    model = student("qwen3")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.config.max_position_embeddings = context
    tokenizer = letters_tokenizer(chat_template)
    settings = tokenizer_settings(tokenizer) | {"eos_token": None}
    bitdistill.write(path, model, tokenizer, task=task, max_length=40, metadata={"tokenizer": settings})
    return path
