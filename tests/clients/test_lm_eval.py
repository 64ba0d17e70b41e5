"""lm-eval's local-completions: a task's scores are the ones that `foretoken logits` gives.

Not for the quality of a model: the task is a handful of lines. Input: continuations.jsonl.
"""

import pathlib

import lm_eval
import numpy
import pytest
import safetensors.numpy
from conftest import DEMO, foretoken
from lm_eval.tasks import TaskManager

# Which text goes on: made for this test, in the demo model's own language.
TASK = {
    "task": "continuations",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "train",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1},
}
DATA = pathlib.Path(__file__).with_name("continuations.jsonl")


def loglikelihood(folder, context, continuation):
    """Log-probability of a continuation's tokens, and whether each is the likeliest, from all logits."""
    out = folder / "logits.safetensors"
    # `serve` rounds a float head as `--head auto` does.
    foretoken("logits", "demo", "--head", "auto", "--ids", ",".join(map(str, context + continuation)), "--out", out)
    rows = safetensors.numpy.load_file(out)["logits"].astype(numpy.float64)
    rows = rows[len(context) - 1 : -1]
    logs = rows - numpy.log(numpy.exp(rows - rows.max(1, keepdims=True)).sum(1, keepdims=True)) - rows.max(1, keepdims=True)
    of = numpy.arange(len(continuation)), continuation
    return logs[of].sum(), bool((logs.argmax(1) == continuation).all())


def completions(server, batch, **tokenizer):
    """lm-eval's client of a server."""
    return lm_eval.api.registry.get_model("local-completions")(
        model="demo",
        base_url=f"{server.root}/v1/completions",
        batch_size=batch,
        num_concurrent=3,
        max_length=2048,
        **tokenizer,
    )


# The second asks the server itself for tokens: /tokenizer_info, /tokenize, /detokenize.
LOCAL = {"tokenizer_backend": "huggingface", "tokenizer": str(DEMO)}
REMOTE = {"tokenizer_backend": "remote"}


def test_the_remote_tokenizer_is_the_local_one(server):
    local, remote = completions(server, 1, **LOCAL), completions(server, 1, **REMOTE)
    # Found without being asked for, too.
    assert completions(server, 1).tokenizer_backend == "remote"
    for text in ["fn main() {", "let x = \"größer\";\n\n\t// 中文 🦀", " ", "<|endoftext|>"]:
        tokens = local.tok_encode(text)
        assert remote.tok_encode(text) == tokens, text
        assert remote.tokenizer.decode(tokens) == local.tokenizer.decode(tokens) == text
    assert remote.eot_token_id == local.eot_token_id
    assert remote.prefix_token_id == local.prefix_token_id


@pytest.mark.parametrize("batch, tokenizer", [(1, LOCAL), (4, LOCAL), (4, REMOTE)], ids=["one", "four", "remote"])
def test_scores_are_those_of_the_logits(server, tmp_path, batch, tokenizer):
    model = completions(server, batch, **tokenizer)
    task = {**TASK, "dataset_kwargs": {"data_files": str(DATA), "cache_dir": str(tmp_path)}}
    manager = TaskManager(include_defaults=False)
    report = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    correct, samples = [], report["samples"]["continuations"]
    assert len(samples) == 6
    for sample in samples:
        expected = []
        for argument, (found,) in zip(sample["arguments"], sample["resps"]):
            context, continuation = model._encode_pair(*argument)
            score, greedy = loglikelihood(tmp_path, context, continuation)
            # The server's are single-precision sums over 4096 logits: about 1e-6 a token.
            assert abs(found[0] - score) < 1e-4, argument
            assert found[1] == greedy, argument
            expected.append(score)
        correct.append(numpy.argmax(expected) == sample["target"])
    assert report["results"]["continuations"]["acc,none"] == numpy.mean(correct)
    # Nonsense beside code is told apart, or the task would say nothing.
    assert numpy.mean(correct) >= 0.8
