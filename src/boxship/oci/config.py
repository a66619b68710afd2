"""config.json: the configuration of a container, as typed structures.

Runs in: the runtime, and whatever writes bundles.
Spec: runtime-spec 1.3.0, config.md, config-linux.md and config-vm.md. The parts for other systems (solaris, windows,
zos, freebsd) are kept as they are in `Spec.extra`.
Not here: rules that concern several fields (`boxship.oci.validate`), the default (`boxship.oci.defaults`).

A field without a default is one without which the configuration has no meaning; where the specification demands a
field and runc takes its zero value instead, so does this. Words about a bad value are runc's where it has some.
"""

from __future__ import annotations

from boxship.oci.struct import ZERO, Choice, Struct, i32, i64, u16, u32, u64

SPEC_VERSION = "1.3.0"

NamespaceType = str
DeviceType = str
CgroupDeviceType = str
RlimitType = str
Propagation = str
IOPriorityClass = str
SchedulerPolicy = str
SchedulerFlag = str
MemoryPolicyMode = str
MemoryPolicyFlag = str
PersonalityDomain = str
Clock = str
SeccompAction = str
SeccompArch = str
SeccompFlag = str
SeccompOperator = str

CHOICES = {
    "NamespaceType": Choice(
        "namespace %q does not exist", "pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time",
    ),
    "DeviceType": Choice("invalid device type %q", "c", "u", "b", "p"),
    "CgroupDeviceType": Choice("invalid cgroup device type %q", "a", "c", "b"),
    "RlimitType": Choice(
        "wrong rlimit value: %s", "RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE",
        "RLIMIT_LOCKS", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_NOFILE", "RLIMIT_NPROC",
        "RLIMIT_RSS", "RLIMIT_RTPRIO", "RLIMIT_RTTIME", "RLIMIT_SIGPENDING", "RLIMIT_STACK",
    ),
    "Propagation": Choice(
        "rootfsPropagation=%s is not supported", "private", "rprivate", "slave", "rslave", "shared", "rshared",
        "unbindable", "runbindable",
    ),
    "IOPriorityClass": Choice(
        "invalid ioPriority.Class: %q", "IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE",
    ),
    "SchedulerPolicy": Choice(
        "invalid scheduler policy: %s", "SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO",
        "SCHED_IDLE", "SCHED_DEADLINE",
    ),
    "SchedulerFlag": Choice(
        "invalid scheduler flag: %s", "SCHED_FLAG_RESET_ON_FORK", "SCHED_FLAG_RECLAIM", "SCHED_FLAG_DL_OVERRUN",
        "SCHED_FLAG_KEEP_POLICY", "SCHED_FLAG_KEEP_PARAMS", "SCHED_FLAG_UTIL_CLAMP_MIN",
        "SCHED_FLAG_UTIL_CLAMP_MAX",
    ),
    "MemoryPolicyMode": Choice(
        "invalid memory policy mode %q", "MPOL_DEFAULT", "MPOL_BIND", "MPOL_INTERLEAVE",
        "MPOL_WEIGHTED_INTERLEAVE", "MPOL_PREFERRED", "MPOL_PREFERRED_MANY", "MPOL_LOCAL",
    ),
    "MemoryPolicyFlag": Choice(
        "invalid memory policy flag %q", "MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES",
    ),
    "PersonalityDomain": Choice("invalid personality domain %s", "LINUX", "LINUX32"),
    "SeccompAction": Choice(
        "string %s is not a valid action for seccomp", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
        "SCMP_ACT_KILL_THREAD", "SCMP_ACT_TRAP", "SCMP_ACT_ERRNO", "SCMP_ACT_TRACE", "SCMP_ACT_ALLOW",
        "SCMP_ACT_LOG", "SCMP_ACT_NOTIFY",
    ),
    "SeccompArch": Choice(
        "string %s is not a valid arch for seccomp", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64", "SCMP_ARCH_X32",
        "SCMP_ARCH_ARM", "SCMP_ARCH_AARCH64", "SCMP_ARCH_MIPS", "SCMP_ARCH_MIPS64", "SCMP_ARCH_MIPS64N32",
        "SCMP_ARCH_MIPSEL", "SCMP_ARCH_MIPSEL64", "SCMP_ARCH_MIPSEL64N32", "SCMP_ARCH_PPC", "SCMP_ARCH_PPC64",
        "SCMP_ARCH_PPC64LE", "SCMP_ARCH_S390", "SCMP_ARCH_S390X", "SCMP_ARCH_PARISC", "SCMP_ARCH_PARISC64",
        "SCMP_ARCH_RISCV64", "SCMP_ARCH_LOONGARCH64", "SCMP_ARCH_M68K", "SCMP_ARCH_SH", "SCMP_ARCH_SHEB",
    ),
    "SeccompFlag": Choice(
        "seccomp flag %s is not known to runc", "SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG",
        "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
    ),
    "SeccompOperator": Choice(
        "string %s is not a valid operator for seccomp", "SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE",
        "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ",
    ),
}


# process


class Box(Struct):
    """Size of a terminal in characters."""

    _always = ("height", "width")
    height: u64 = 0
    width: u64 = 0


class User(Struct):
    """Who the process is inside the container; `username` is for Windows."""

    _always = ("uid", "gid")
    uid: u32 = 0
    gid: u32 = 0
    umask: u32 | None = None
    additional_gids: list[u32] = []
    username: str = ""


class Capabilities(Struct):
    """Names as in capabilities(7); those that this kernel does not know are dropped by the runtime, with a warning."""

    bounding: list[str] = []
    effective: list[str] = []
    inheritable: list[str] = []
    permitted: list[str] = []
    ambient: list[str] = []


class Rlimit(Struct):
    """One limit of getrlimit(2); RLIM_INFINITY is 2**64 - 1."""

    _always = ("hard", "soft")
    type: RlimitType
    hard: u64 = 0
    soft: u64 = 0


class Scheduler(Struct):
    """sched_setattr(2); `runtime`, `deadline` and `period` in nanoseconds."""

    policy: SchedulerPolicy
    nice: i32 = 0
    priority: i32 = 0
    flags: list[SchedulerFlag] = []
    runtime: u64 = 0
    deadline: u64 = 0
    period: u64 = 0


class IOPriority(Struct):
    """ioprio_set(2)."""

    _always = ("priority",)
    class_: IOPriorityClass
    priority: i64 = 0


class CPUAffinity(Struct):
    """CPU lists ("0-3,7") of a process that joins the container: before and after it has moved into its cgroup."""

    initial: str = ""
    final: str = ""


class Process(Struct):
    """The program of the container, or one that joins it. `cwd` and `args` are checked by `validate`, as runc does."""

    _wire = {"exec_cpu_affinity": "execCPUAffinity"}
    _always = ("user", "cwd")
    terminal: bool = False
    console_size: Box | None = None
    user: User = ZERO
    args: list[str] = []
    command_line: str = ""
    env: list[str] = []
    cwd: str = ""
    capabilities: Capabilities | None = None
    rlimits: list[Rlimit] = []
    no_new_privileges: bool = False
    apparmor_profile: str = ""
    oom_score_adj: int | None = None
    scheduler: Scheduler | None = None
    selinux_label: str = ""
    io_priority: IOPriority | None = None
    exec_cpu_affinity: CPUAffinity | None = None


# root, mounts, hooks


class Root(Struct):
    """The root file system; a relative `path` starts at the bundle."""

    path: str
    readonly: bool = False


class IDMapping(Struct):
    """`size` ids from `container_id` on inside are those from `host_id` on outside."""

    _wire = {"container_id": "containerID", "host_id": "hostID"}
    container_id: u32
    host_id: u32
    size: u32


class Mount(Struct):
    """A mount, in the order of the list; `options` as mount(8) and the runtime's own."""

    destination: str
    type: str = ""
    source: str = ""
    options: list[str] = []
    uid_mappings: list[IDMapping] = []
    gid_mappings: list[IDMapping] = []


class Hook(Struct):
    """A program to run at a point of the life cycle; `timeout` in seconds."""

    path: str
    args: list[str] = []
    env: list[str] = []
    timeout: int | None = None


class Hooks(Struct):
    """Programs by point of the life cycle, in the order in which they come to run."""

    prestart: list[Hook] = []
    create_runtime: list[Hook] = []
    create_container: list[Hook] = []
    start_container: list[Hook] = []
    poststart: list[Hook] = []
    poststop: list[Hook] = []


# linux.resources


class CgroupDevice(Struct):
    """A rule of the devices cgroup; None for `major` or `minor` is any."""

    _always = ("allow",)
    allow: bool = False
    type: CgroupDeviceType = ""
    major: i64 | None = None
    minor: i64 | None = None
    access: str = ""


class Memory(Struct):
    """Limits in bytes, -1 for none; `swap` is memory plus swap."""

    _wire = {"kernel_tcp": "kernelTCP", "disable_oom_killer": "disableOOMKiller"}
    limit: i64 | None = None
    reservation: i64 | None = None
    swap: i64 | None = None
    kernel: i64 | None = None
    kernel_tcp: i64 | None = None
    swappiness: u64 | None = None
    disable_oom_killer: bool | None = None
    use_hierarchy: bool | None = None
    check_before_update: bool | None = None


class CPU(Struct):
    """CPU time (microseconds, `quota` -1 for no limit) and placement."""

    shares: u64 | None = None
    quota: i64 | None = None
    burst: u64 | None = None
    period: u64 | None = None
    realtime_runtime: i64 | None = None
    realtime_period: u64 | None = None
    cpus: str = ""
    mems: str = ""
    idle: i64 | None = None


class Pids(Struct):
    """How many tasks; -1 for no limit, None for leave it alone."""

    limit: i64 | None = None


class BlockIODevice(Struct):
    """A block device by number."""

    _always = ("major", "minor")
    major: i64 = 0
    minor: i64 = 0


class WeightDevice(BlockIODevice):
    """A share of one device's time."""

    weight: u16 | None = None
    leaf_weight: u16 | None = None


class ThrottleDevice(BlockIODevice):
    """A limit per second, in bytes or operations."""

    rate: u64


class BlockIO(Struct):
    """Shares and limits of block devices."""

    _wire = {
        "throttle_read_iops_device": "throttleReadIOPSDevice",
        "throttle_write_iops_device": "throttleWriteIOPSDevice",
    }
    weight: u16 | None = None
    leaf_weight: u16 | None = None
    weight_device: list[WeightDevice] = []
    throttle_read_bps_device: list[ThrottleDevice] = []
    throttle_write_bps_device: list[ThrottleDevice] = []
    throttle_read_iops_device: list[ThrottleDevice] = []
    throttle_write_iops_device: list[ThrottleDevice] = []


class HugepageLimit(Struct):
    """`page_size` as in "2MB", `limit` in bytes."""

    _always = ("limit",)
    page_size: str
    limit: u64 = 0


class InterfacePriority(Struct):
    """net_prio: the priority of what the container sends on the interface `name`."""

    _always = ("priority",)
    name: str
    priority: u32 = 0


class Network(Struct):
    """net_cls and net_prio."""

    _wire = {"class_id": "classID"}
    class_id: u32 | None = None
    priorities: list[InterfacePriority] = []


class Rdma(Struct):
    """Limits of one RDMA device."""

    hca_handles: u32 | None = None
    hca_objects: u32 | None = None


class Resources(Struct):
    """What the container's cgroup limits; also the text that `update` reads."""

    _wire = {"block_io": "blockIO"}
    devices: list[CgroupDevice] = []
    memory: Memory | None = None
    cpu: CPU | None = None
    pids: Pids | None = None
    block_io: BlockIO | None = None
    hugepage_limits: list[HugepageLimit] = []
    network: Network | None = None
    rdma: dict[str, Rdma] = {}
    unified: dict[str, str] = {}


# linux.seccomp


class SyscallArg(Struct):
    """A condition on an argument; `value_two` is what SCMP_CMP_MASKED_EQ compares with after masking by `value`."""

    _always = ("index", "value")
    index: u64 = 0
    value: u64 = 0
    value_two: u64 = 0
    op: SeccompOperator


class Syscall(Struct):
    """What happens to calls of these names when all `args` hold."""

    _always = ("names",)
    names: list[str] = []
    action: SeccompAction
    errno_ret: u64 | None = None
    args: list[SyscallArg] = []


class Seccomp(Struct):
    """A filter. `flags` tells the absent list (None: the runtime's default) from the empty one (no flags)."""

    _always = ("default_action",)
    default_action: SeccompAction = ""
    default_errno_ret: u64 | None = None
    architectures: list[SeccompArch] = []
    flags: list[SeccompFlag] | None = None
    listener_path: str = ""
    listener_metadata: str = ""
    syscalls: list[Syscall] = []


# linux


class Namespace(Struct):
    """A namespace to make, or with `path` to join."""

    type: NamespaceType
    path: str = ""


class Device(Struct):
    """A device node to make."""

    _always = ("major", "minor")
    path: str
    type: DeviceType
    major: i64 = 0
    minor: i64 = 0
    file_mode: u32 | None = None
    uid: u32 | None = None
    gid: u32 | None = None


class NetDevice(Struct):
    """A network device to move in; `name` is its new name, "" keeps the old."""

    name: str = ""


class IntelRdt(Struct):
    """Cache and memory bandwidth by resctrl."""

    _wire = {"clos_id": "closID"}
    clos_id: str = ""
    schemata: list[str] = []
    l3_cache_schema: str = ""
    mem_bw_schema: str = ""
    enable_monitoring: bool = False


class MemoryPolicy(Struct):
    """set_mempolicy(2); `nodes` as in "0-1,3"."""

    mode: MemoryPolicyMode
    nodes: str = ""
    flags: list[MemoryPolicyFlag] = []


class Personality(Struct):
    """personality(2); no flags are defined yet."""

    domain: PersonalityDomain
    flags: list[str] = []


class TimeOffset(Struct):
    """How far the container's clock is ahead of the machine's."""

    secs: i64 = 0
    nanosecs: u32 = 0


class Linux(Struct):
    """What only Linux has."""

    uid_mappings: list[IDMapping] = []
    gid_mappings: list[IDMapping] = []
    sysctl: dict[str, str] = {}
    resources: Resources | None = None
    cgroups_path: str = ""
    namespaces: list[Namespace] = []
    devices: list[Device] = []
    net_devices: dict[str, NetDevice] = {}
    seccomp: Seccomp | None = None
    rootfs_propagation: Propagation = ""
    masked_paths: list[str] = []
    readonly_paths: list[str] = []
    mount_label: str = ""
    intel_rdt: IntelRdt | None = None
    memory_policy: MemoryPolicy | None = None
    personality: Personality | None = None
    time_offsets: dict[str, TimeOffset] = {}


# vm


class Hypervisor(Struct):
    """The program that runs the virtual machine."""

    path: str = ""
    parameters: list[str] = []


class Kernel(Struct):
    """The guest's kernel."""

    path: str = ""
    parameters: list[str] = []
    initrd: str = ""


class VMImage(Struct):
    """The guest's root image."""

    path: str
    format: str


class IOMems(Struct):
    """Pages of I/O memory to hand to the guest."""

    _wire = {"first_gfn": "firstGFN", "first_mfn": "firstMFN", "nr_mfns": "nrMFNs"}
    first_gfn: u64 | None = None
    first_mfn: u64
    nr_mfns: u64


class HWConfig(Struct):
    """The guest's hardware."""

    device_tree: str = ""
    vcpus: u32 | None = None
    memory: u64 | None = None
    dtdevs: list[str] = []
    iomems: list[IOMems] = []
    irqs: list[u32] = []


class VM(Struct):
    """A container that is a virtual machine."""

    hypervisor: Hypervisor = ZERO
    kernel: Kernel = ZERO
    image: VMImage | None = None
    hwconfig: HWConfig | None = None


class Spec(Struct):
    """The whole of config.json."""

    oci_version: str
    process: Process | None = None
    root: Root | None = None
    hostname: str = ""
    domainname: str = ""
    mounts: list[Mount] = []
    hooks: Hooks | None = None
    annotations: dict[str, str] = {}
    linux: Linux | None = None
    vm: VM | None = None
