//! Filters of system calls, one for each kind of thread. A call that is not allowed kills the process (SIGSYS), which
//! the shim reports: a thread that makes one is either taken over by the guest or newer than its list.
//!
//! The lists were found by running guests under `strace -f` and hold what was seen, with the few calls of the C library
//! and the Rust runtime that depend on chance (allocation, contention, a panic's last words). Calls that would
//! widen what a thread may do are limited by their arguments: `ioctl` to the requests of KVM that a running VM makes,
//! `mmap` and `mprotect` to memory that cannot be executed, `tgkill` to this process, `fcntl` to flags and copies.

use std::collections::BTreeMap;

use kvm_bindings::{
    kvm_cpuid2, kvm_ioeventfd, kvm_irq_routing, kvm_irqfd, kvm_lapic_state, kvm_msrs, kvm_regs,
    kvm_sregs,
};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};
use vhost::vhost_kern::vhost_binding::{
    VHOST_GET_FEATURES, VHOST_GET_VRING_BASE, VHOST_NET_SET_BACKEND, VHOST_SET_FEATURES,
    VHOST_SET_MEM_TABLE, VHOST_SET_OWNER, VHOST_SET_VRING_ADDR, VHOST_SET_VRING_BASE,
    VHOST_SET_VRING_CALL, VHOST_SET_VRING_ERR, VHOST_SET_VRING_KICK, VHOST_SET_VRING_NUM,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

use crate::virtio::DeviceType;

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// The main thread, which serves the control socket.
    Control,
    /// A vCPU: KVM_RUN and the exits it returns with.
    Vcpu,
    /// The worker of a virtio device.
    Device(DeviceType),
    /// What makes vCPUs, disks and network devices, and their threads, while the guest runs. Those inherit this filter, so
    /// that it has to allow all that theirs do.
    Workshop,
    /// What watches a shared folder on the guest's behalf.
    Watch,
    /// The worker of a device whose requests another process serves.
    FrontEnd,
}

/// Why a thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub(super) enum SeccompError {
    #[error("cannot compile the filter of system calls")]
    Compile(#[source] BackendError),
    #[error("cannot install the filter of system calls")]
    Install(#[source] seccompiler::Error),
}

/// The rules of a filter: a call is allowed when one of its rules matches, or when it has none.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Confines the calling thread, and the threads that it starts later, for good.
pub(super) fn install(role: Role) -> Result<(), SeccompError> {
    if role == Role::Workshop {
        apply(compile_without_clone3())?;
    }
    apply(compile(role))
}

fn apply(program: Result<BpfProgram, BackendError>) -> Result<(), SeccompError> {
    let program = program.map_err(SeccompError::Compile)?;
    seccompiler::apply_filter(&program).map_err(SeccompError::Install)
}

/// What clone3(2) does stands in memory, where no filter sees it. The C library makes threads by clone(2) where there is
/// no clone3, so there is none. Of several filters the strictest counts.
fn compile_without_clone3() -> Result<BpfProgram, BackendError> {
    let mut rules = Rules::new();
    allow(&mut rules, &[libc::SYS_clone3]);
    let not_there = u32::try_from(libc::ENOSYS).expect("an error number is positive");
    SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(not_there),
        TargetArch::x86_64,
    )?
    .try_into()
}

fn compile(role: Role) -> Result<BpfProgram, BackendError> {
    let mut rules = Rules::new();
    allow(&mut rules, EVERY_THREAD);
    allow_within_limits(&mut rules)?;
    match role {
        Role::Control => allow(&mut rules, CONTROL),
        Role::Watch => allow(&mut rules, WATCH),
        Role::FrontEnd => {
            allow(&mut rules, DEVICE);
            allow(&mut rules, FRONT_END);
        }
        Role::Vcpu => {
            allow(&mut rules, VCPU);
            allow_ioctls(&mut rules, VCPU_IOCTLS)?;
        }
        Role::Workshop => {
            for calls in [VCPU, DEVICE, BLOCK, NET, WORKSHOP] {
                allow(&mut rules, calls);
            }
            let ioctls = [
                VCPU_IOCTLS,
                BLOCK_IOCTLS,
                &net_ioctls(),
                WORKSHOP_IOCTLS,
                &device_ioctls(),
            ];
            allow_ioctls(&mut rules, &ioctls.concat())?;
            allow_use_of_rings(&mut rules)?;
            allow_argument(&mut rules, libc::SYS_io_uring_register, 1, RING_REQUESTS)?;
            allow_first(&mut rules, libc::SYS_clone, &[THREAD])?;
            allow_first(&mut rules, libc::SYS_prctl, PRCTL_REQUESTS)?;
            allow_first(&mut rules, libc::SYS_seccomp, &[SECCOMP_SET_MODE_FILTER])?;
        }
        Role::Device(device) => {
            allow(&mut rules, DEVICE);
            match device {
                DeviceType::Fs => {
                    allow(&mut rules, FILE_SERVER);
                    allow(&mut rules, WINDOW);
                }
                DeviceType::P9 => allow(&mut rules, FILE_SERVER),
                DeviceType::Block => {
                    allow(&mut rules, BLOCK);
                    allow_ioctls(&mut rules, BLOCK_IOCTLS)?;
                    allow_use_of_rings(&mut rules)?;
                }
                DeviceType::Net => {
                    allow(&mut rules, NET);
                    allow_ioctls(&mut rules, &net_ioctls())?;
                }
                DeviceType::Vsock => allow(&mut rules, VSOCK),
                _ => {}
            }
        }
    }
    SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

fn allow(rules: &mut Rules, calls: &[i64]) {
    for &call in calls {
        rules.insert(call, Vec::new());
    }
}

fn allow_ioctls(rules: &mut Rules, requests: &[u64]) -> Result<(), BackendError> {
    allow_argument(rules, libc::SYS_ioctl, 1, requests)
}

/// Allows a call with one of these values as its first argument.
fn allow_first(rules: &mut Rules, call: i64, values: &[u64]) -> Result<(), BackendError> {
    allow_argument(rules, call, 0, values)
}

fn allow_argument(
    rules: &mut Rules,
    call: i64,
    argument: u8,
    values: &[u64],
) -> Result<(), BackendError> {
    let rule = |&value: &u64| SeccompRule::new(vec![equals(argument, value)?]);
    rules.insert(call, values.iter().map(rule).collect::<Result<_, _>>()?);
    Ok(())
}

/// To give the kernel what is in a ring that is there, and to wait for it.
fn allow_use_of_rings(rules: &mut Rules) -> Result<(), BackendError> {
    allow_argument(rules, libc::SYS_io_uring_enter, 3, RING_FLAGS)
}

fn allow_within_limits(rules: &mut Rules) -> Result<(), BackendError> {
    let not_executable = || -> Result<_, BackendError> {
        SeccompRule::new(vec![SeccompCondition::new(
            2,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::MaskedEq(PROT_EXEC),
            0,
        )?])
    };
    rules.insert(libc::SYS_mmap, vec![not_executable()?]);
    rules.insert(libc::SYS_mprotect, vec![not_executable()?]);
    allow_argument(rules, libc::SYS_fcntl, 1, FCNTL_REQUESTS)?;
    allow_first(rules, libc::SYS_tgkill, &[std::process::id().into()])
}

/// The lower 32 bits of an argument, which are all that the calls limited here look at.
fn equals(argument: u8, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
}

const PROT_EXEC: u64 = 4;

/// Flags and copies of descriptors. Others would have the kernel send signals to any process (F_SETOWN, F_SETSIG).
const FCNTL_REQUESTS: &[u64] = &[
    1,    // F_GETFD
    3,    // F_GETFL
    4,    // F_SETFL
    1030, // F_DUPFD_CLOEXEC
];

/// The Rust runtime, the allocator, channels and logs.
const EVERY_THREAD: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
    libc::SYS_writev,
];

const CONTROL: &[i64] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_socketpair,
];

/// An eventfd for each interrupt that vhost raises is made when the driver starts the device.
const VCPU: &[i64] = &[libc::SYS_eventfd2];

/// To run; to start at the kernel's entry point, and to say where a guest has died; and to bind interrupts and doorbells
/// when the driver configures a device.
const VCPU_IOCTLS: &[u64] = &[
    kvm::<()>(_IOC_NONE, 0x80),               // KVM_RUN
    kvm::<kvm_regs>(_IOC_READ, 0x81),         // KVM_GET_REGS
    kvm::<kvm_regs>(_IOC_WRITE, 0x82),        // KVM_SET_REGS
    kvm::<kvm_sregs>(_IOC_READ, 0x83),        // KVM_GET_SREGS
    kvm::<kvm_sregs>(_IOC_WRITE, 0x84),       // KVM_SET_SREGS
    kvm::<kvm_irq_routing>(_IOC_WRITE, 0x6a), // KVM_SET_GSI_ROUTING
    kvm::<kvm_irqfd>(_IOC_WRITE, 0x76),       // KVM_IRQFD
    kvm::<kvm_ioeventfd>(_IOC_WRITE, 0x79),   // KVM_IOEVENTFD
];

/// What a thread does before its own filter, and what is done to make one; to look at what a disk is, and to make its rings.
/// clone3 is refused by a filter of its own.
const WORKSHOP: &[i64] = &[
    libc::SYS_capset,
    libc::SYS_clone3,
    libc::SYS_fstat,
    libc::SYS_io_uring_setup,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
];

const WORKSHOP_IOCTLS: &[u64] = &[
    kvm::<kvm_lapic_state>(_IOC_READ, 0x8e),  // KVM_GET_LAPIC
    kvm::<kvm_lapic_state>(_IOC_WRITE, 0x8f), // KVM_SET_LAPIC
    kvm::<()>(_IOC_NONE, 0x41),               // KVM_CREATE_VCPU
    kvm::<kvm_msrs>(_IOC_WRITE, 0x89),        // KVM_SET_MSRS
    kvm::<kvm_cpuid2>(_IOC_WRITE, 0x90),      // KVM_SET_CPUID2
];

/// To take the descriptor of a disk, a tap or vhost-net into use.
fn device_ioctls() -> [u64; 7] {
    [
        libc::BLKSSZGET,
        libc::BLKPBSZGET,
        libc::TUNGETIFF,
        libc::TUNSETVNETHDRSZ,
        libc::TUNSETVNETLE,
        VHOST_SET_OWNER(),
        VHOST_GET_FEATURES(),
    ]
}

/// The flags of clone(2) by which the C library makes a thread. Without any of them it would be a process.
const THREAD: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

const PRCTL_REQUESTS: &[u64] = &[
    15, // PR_SET_NAME
    38, // PR_SET_NO_NEW_PRIVS
];

const SECCOMP_SET_MODE_FILTER: u64 = 1;

/// A request of KVM's, as linux/kvm.h defines it.
#[expect(
    clippy::cast_possible_truncation,
    reason = "TryFrom is not const, and no structure of KVM's has 4 GiB"
)]
const fn kvm<T>(direction: u32, number: u32) -> u64 {
    const KVMIO: u32 = 0xAE;
    ioctl_expr(direction, KVMIO, number, size_of::<T>() as u32)
}

/// Every device: it waits for kicks and signals the guest.
const DEVICE: &[i64] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
];

const BLOCK: &[i64] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
];

/// The disk's requests go through rings (io_uring) that can do what the calls above do and no more. A thread that could make
/// rings, or change them, could do without any filter what it liked.
const RING_FLAGS: &[u64] = &[
    0, // to submit
    1, // IORING_ENTER_GETEVENTS: to wait as well
];

/// To restrict a ring, and to let it work.
const RING_REQUESTS: &[u64] = &[
    11, // IORING_REGISTER_RESTRICTIONS
    12, // IORING_REGISTER_ENABLE_RINGS
];

const BLOCK_IOCTLS: &[u64] = &[
    0x1277, // BLKDISCARD
    0x127F, // BLKZEROOUT
];

/// `writev` every thread has.
const NET: &[i64] = &[libc::SYS_readv];

/// What a driver may ask of a tap, checksums and segmentation and the number of queues; and to start and stop vhost-net.
fn net_ioctls() -> [u64; 12] {
    [
        libc::TUNSETOFFLOAD,
        libc::TUNSETQUEUE,
        VHOST_SET_FEATURES(),
        VHOST_SET_MEM_TABLE(),
        VHOST_SET_VRING_NUM(),
        VHOST_SET_VRING_BASE(),
        VHOST_SET_VRING_ADDR(),
        VHOST_SET_VRING_CALL(),
        VHOST_SET_VRING_ERR(),
        VHOST_SET_VRING_KICK(),
        VHOST_GET_VRING_BASE(),
        VHOST_NET_SET_BACKEND(),
    ]
}

const VSOCK: &[i64] = &[
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
];

/// To tell the process that serves the device's requests where they are.
const FRONT_END: &[i64] = &[libc::SYS_recvmsg, libc::SYS_sendmsg];

/// The server of the shared folders: it opens, reads and changes files below them as the users of the guest.
const FILE_SERVER: &[i64] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fdatasync,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_lseek,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_readlinkat,
    libc::SYS_removexattr,
    libc::SYS_renameat2,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setxattr,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_unlinkat,
    libc::SYS_utimensat,
];

/// To follow the lengths of the files that the guest has mapped in the DAX window. `mmap` every thread has.
const WINDOW: &[i64] = &[libc::SYS_inotify_add_watch, libc::SYS_inotify_rm_watch];
/// What watches a shared folder: it finds what the guest knows, as the file server does, and opens nothing of it. A handle,
/// by which it tells files apart, opens nothing without open_by_handle_at, which nobody may call.
const WATCH: &[i64] = &[
    libc::SYS_fanotify_init,
    libc::SYS_fanotify_mark,
    libc::SYS_fstatfs,
    libc::SYS_name_to_handle_at,
    libc::SYS_openat2,
    libc::SYS_ppoll,
    libc::SYS_setresuid,
    libc::SYS_statx,
];

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICES: [DeviceType; 9] = [
        DeviceType::Balloon,
        DeviceType::Block,
        DeviceType::Console,
        DeviceType::Fs,
        DeviceType::Mem,
        DeviceType::Net,
        DeviceType::P9,
        DeviceType::Rng,
        DeviceType::Vsock,
    ];

    #[test]
    fn every_filter_compiles() {
        let roles = [
            Role::Control,
            Role::Vcpu,
            Role::Workshop,
            Role::Watch,
            Role::FrontEnd,
        ]
        .into_iter();
        for role in roles.chain(DEVICES.map(Role::Device)) {
            assert!(!compile(role).unwrap().is_empty(), "{role:?}");
        }
    }

    #[test]
    fn no_list_lets_a_thread_out() {
        let lists = [
            EVERY_THREAD,
            CONTROL,
            VCPU,
            DEVICE,
            BLOCK,
            NET,
            VSOCK,
            FRONT_END,
            FILE_SERVER,
            WINDOW,
            WATCH,
        ];
        assert_eq!(THREAD, 0x003d_0f00);
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_move_mount,
            libc::SYS_setns,
            libc::SYS_unshare,
            libc::SYS_chroot,
            libc::SYS_pivot_root,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
            libc::SYS_io_uring_enter,
            libc::SYS_open_by_handle_at,
            libc::SYS_kill,
        ] {
            assert!(lists.iter().all(|list| !list.contains(&call)), "{call}");
        }
    }
}
