"""A SLURM of several nodes on one machine: munge, MariaDB, slurmdbd, slurmctld and a slurmd a node.

All its state lies in one folder and all its ports are drawn, so several can stand side by side. Every daemon is a
child that dies with this process.

    python tests/cluster/mini_slurm.py FOLDER      stands until Ctrl-C, and says what to export
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd", "mariadb-install-db", "setpriv")
NODES, CPUS = 4, 1
# Of runs on several nodes. The first name must resolve: the processes of a run meet at their first node's.
WIDE_NODES, WIDE_CPUS = ("localhost", "wide"), 4
# Until a service of a heavily loaded machine is up; nothing here sleeps this long on a free one.
PATIENCE = 600.0
_SBIN = "/usr/sbin:/sbin"

_CONF = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job starts again when its credential has expired: 121 s by default, and for values below 5.
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={ctld}
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=10
KillWait=10
MinJobAge=600
MaxArraySize=1001
MaxJobCount=20000
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
PropagateResourceLimits=NONE
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={root}/munge/socket
PartitionName=low Nodes={narrow} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes={narrow} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=wide Nodes={wide} MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=OFF
"""

_DBD_CONF = """
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser={user}
LogFile={root}/log/slurmdbd.log
PidFile={root}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={sql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
CommitDelay=1
"""


def missing() -> list[str]:
    """The programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:{_SBIN}") is None]


def eventually(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Waits until `condition` holds. Raises TimeoutError that says what never came."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {patience:.0f} s still not: {what}")
        time.sleep(0.1)


class MiniSlurm:
    """A running cluster; `environment` is what a user of it exports."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        names = ("ctld", "dbd", "sql", *self.nodes, *WIDE_NODES)
        self._ports = dict(zip(names, free_ports(len(names)), strict=True))
        path = f"{os.environ['PATH']}:{_SBIN}"
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(root / "etc" / "slurm.conf")}

    def up(self) -> None:
        self._configure()
        self._start("munged", "munged", "-F", "--force", *self._munge())
        eventually((self.root / "munge" / "socket").exists, "munge's socket")
        self._start_accounting()
        self.start_controller()
        for node in (*self.nodes, *WIDE_NODES):
            self.start_node(node)
        eventually(lambda: self.idle() == sorted((*self.nodes, *WIDE_NODES)), "all nodes idle")

    @property
    def nodes(self) -> list[str]:
        return [f"node{i}" for i in range(NODES)]

    def idle(self) -> list[str]:
        answer = self.ask("sinfo", "-h", "-N", "-p", "low,wide", "-t", "idle", "-o", "%N", check=False)
        return sorted(answer.split())

    def ask(self, *command: str, check: bool = True) -> str:
        """What a client program answers."""
        answer = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)
        if check and answer.returncode:
            raise RuntimeError(f"{' '.join(command)}: {answer.stderr.strip()}")
        return answer.stdout.strip()

    def start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D", "-i")
        eventually(lambda: "is UP" in self.ask("scontrol", "ping", check=False), "slurmctld")

    def stop_controller(self) -> None:
        self._end("slurmctld")

    def start_node(self, node: str) -> None:
        (self.root / "spool" / node).mkdir(parents=True, exist_ok=True)
        self._start(node, "slurmd", "-D", "-N", node, SLURMD_NODENAME=node)

    def kill_node(self, node: str) -> None:
        """The node vanishes: its slurmd, its step daemons and every process of its jobs get SIGKILL."""
        self._daemons.pop(node).kill()
        for pid in self.processes(SLURMD_NODENAME=node):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def down(self) -> None:
        """Ends everything, whatever state it is in."""
        with contextlib.suppress(Exception):
            self.ask("scancel", "-u", getpass.getuser())
        for node in (*self.nodes, *WIDE_NODES):
            if node in self._daemons:
                self.kill_node(node)
        for name in reversed(list(self._daemons)):
            self._end(name)

    def processes(self, **variables: str) -> list[int]:
        """Processes of this cluster whose environment has all of `variables`."""
        variables["SLURM_CONF"] = self.environment["SLURM_CONF"]
        wanted = {f"{name}={value}".encode() for name, value in variables.items()}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if wanted <= set(path.read_bytes().split(b"\0")):
                    found.append(int(path.parent.name))
        return found

    def _configure(self) -> None:
        for name in ("etc", "run", "log", "state", "spool", "munge", "sql"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        # munged insists that nobody else could have made its socket's folder.
        for folder in (self.root, self.root / "munge"):
            folder.chmod(0o755)
        host = socket.gethostname().split(".")[0]
        facts = {"root": self.root, "user": getpass.getuser(), "host": host, **self._ports}
        facts |= {"narrow": ",".join(self.nodes), "wide": ",".join(WIDE_NODES)}
        cpus = dict.fromkeys(self.nodes, CPUS) | dict.fromkeys(WIDE_NODES, WIDE_CPUS)
        nodes = "".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={self._ports[node]} CPUs={cpus[node]} "
            "RealMemory=64000 State=UNKNOWN\n"
            for node in cpus
        )
        (self.root / "etc" / "slurm.conf").write_text(_CONF.format(**facts) + nodes)
        (self.root / "etc" / "cgroup.conf").write_text("CgroupAutomount=no\n")
        database = self.root / "etc" / "slurmdbd.conf"
        database.write_text(_DBD_CONF.format(**facts))
        key = self.root / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        for secret in (database, key):
            secret.chmod(0o600)

    def _munge(self) -> list[str]:
        folder = self.root / "munge"
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={folder / name}" for option, name in files.items()]

    def _start_accounting(self) -> None:
        data, door = self.root / "sql", self.root / "run" / "sql.socket"
        user = f"--user={getpass.getuser()}"
        install = ("mariadb-install-db", "--no-defaults", user, "--auth-root-authentication-method=socket")
        self.ask(*install, "--skip-test-db", f"--datadir={data}")
        small = ("--innodb-buffer-pool-size=64M", "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin")
        where = (f"--datadir={data}", f"--socket={door}", f"--pid-file={self.root / 'run' / 'sql.pid'}")
        listen = ("--bind-address=127.0.0.1", f"--port={self._ports['sql']}", "--innodb-lock-wait-timeout=900")
        self._start("mariadbd", "mariadbd", "--no-defaults", user, *where, *listen, *small)
        client = ("mariadb", "--no-defaults", f"--socket={door}", f"--user={getpass.getuser()}")
        eventually(lambda: self.ask(*client, "-e", "select 1", check=False), "MariaDB")
        grants = "".join(
            f"create user slurm@'{host}' identified by 'slurm'; grant all on slurm_acct.* to slurm@'{host}'; "
            for host in ("127.0.0.1", "localhost")
        )
        self.ask(*client, "-e", f"create database slurm_acct; {grants}")
        self.start_accounting_daemon()
        eventually(lambda: "mini" in self._add_cluster(), "slurmdbd")

    def start_accounting_daemon(self) -> None:
        self._start("slurmdbd", "slurmdbd", "-D")

    def stop_accounting_daemon(self) -> None:
        self._end("slurmdbd")

    def _add_cluster(self) -> str:
        self.ask("timeout", "20", "sacctmgr", "-i", "add", "cluster", "mini", check=False)
        return self.ask("timeout", "20", "sacctmgr", "-n", "show", "cluster", "format=cluster", check=False)

    def _start(self, name: str, *command: str, **variables: str) -> None:
        with open(self.root / "log" / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


@contextmanager
def cluster(root: Path) -> Iterator[MiniSlurm]:
    """A cluster that is gone afterwards, also when it came up only in part."""
    slurm = MiniSlurm(root)
    try:
        slurm.up()
        yield slurm
    finally:
        slurm.down()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


if __name__ == "__main__":
    # A shell's background jobs do not hear Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with cluster(Path(sys.argv[1]).resolve()) as running, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={running.environment['SLURM_CONF']} PATH=$PATH:{_SBIN}", flush=True)
        signal.pause()
