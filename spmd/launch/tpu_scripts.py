"""Bash scripts that run on the workers of a TPU VM, with fields in braces."""

SETUP = """set -e; mkdir -p {name}; tar -xzf {name}.tar.gz -C {name}; cd {name} || exit
export PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || uv venv --quiet --python 3.11 .venv
uv pip install --quiet --python .venv/bin/python -r requirements/tpu.txt"""

# The run outlives the connection; its exit code and process id are in files beside its log.
BEGIN = """set -e; cd {name} || exit; rm -f exit stopped pid
[ ! -e log ] || mv log "log.$(date +%s)"; touch log
SPMD_RUN_ATTEMPT=$(date +%s)
export SPMD_RUN_ATTEMPT SPMD_RUN_TOKEN={token}
# shellcheck disable=SC2016
nohup setsid bash -c '"$@" >> log 2>&1 & echo $! > pid; wait $!; echo $? > exit' run \\
  .venv/bin/python {command} < /dev/null > /dev/null 2>&1 &
for _ in $(seq 100); do [ -s pid ] && break; sleep 0.1; done"""

# After a reboot the id in `pid` may belong to another process: check that it is a run.py.
STATUS = """cd {name} 2> /dev/null || exit 0
if grep -qs run.py "/proc/$(cat pid 2> /dev/null)/cmdline"; then echo spmd-status=running
elif [ -e stopped ]; then echo spmd-status=stopped
elif [ -s exit ]; then echo "spmd-status=$(cat exit)"
elif [ -e log ]; then echo spmd-status=75; fi"""

FOLLOW = """cd {name} || exit; tail --lines={lines} --follow --pid="$(cat pid)" log"""

LOG = """cd {name} && cat log"""

# The other workers notice the loss of a worker themselves; one that hangs is killed.
FINISH = """(cd {name} || exit; timeout 120 tail --pid="$(cat pid)" -f /dev/null || kill -KILL "$(cat pid)")
sleep 1
"""

STOP = """cd {name} 2> /dev/null || exit 0; touch stopped
if grep -qs run.py "/proc/$(cat pid)/cmdline"; then kill -TERM "$(cat pid)"
  timeout 300 tail --pid="$(cat pid)" -f /dev/null; fi"""
