"""A sampler never outlives the command that started it, and says why it did not start."""

import os
import signal
import subprocess
import sys

import pytest

from ares_jax.errors import UserError
from ares_jax.service import process
from ares_jax.service.process import start_sampler
from tests.service import fake

_CHILD = "import os, sys, time; from ares_jax.service.process import die_with; die_with(int(sys.argv[1])); {}time.sleep(60)"
_PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid())], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_it_ends_when_its_parent_is_killed():
    code = _CHILD.format("print('ready', flush=True); ")
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert not gone(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert fake.until(lambda: gone(child), 10)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_it_does_not_start_when_its_parent_is_gone_already():
    child = subprocess.run([sys.executable, "-c", _CHILD.format(""), str(os.getpid() + 1)], timeout=30)
    assert child.returncode == 1


def test_it_has_the_time_that_its_requests_have_to_end(monkeypatch):
    monkeypatch.setattr(process, "_MORE", 1.0)
    slow = "import signal, sys, time; signal.signal(15, lambda *_: (time.sleep(2), sys.exit(0))); print(flush=True); "
    slow += "time.sleep(60)"
    for seconds, code in ((60.0, 0), (0.0, -signal.SIGKILL)):
        child = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE)
        child.stdout.readline()
        process.SamplerProcess(child, "", seconds).stop()
        assert child.returncode == code
    child = subprocess.Popen([sys.executable, "-c", slow], stdout=subprocess.PIPE)
    child.stdout.readline()
    with pytest.raises(KeyboardInterrupt), process.SamplerProcess(child, "", 60.0):
        raise KeyboardInterrupt
    assert child.returncode == -signal.SIGKILL  # nobody waits for its answers


def test_a_sampler_that_ends_at_once_is_reported_with_its_log(tmp_path):
    with pytest.raises(UserError, match="the sampler ended with [1-9].*sampler.log ends with: .*nowhere"):
        start_sampler(["--config=/nowhere/config.py", f"--workdir={tmp_path}"], folder=tmp_path, timeout=60)
