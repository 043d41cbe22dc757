"""A process that was forked after a model was made raises an error instead of hanging."""

import subprocess
import sys

CHILD = """
import multiprocessing, sys
from mlx_esm_hf import MLXEsmConfig, MLXEsmModel

config = MLXEsmConfig(vocab_size=33, pad_token_id=1, mask_token_id=32, hidden_size=8, num_hidden_layers=1,
                      num_attention_heads=2, intermediate_size=8, position_embedding_type="rotary")

def use(model):
    (model or MLXEsmModel(config))([[0, 5, 2]]).last_hidden_state.tolist()
    print("computed", flush=True)

if __name__ == "__main__":
    how, before = sys.argv[1:]
    model = None
    if before == "before":
        model = MLXEsmModel(config)
        use(model)
    child = multiprocessing.get_context(how).Process(target=use, args=(None if how != "fork" else model,))
    child.start()
    child.join(300)
    print("ended", child.exitcode)
"""


def run(tmp_path, *arguments):
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=600)
    return done.stdout.split("\n"), done.stderr


def test_fork_after_a_model(tmp_path):
    out, errors = run(tmp_path, "fork", "before")
    assert out[:2] == ["computed", "ended 1"]
    assert "RuntimeError: This process was forked from" in errors and "spawn" in errors


def test_fork_before_any_model(tmp_path):
    """That is as good as a new process."""
    out, errors = run(tmp_path, "fork", "after")
    assert out[:2] == ["computed", "ended 0"], errors


def test_spawn_after_a_model(tmp_path):
    out, errors = run(tmp_path, "spawn", "before")
    assert out[:3] == ["computed", "computed", "ended 0"], errors


THREADS = """
import threading
import mlx.core as mx
from mlx_esm_hf.runtime.process import check_process

def work():
    check_process()  # as a model does
    mx.eval(mx.random.normal((2,)))

threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_do_not_abort_the_process_at_exit():
    """Without `_ClearStreams`, most of such processes abort, in MLX."""
    codes = [subprocess.run([sys.executable, "-c", THREADS], capture_output=True).returncode for _ in range(4)]
    assert codes == [0] * 4
