"""langchain-openai: completions whole, streamed and in a batch.

Not for chats (test_chat.py). Input: the demo pair of conftest.py.
"""

import pytest
from conftest import PROMPT, run
from langchain_openai import OpenAI


@pytest.fixture
def llm(server):
    return OpenAI(base_url=f"{server.root}/v1", api_key="none", model="demo", temperature=0, max_tokens=16)


def test_invoke_stream_and_batch_agree(llm):
    text = run("demo", PROMPT, "--max-tokens", 16)["text"]
    assert llm.invoke(PROMPT) == text
    assert "".join(llm.stream(PROMPT)) == text
    assert llm.batch([PROMPT, "use std::", PROMPT])[::2] == [text, text]


def test_generations_tell_tokens_and_reason(llm):
    answer = llm.generate([PROMPT])
    assert answer.llm_output["token_usage"]["completion_tokens"] == 16
    assert answer.generations[0][0].generation_info["finish_reason"] == "length"
